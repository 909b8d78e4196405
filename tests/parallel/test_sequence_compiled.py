"""What the compiler makes of it: how many collectives, of how many bytes, and what runs while they do."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hlo import collectives
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls
from pallas_kernels import Machine, tracing_for

SIZES = dict(B=1, H=2, HV=2, K=16, V=16, D=32, N=4, L=14)
# Forward and backward alike; parameters would add the sum of their gradients.
NAMES = ("simple_gla", "gated_delta_rule", "mlstm", "rwkv7")
SIBLINGS = ("hgrn2", "rwkv6")  # they prepare their chunks as gla does


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("seq",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))


def compiled(operator, devices: int, shard_length: int, gradient: bool, strategy="all_gather", packed=False, **sizes):
    """The outputs, or the arguments' gradients, of one layer over sharded time."""
    mesh = mesh_of(devices)
    args = jax.eval_shape(
        lambda: operator.example(jax.random.key(0), **{**SIZES, "T": devices * shard_length, **sizes})
    )
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(None, "seq")))  # noqa: E731
    args = {name: place(x) if operator.arguments[name].per_token else x for name, x in args.items()}
    ids = place(jax.ShapeDtypeStruct((1, devices * shard_length), jnp.int32)) if packed else None
    call = ls.parallel.sequence_parallel(operator, mesh, strategy=strategy)
    outputs = lambda args, ids: call(**args, segment_ids=ids)[0]  # noqa: E731
    loss = lambda args, ids: (outputs(args, ids) ** 2).sum()  # noqa: E731
    return jax.jit(jax.grad(loss) if gradient else outputs).lower(args, ids).compile()


@pytest.mark.parametrize("operator", [ls.RECURRENCES[name] for name in NAMES], ids=NAMES)
def test_one_all_gather_each_way(operator):
    """In each direction one, of the packed summaries, whatever the length."""
    forward, both = (collectives(compiled(operator, 8, 32, gradient).as_text()) for gradient in (False, True))
    loss = [c for c in both if c == ("all-reduce", 4)]  # its scalar
    both = [c for c in both if c not in loss]
    assert [kind for kind, _ in forward] == ["all-gather"] and [kind for kind, _ in both] == ["all-gather"] * 2
    longer = collectives(compiled(operator, 8, 64, True).as_text())
    assert [c for c in longer if c != ("all-reduce", 4)] == both
    state = 4 * SIZES["HV"] * SIZES["K"] * SIZES["V"]
    dense = ls.RECURRENCES["delta_rule"].recurrence.monoid
    parts = 2 if operator.recurrence.monoid is dense else 1
    assert 8 * parts * state <= forward[0][1] <= 1.1 * 8 * parts * state


@pytest.mark.parametrize(
    ("strategy", "rounds"),
    [("all_gather", {"all-gather": 2}), ("ring", {"collective-permute": 6}), ("tree", {"collective-permute": 4})],
)
def test_rounds_of_the_strategies(strategy, rounds):
    """On four devices, forward and backward: 1, P-1 and log2 P rounds a direction."""
    found = collectives(compiled(ls.simple_gla, 4, 32, True, strategy).as_text())
    assert {kind: sum(k == kind for k, _ in found) for kind, size in found if size > 4} == rounds


def test_a_shard_prepares_once():
    """Its summary and its outputs are made of the same factors: the gates decide once how to prepare them."""
    args = ls.gla.example(jax.random.key(0), **{**SIZES, "T": 4 * 64, "K": 8})
    call = ls.parallel.sequence_parallel(ls.gla, mesh_of(4), strategy="all_gather")
    with tracing_for(Machine("tpu", "TPU v5 lite")):  # which holds all chunks at once
        program = jax.jit(lambda args: call(**args, implementation="xla")).lower(args).compile()
    assert program.as_text().count(" conditional(") == 1


def test_packed_documents_add_a_few_numbers_a_shard():
    """Four say where documents start, and two bits a head what is not finite in them; beside the summaries each way."""
    found = collectives(compiled(ls.simple_gla, 8, 32, True, packed=True).as_text())
    found = sorted(size for kind, size in found if kind == "all-gather")
    assert len(found) == 4 and found[:2] == [8 * 2 * SIZES["HV"], 8 * 4 * 4]


def test_memory_of_a_device_is_its_shard_s():
    """Temporary bytes with four times the devices and the sequence grow by the gathered summaries only."""
    few, many = (
        compiled(ls.simple_gla, devices, 4096, True).memory_analysis().temp_size_in_bytes for devices in (2, 8)
    )
    summaries = 4 * SIZES["HV"] * (SIZES["K"] * SIZES["V"] + 1)
    assert many - few <= 6 * 6 * summaries
    assert few > 4 * 4096 * SIZES["H"] * SIZES["K"]


# ---- for a TPU that is not there


@functools.cache
def on_tpu(name: str, program: str) -> dict:
    """Facts of one layer compiled for 16 TPUs: `forward`, or `both` forward and backward."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no TPU compiler")
    script = Path(__file__).with_name("aot_tpu.py")
    env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # compiling opens no TPU that another process could hold
    env.pop("XLA_FLAGS", None)  # those of the simulated devices
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, script, name, program], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["simple_gla", pytest.param("gated_delta_rule", marks=pytest.mark.slow)])
def test_collectives_on_tpu(name):
    """v5e:4x4: one all-gather forward, one backward, of 16 packed summaries."""
    forward, both = on_tpu(name, "forward"), on_tpu(name, "both")
    assert forward["all_gathers"] == 1 and both["all_gathers"] == 2
    assert forward["others"] == both["others"] == 0


# lightnet's scores hold the normalisers of the state: it has no products to run before the state is known.
@pytest.mark.parametrize("name", ["simple_gla", "gla", *(pytest.param(n, marks=pytest.mark.slow) for n in SIBLINGS)])
def test_products_run_while_the_summaries_travel(name):
    """Matrix products stand between start and end of the all-gather."""
    (overlapped,) = on_tpu(name, "forward")["products_during"]
    assert overlapped >= 1


@pytest.mark.parametrize("name", ["simple_gla", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gla", *SIBLINGS))])
def test_products_run_while_summaries_travel_both_ways(name):
    overlapped = on_tpu(name, "both")["products_during"]
    assert len(overlapped) == 2 and min(overlapped) >= 1, overlapped


# ---- a million tokens


@pytest.mark.slow
def test_a_million_tokens():
    """1,048,576 tokens over 8 shards, forward and backward, against the token scan."""
    operator, length = ls.gated_delta_rule, 1 << 20
    args = operator.example(jax.random.key(0), B=1, T=length, H=1, K=4, V=4)
    state = jax.random.normal(jax.random.key(1), (1, 1, 4, 4))
    d_o = jax.random.normal(jax.random.key(2), (1, length, 1, 4))
    call = ls.parallel.sequence_parallel(operator, mesh_of(8), strategy="all_gather")

    def evaluate(call, **options):
        def run(args, state, d_o):
            (o, final), pull = jax.vjp(lambda args, state: call(**args, initial_state=state, **options), args, state)
            return (o, final), pull((d_o, jnp.ones_like(final)))

        return jax.jit(run)(args, state, d_o)

    (out, grads), (want, want_grads) = evaluate(call), evaluate(operator, form="scan")
    assert_close(out, want, OUTPUTS["float32"], "outputs")
    assert_close(grads, want_grads, GRADIENTS["float32"], "gradients")
