"""Cumulated log-decays and decayed scores against their definitions, with gates from mild to closed, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import with_gradients
from tolerances import GRADIENTS, OUTPUTS, assert_close

from lineax_seq.recurrences import _decay, _diagonal

SIZE, CHANNELS = 32, 3
GATES = {"mild": -0.3, "medium": -2.0, "strong": -30.0, "closed": -1e30, "infinite": -np.inf}


def gates(kind: str, *shape: int) -> jax.Array:
    """Drawn around their mean; closed ones stand among mild ones, one in eight."""
    rng, mean = np.random.default_rng(0), GATES[kind]
    if mean > -100:
        return 2 * mean * jnp.asarray(rng.random(shape))
    return jnp.asarray(np.where(rng.random(shape) < 1 / 8, mean, -0.6 * rng.random(shape)))


def sums_between(g: jax.Array) -> jax.Array:
    """`[C, C, ...]`: the sum of the gates of tokens j+1..i, by no difference; zero for j >= i."""
    t = np.arange(g.shape[0])
    between = (t[None, None] > t[None, :, None]) & (t[None, None] <= t[:, None, None])  # [i, j, t]
    return jnp.where(between.reshape(*between.shape, *(1,) * (g.ndim - 1)), g, 0).sum(2)


def held(g: jax.Array) -> jax.Array:
    """What the gates are to what is compared: closed ones all alike, and without a gradient."""
    return jnp.where(g < _decay.bounded(g), jax.lax.stop_gradient(_decay.bounded(g)), g)


# ---- sums of gates


@pytest.mark.parametrize("kind", GATES)
def test_cumulated_gates(kind, x64):
    g = _decay.bounded(gates(kind, SIZE, CHANNELS))
    sums = _decay.cumulated(g)
    assert_close(sums.since_entry, jnp.cumsum(g, axis=0), OUTPUTS["float64"], "since entry")
    later = sums.at((slice(None), None)).minus(sums.at((None, slice(None))))
    lower = jnp.tril(jnp.ones((SIZE, SIZE), bool))[..., None]
    assert_close(jnp.where(lower, later, 0), sums_between(g), OUTPUTS["float64"], "between")
    after = jnp.flip(jnp.cumsum(jnp.flip(g, 0), axis=0), 0) - g
    assert_close(_decay.until_exit(g), after, OUTPUTS["float64"], "until exit")


@pytest.mark.parametrize("of", ["decay", "weight"])
def test_differences_do_not_cancel(of):
    """In float32, after a gate of -1e4 (a closed one, at the lowest that counts) ratios keep all their digits."""
    g = np.full(SIZE, -1e-3, np.float32)
    g[3] = -1e4
    sums = _decay.cumulated(_decay.bounded(jnp.asarray(g), of), of)
    later = sums.at(slice(5, None)).minus(sums.at(slice(4, 5)))
    want = np.cumsum(g[5:].astype(np.float64))
    np.testing.assert_allclose(later, want, rtol=OUTPUTS["float32"])


@pytest.mark.parametrize("kind", GATES)
def test_pairs_of_one_gate(kind, x64):
    """Values and gradients; of closed gates too, as the caller bounds them."""
    g = _decay.bounded(gates(kind, SIZE))
    got, want = with_gradients(_decay.pair_logs, g), with_gradients(sums_between, g)
    assert_close(got[0], want[0], OUTPUTS["float64"], "logs")
    assert_close(got[1], want[1], GRADIENTS["float64"], "gradient")


@pytest.mark.parametrize("kind", GATES)
def test_decays_that_channels_share(kind, x64):
    g = gates(kind, SIZE)
    keep = jnp.ones(SIZE, bool).at[11].set(False)

    def ours(g):
        d = _decay.per_head(g)
        return d.since_entry, d.until_exit, d.pairs(None), d.pairs(_decay.documents(keep))

    def theirs(g):
        g = held(g)
        lower, document = jnp.tril(jnp.ones((SIZE, SIZE), bool)), jnp.arange(SIZE) >= 11
        pairs = jnp.where(lower, jnp.exp(sums_between(g)), 0)
        within = jnp.where(document[:, None] == document[None], pairs, 0)
        return jnp.exp(jnp.cumsum(g)), jnp.exp(sums_between(g)[-1]), pairs, within

    got, want = with_gradients(ours, g), with_gradients(theirs, g)
    assert_close(got[0], want[0], OUTPUTS["float64"], "values")
    assert_close(got[1], want[1], GRADIENTS["float64"], "gradient")
    assert np.all(np.asarray(got[1][0])[np.asarray(g) < -1e3] == 0)


# ---- decays per channel


def defined(reads, writes, g):
    """The definition: all pairs, with the sums between them."""
    g = held(g)
    decays = jnp.exp(sums_between(g))  # [C, C, K]
    scores = [[jnp.tril(jnp.einsum("id,jd,ijd->ij", r, w, decays)) for w in writes] for r in reads]
    since_entry, until_exit = jnp.exp(jnp.cumsum(g, axis=0)), decays[-1]
    return _diagonal.Decayed(scores, [r * since_entry for r in reads], [w * until_exit for w in writes], since_entry)


@pytest.mark.parametrize(
    ("mild", "kind"), [(True, "mild"), *((False, kind) for kind in GATES)], ids=lambda x: str(x).lower()
)
@pytest.mark.parametrize("size", [SIZE, 4])
def test_decayed_reads_and_writes(mild, kind, size, x64):
    """Both ways follow the definition: `mild` where it is exact, the other with any gates; chunks shorter than a
    stretch too."""
    rng = np.random.default_rng(1)
    draw = lambda: jnp.asarray(rng.normal(size=(size, CHANNELS)))  # noqa: E731
    arguments = [draw(), draw()], [draw(), draw()], gates(kind, size, CHANNELS)
    ours = lambda reads, writes, g: _diagonal.decayed(jnp.asarray(mild), reads, writes, g)  # noqa: E731
    got, want = with_gradients(ours, *arguments), with_gradients(defined, *arguments)
    assert_close(got[0], want[0], OUTPUTS["float64"], "values")
    assert_close(got[1], want[1], GRADIENTS["float64"], "gradients")


@pytest.mark.parametrize(
    ("gate", "mild"), [(0.0, True), (-1.8, True), (-1.9, False), (-30.0, False), (-np.inf, False), (np.nan, True)]
)
def test_the_gates_choose(gate, mild):
    """One channel of one chunk decides for all; 60 / 32 is 1.875. NaN must not change how others are rounded."""
    g = jnp.zeros((1, 2, SIZE, 2, CHANNELS)).at[0, 1, :, 1, 2].set(gate)
    assert bool(_diagonal.mild({"g": g})) == mild
