"""Meshes by name, where arrays lie on them, and which part of a batch a process reads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from tolerances import GRADIENTS, OUTPUTS, assert_close

from lineax_seq import parallel
from lineax_seq.tasks import DataConfig, HybridConfig, TextConfig, TextTrainingConfig


def test_axes_by_name():
    assert parallel.parse_mesh("data=2,seq=4") == {"data": 2, "fsdp": 1, "tensor": 1, "seq": 4}
    assert dict(parallel.make_mesh(" fsdp = 8 ").shape) == {"data": 1, "fsdp": 8, "tensor": 1, "seq": 1}
    assert parallel.time_axis(parallel.make_mesh("seq=8")) == "seq"
    assert parallel.time_axis(parallel.make_mesh("data=8")) is None and parallel.time_axis(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2,sec=4", "unknown axis 'sec' .did you mean 'seq'"),
        ("data=2,data=4", "axis 'data' is given twice"),
        ("data", "'data' in 'data' is not NAME=SIZE; write it like data=2,seq=4"),
        ("data=0", "data=0, wants a whole number"),
        ("data=-1", "data=-1, wants a whole number"),
        ("seq=two", "seq=two, wants a whole number"),
        ("", "is not NAME=SIZE"),
        ("seq=4", "asks for 4 devices, and there are 8; set data=2, or start the job on 4 .simulated ones: XLA_FLAGS"),
        ("seq=3,data=1", "asks for 3 devices, and there are 8; choose sizes that multiply to 8, or start the job on 3"),
    ],
)
def test_what_is_no_mesh_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(text)


def test_configuration_that_the_mesh_does_not_divide_is_refused():
    def config(mesh, rows=4, microbatches=1, context=32):
        training = TextTrainingConfig(batch_size=rows, microbatches=microbatches)
        model = HybridConfig(vocab_size=258, d_model=16, num_layers=4)
        return TextConfig(model=model, data=DataConfig(context=context), training=training, mesh=mesh)

    config("data=2,fsdp=2,seq=8")
    with pytest.raises(ValueError, match="multiple of 8 row shards x 1 microbatches, batch_size is 4.* fits is 8"):
        config("data=4,fsdp=2")
    with pytest.raises(ValueError, match="2 row shards x 4 microbatches"):
        config("data=2", microbatches=4)
    with pytest.raises(ValueError, match="splits rows over 3 devices, context is 32; the next one that fits is 33"):
        config("seq=3")
    with pytest.raises(ValueError, match="did you mean 'seq'"):
        config("sea=3")


def test_state_is_split_where_sizes_divide():
    mesh = parallel.make_mesh("fsdp=4,tensor=2")
    params = {"kernel": np.zeros((3, 16, 24)), "square": np.zeros((8, 8)), "odd": np.zeros((5, 8)), "norm": np.zeros(7)}
    optimizer = optax.adam(1.0)
    like = jax.eval_shape(lambda params: (params, optimizer.init(params)), params)
    shardings, (adam, _) = parallel.state_shardings(mesh, like)
    specs = {name: sharding.spec for name, sharding in shardings.items()}
    assert specs["kernel"] == PartitionSpec(None, "fsdp", "tensor")  # not the axis that stacks layers
    assert specs["square"] == PartitionSpec("fsdp", "tensor")
    assert specs["odd"] == PartitionSpec(None, ("tensor", "fsdp")) and specs["norm"] == PartitionSpec()
    assert adam.mu == shardings and adam.nu == shardings and adam.count.spec == PartitionSpec()
    arrays = parallel.distribute(params, shardings)
    assert {x.shape for x in (s.data for s in arrays["kernel"].addressable_shards)} == {(3, 4, 12)}


def test_a_batch_is_put_together_from_parts(monkeypatch):
    """Both processes of a mesh over 2 of 4 devices each, pretended here: what each reads, and where it goes."""
    mesh = parallel.make_mesh("data=2,fsdp=2,seq=2")
    batch = np.arange(8 * 6).reshape(8, 6)
    part = parallel.local_part(mesh, 8, 6)
    assert part == (0, 1, None)
    placed = parallel.place_batch(mesh, part, 6, {"x": batch})["x"]
    np.testing.assert_array_equal(placed, batch)
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}
    with pytest.raises(ValueError, match="6 rows of a batch do not divide over data·fsdp = 4 shards.*that does is 8"):
        parallel.local_part(mesh, 6, 6)
    with pytest.raises(ValueError, match="7 tokens of a row do not divide over seq = 2 shards; .*that does is 8"):
        parallel.local_part(mesh, 8, 7)


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("shape", "owner", "parts"),
    [
        ((2, 1, 1, 4), lambda data, fsdp, tensor, seq: data, [(0, 2, None), (1, 2, None)]),
        ((1, 2, 1, 4), lambda data, fsdp, tensor, seq: seq // 2, [(0, 1, slice(0, 12)), (0, 1, slice(12, 24))]),
        ((2, 2, 2, 1), lambda data, fsdp, tensor, seq: tensor, [(0, 1, None), (0, 1, None)]),
        ((4, 1, 1, 2), lambda data, fsdp, tensor, seq: data // 2 * 2 + seq,
         [(0, 2, slice(0, 12)), (0, 2, slice(12, 24)), (1, 2, slice(0, 12)), (1, 2, slice(12, 24))]),
        ((4, 1, 1, 1), lambda data, fsdp, tensor, seq: data % 2, "process 0 hold row shards .0, 2. and time"),
        ((4, 1, 1, 1), lambda data, fsdp, tensor, seq: max(0, data - 1), "process 1 hold row shards .2. and"),
    ],
)  # fmt: skip
def test_each_process_reads_its_own_part(shape, owner, parts, monkeypatch):
    class Mesh:
        devices = np.vectorize(lambda *index: Device(owner(*index)), otypes=[object])(*np.indices(shape))

    Mesh.shape = dict(zip(parallel.AXES, shape, strict=True))
    for process in range(len(parts) if isinstance(parts, list) else 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        if isinstance(parts, str):
            with pytest.raises(ValueError, match=parts):
                parallel.local_part(Mesh, 8, 24)
        else:
            assert parallel.local_part(Mesh, 8, 24) == parts[process]


@pytest.mark.parametrize("axes", ["data=2,fsdp=2,seq=2", "fsdp=2,tensor=2,seq=2"])
def test_loss_over_shards_and_its_gradient(axes):
    mesh = parallel.make_mesh(axes)
    params = {"w": np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)}
    batch = {"x": np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)}

    def loss(params, batch, rng):
        """Each token beside the one before it, so that a missing halo would show."""
        x = batch["x"]
        axis = parallel.time_axis(mesh) if x.shape[1] < 6 else None
        pair = jnp.stack([x, parallel.token_shift(x, axis_name=axis), x**2, jnp.ones_like(x)], -1)
        return jnp.sum(jnp.tanh(pair @ params["w"])), jnp.sum(x > 0).astype(jnp.float32)

    want = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, None)
    placed = parallel.distribute(params, parallel.state_shardings(mesh, params))
    rows = parallel.place_batch(mesh, parallel.local_part(mesh, 8, 6), 6, batch)
    got = jax.jit(jax.value_and_grad(parallel.sharded_loss(loss, mesh), has_aux=True))(placed, rows, None)
    assert_close(got[0], want[0], OUTPUTS["float32"])
    assert_close(got[1], want[1], GRADIENTS["float32"])
