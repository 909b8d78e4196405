"""What crosses a shard's border, against the same function of the whole row: values exact, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from tolerances import GRADIENTS, OUTPUTS, assert_close

from lineax_seq import layers, parallel

B, T, D = 2, 24, 3
# borders at the start of a shard, right behind it, inside; an id that comes back; a document longer than a shard
IDS = np.array([[1] * 6 + [2] * 1 + [1] * 6 + [3] * 11, [0] * 23 + [1]])
SHARDED = PartitionSpec(None, "seq")


def over_shards(f, P=4, inputs=2):
    mesh = parallel.make_mesh({"seq": P}, jax.devices()[:P])
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(SHARDED,) * inputs, out_specs=SHARDED))


def row():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)))


@pytest.mark.parametrize("P", [2, 4, 8])
def test_documents_over_shards(P):
    ids = jnp.asarray(IDS)

    def numbers(ids, axis_name):
        places = jnp.broadcast_to(parallel.positions(ids.shape[1], axis_name=axis_name), ids.shape)
        counted = parallel.positions(ids.shape[1], ids, axis_name)
        return places, counted, parallel.run_ids(ids, axis_name), parallel.borders(ids, axis_name)

    whole = numbers(ids, None)
    expected = [[*range(6), 0, *range(6), *range(11)], [*range(23), 0]]
    assert whole[1].tolist() == expected and whole[2][0, -1] == 3 and whole[0][0].tolist() == list(range(T))
    shards = over_shards(lambda ids: numbers(ids, "seq"), P, inputs=1)(ids)
    jax.tree.map(np.testing.assert_array_equal, shards, whole)


def test_token_shift_and_its_gradient(x64):
    x, ids = row(), jnp.asarray(IDS)

    def weighed(shift):
        return jax.grad(lambda x: jnp.sum(jnp.sin(shift(x, ids)) * jnp.arange(x.size).reshape(x.shape)))

    def whole(x, ids):
        return parallel.token_shift(x, segment_ids=ids)

    shards = over_shards(lambda x, ids: parallel.token_shift(x, segment_ids=ids, axis_name="seq"))
    want = np.where(np.asarray(parallel.borders(ids))[..., None], 0, np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1])
    np.testing.assert_array_equal(whole(x, ids), want)
    np.testing.assert_array_equal(shards(x, ids), want)
    np.testing.assert_array_equal(weighed(shards)(x), weighed(whole)(x))
    np.testing.assert_array_equal(
        over_shards(lambda x: parallel.token_shift(x, axis_name="seq"), inputs=1)(x), parallel.token_shift(x)
    )


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_short_convolution(packed, x64):
    """Width 4 over shards of 3 tokens: the halo is the whole left neighbour."""
    graphdef, params = nnx.split(layers.ShortConv(D, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    x, ids = row(), jnp.asarray(IDS)

    def both(convolve):
        def weighed(x, params):
            y = convolve(x, params)
            return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)), y

        (_, y), gradients = jax.jit(jax.value_and_grad(weighed, (0, 1), has_aux=True))(x, params)
        return y, gradients

    def run(x, params, ids, axis_name):
        conv = nnx.merge(graphdef, params)
        return conv(x, segment_ids=ids if packed else None, axis_name=axis_name)

    def shards(x, params):
        specs = (SHARDED, PartitionSpec(), SHARDED)
        mesh = parallel.make_mesh("seq=8")
        f = lambda x, params, ids: run(x, params, ids, "seq")  # noqa: E731
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=SHARDED)(x, params, ids)

    got, want = both(shards), both(lambda x, params: run(x, params, ids, None))
    assert_close(got[0], want[0], OUTPUTS["float64"], "outputs")
    assert_close(got[1], want[1], GRADIENTS["float64"], "gradients")


def test_a_shard_shorter_than_the_halo_is_refused():
    with pytest.raises(ValueError, match="shards of 3 tokens are shorter than the 4 that their right neighbour needs"):
        over_shards(lambda x: parallel.left_halo(x, 4, "seq"), P=8, inputs=1)(row())
