"""Decayed scores, whichever way the gates allow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls
from lineax_seq.recurrences import _diagonal

SIZE, CHANNELS = 64, 4


def defined(queries, keys, g):
    """The definition: all pairs, with the sums between them."""
    sums = jnp.cumsum(g, axis=0)
    decays = jnp.exp(jnp.minimum(sums[:, None] - sums[None, :], 0))
    scores = [[jnp.tril(jnp.einsum("id,jd,ijd->ij", q, k, decays)) for k in keys] for q in queries]
    since_entry, until_exit = jnp.exp(sums), jnp.exp(sums[-1] - sums)
    return scores, _diagonal.Decays(since_entry, until_exit, [q * since_entry for q in queries])


@pytest.mark.parametrize(("leaf", "mean"), [(None, -0.3), (16, -0.3), (16, -2.0), (1, -0.3), (1, -2.0), (1, -30.0)])
def test_every_way_follows_the_definition(leaf, mean, x64):
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.normal(size=(SIZE, CHANNELS)))  # noqa: E731
    queries, keys, g = [draw(), draw()], [draw()], 2 * mean * jnp.asarray(rng.random((SIZE, CHANNELS)))
    assert bool(_diagonal._mild(leaf, {"g": g[None, None, :, None]})) or leaf == 1  # these gates allow it
    weights = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), defined(queries, keys, g))

    def run(scores_of):
        total = lambda *x: sum(jax.tree.leaves(jax.tree.map(lambda s, w: (s * w).sum(), scores_of(*x), weights)))  # noqa: E731
        return scores_of(queries, keys, g), jax.grad(total, argnums=(0, 1, 2))(queries, keys, g)

    got, want = run(lambda q, k, g: _diagonal.decayed_scores(leaf, q, k, g)), run(defined)
    assert_close(got[0], want[0], OUTPUTS["float64"], "scores")
    assert_close(got[1], want[1], GRADIENTS["float64"], "gradients")


@pytest.mark.parametrize(("mean", "way"), [(-0.3, 0), (-2.0, 1), (-30.0, 2), (float("nan"), 0)])
def test_the_gates_choose(mean, way):
    g = jnp.full((1, 2, SIZE, 3, CHANNELS), mean)
    applies = [bool(shortcut.applies({"g": g})) for shortcut in ls.gla.recurrence.shortcuts]
    assert [*applies, True].index(True) == way
