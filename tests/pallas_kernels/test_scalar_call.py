"""What all matrix-state kernels share: refusals, block sizes, the addresses of a head's rows, meshes."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec as P
from tolerances import OUTPUTS, assert_close

import lineax_seq as ls
import pallas_kernels
from pallas_kernels import KERNELS, Machine, machine_here
from pallas_kernels._shared import block_sizes, partition
from pallas_kernels.profiler import _programs, _targets
from pallas_kernels.profiler._aot import environment
from pallas_kernels.tpu import _heads
from pallas_kernels.tpu._block_sizes import BlockSizes, choices, choose, head_choices


def call(**changes):
    sizes = dict(T=64, K=64, V=64, B=1, H=2, HV=2) | {k: v for k, v in changes.items() if k in "TKVBH" or k == "HV"}
    args = ls.simple_gla.example(jax.random.key(0), dtype=changes.get("dtype", jnp.float32), **sizes)
    return ls.simple_gla(**args, chunk_size=changes.get("chunk_size", 64), implementation="mosaic_tpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(K=32), "K=32, wants one of"),
        (dict(V=48), "V=48, wants one of"),
        (dict(T=256, chunk_size=256), "chunk_size=256"),
        (dict(dtype=jnp.float16), "q is float16"),
    ],
    ids=str,
)
def test_refuses_what_it_cannot(changes, reason):
    with pallas_kernels.interpret(), pytest.raises(NotImplementedError, match=reason):
        call(**changes)


def test_refuses_where_there_is_no_tpu():
    with pytest.raises(NotImplementedError, match="runs on cpu"):
        call()


def test_block_sizes():
    assert head_choices(16, 16) == [8, 16]
    assert head_choices(2, 8) == [8]
    assert head_choices(16, 64) == [32, 64]
    assert head_choices(12, 12) == [12]
    chosen = choose("scalar_decay", "no such device", 16, 16, K=128, V=128, dtype="bfloat16")
    assert chosen == BlockSizes(128, 8)
    assert choose("scalar_decay", "x", 16, 16, 64, K=128, V=128, dtype="bfloat16").chunk == 64
    assert choices(dict(H=2, HV=4, C=64)) == [BlockSizes(64, 4)] and len(choices(dict(H=16))) == 4
    with pytest.raises(ValueError, match="chunk=96"):
        BlockSizes(96, 8)
    with pytest.raises(ValueError, match="heads=0"):
        BlockSizes(64, 0)


def test_block_sizes_from_the_table(monkeypatch):
    row = dict(kernel="delta", device="TPU v9", K=128, V=128, dtype="bfloat16", chunk=64, heads=16, source="a test")
    monkeypatch.setattr(block_sizes, "rows", lambda: [row])
    facts = dict(K=128, V=128, dtype="bfloat16")
    assert choose("delta", "TPU v9", 32, 32, **facts) == BlockSizes(64, 16)
    assert choose("delta", "TPU v9", 8, 8, **facts) == BlockSizes(64, 8)
    assert choose("delta", "TPU v9", 32, 32, 128, **facts) == BlockSizes(128, 8)
    assert choose("delta", "TPU v8", 32, 32, **facts) == BlockSizes(128, 8)


def test_rows_of_the_table_are_reached():
    """Each names a kernel and a device that exist, once, and where its numbers come from."""
    kinds, seen = {target.kind for target in _targets.TARGETS.values()}, set()
    for row in block_sizes.rows():
        facts = {name: row[name] for name in block_sizes.FACTS}
        assert _programs.tunable(row["kernel"]).record == row["kernel"] and row["device"] in kinds, facts
        assert (*facts.values(), row["chunk"]) not in seen and row["source"]["versions"], facts
        seen.add((*facts.values(), row["chunk"]))
        kernel, device = facts.pop("kernel"), facts.pop("device")
        heads = row["source"]["sizes"]["H"]
        chosen = choose(kernel, device, heads, heads, row["chunk"], **facts)
        assert chosen == BlockSizes(row["chunk"], row["heads"])
    assert seen


def test_explicit_block_sizes_are_obeyed_or_refused():
    fields = ls.linear_attention.example(jax.random.key(0), B=1, T=64, H=16, HV=16, K=64, V=64)
    state = jnp.zeros((1, 16, 64, 64))
    with pallas_kernels.interpret():
        run = functools.partial(KERNELS["tpu", "chunk", "no_decay"], machine_here(), 1.0, 64, fields, None, state)
        jaxpr = str(jax.make_jaxpr(functools.partial(run, block_sizes=BlockSizes(64, 16)))())
        assert "grid=(1, 1, 1)" in jaxpr
        assert "grid=(1, 2, 1)" in str(jax.make_jaxpr(run)())
        with pytest.raises(ValueError, match="heads wants one of"):
            run(block_sizes=BlockSizes(64, 4))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 interprets no words of a reference")
@pytest.mark.parametrize(("heads", "width", "dtype"), [(2, 64, "bfloat16"), (3, 256, "bfloat16"), (3, 128, "float32")])
def test_rows_of_a_head(heads, width, dtype):
    """The words and strides that compiled kernels use, which the strict interpreter does not know."""
    x = jax.random.normal(jax.random.key(0), (1, 16, heads, width)).astype(dtype)

    def copy(x_ref, o_ref):
        reader, writer = _heads.Reader(x_ref, width, None, False), _heads.Writer(o_ref, width, False)
        for head in range(heads):
            writer[heads - 1 - head] = reader[head]
        writer.close()

    laid_out = _heads.laid_out(x)
    o = pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(laid_out.shape, x.dtype), interpret=True)(laid_out)
    np.testing.assert_array_equal(_heads.heads_back(o, heads, width), x[:, :, ::-1])


@pytest.mark.parametrize("heads", [(2, 2), (2, 4)])
def test_automatic_meshes_gather_nothing(heads):
    """The rule that XLA is told, with a function in the kernel's place that it could not split by itself."""

    def run(q, v, state):
        o = jnp.fft.fft(v, axis=1).real + jnp.repeat(q.sum((1, 3)), v.shape[2] // q.shape[2], 1)[:, None, :, None]
        return o, 2 * state

    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )

    def put(shape, *spec):
        x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    q, v = (put((4, 8, n, 4), "data", None, "model") for n in heads)
    state = put((4, heads[1], 4, 4), "data", "model")
    dims = ["B T H K", "B T HV V", "B HV K V"]
    machine = Machine("tpu", "any")
    split = jax.jit(lambda *arrays: partition.over_mesh(machine, run, dims, dims[1:], heads, arrays))
    text = split.lower(q, v, state).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "all-reduce", "collective-permute"))
    assert_close(split(q, v, state), run(*map(np.asarray, (q, v, state))), OUTPUTS["float32"])


EXPLICIT = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels import KERNELS, machine_here

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
put = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
rows = lambda heads: put((2, 256, heads, 128), jnp.bfloat16, "data", None, "model")
numbers = put((2, 256, 8), jnp.float32, "data", None, "model")
fields = {"q": rows(4), "k": rows(4), "v": rows(8), "g": numbers, "beta": numbers}
state, reset = put((2, 8, 128, 128), jnp.float32, "data", "model"), put((2, 256), jnp.bool_, "data")

kernel = KERNELS["tpu", "chunk", "delta_scalar_decay"]

def run(fields, reset, state, d_state, d_o):
    call = lambda fields, state: kernel(machine_here(), 1.0, 128, fields, reset, state)
    out, pull = jax.vjp(call, fields, state)
    return out, pull((d_state, d_o))

with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = jax.jit(run).lower(fields, reset, state, state, rows(8)).compile().as_text()
kernels = len(re.findall("tpu_custom_call", text))
moved = re.findall("all-gather|all-to-all|all-reduce|collective-permute", text)
print(kernels, moved, "bf16[1,256,4,128]" in text)
"""


@pytest.mark.slow
@kernel_cases.compiler
def test_explicit_meshes_gather_nothing(tmp_path):
    command = [sys.executable, "-c", EXPLICIT]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split("\n")[-2:] == ["2 [] True", ""], done.stderr[-2000:]
