"""The families, and examples and a matrix form that their tests share, all in float64."""

import jax
import jax.numpy as jnp
import pytest
from cases import CHUNK
from tolerances import OUTPUTS

import lineax_seq as ls

# One recurrence of each family: what is the same for its relatives is tested quickly on these, on all others slowly.
FAMILIES = (
    *(ls.linear_attention, ls.simple_gla, ls.gla, ls.gated_delta_rule, ls.rwkv7, ls.hgrn, ls.mamba),
    *(ls.normalized_linear_attention, ls.mlstm, ls.lightnet, ls.log_linear_attention),
)
every_family = pytest.mark.parametrize("operator", FAMILIES, ids=lambda operator: operator.name)
EXACT = OUTPUTS["float64"]
T = 2 * CHUNK + 5
STARTS = (7, 25)  # where the documents of the packed examples start


def families_first(*quick, among=()):
    """Every recurrence `among` those given, or of all; quick are those given, or else the families."""
    quick, among = quick or FAMILIES, among or ls.RECURRENCES.values()
    return pytest.mark.parametrize(
        "operator",
        [
            pytest.param(operator, id=operator.name, marks=() if operator in quick else pytest.mark.slow)
            for operator in among
        ],
    )


def example(operator, seed=0, **sizes):
    sizes = {**dict(B=2, T=T, H=2, HV=4, K=4, V=6, D=5, N=3, L=7), **sizes}
    return operator.example(jax.random.key(seed), dtype=jnp.float64, **sizes)


def segments(length=T, batch=2):
    return jnp.broadcast_to(sum((jnp.arange(length) >= start).astype(jnp.int32) for start in STARTS), (batch, length))


def heads(x, n):
    """Key heads repeated for the value heads that share them."""
    return jnp.repeat(x, n, axis=2)


def with_gradients(fn, *args):
    """`fn(*args)` and the gradients of a weighted sum of its outputs."""

    @jax.jit
    def run(args):
        out, pull = jax.vjp(fn, *args)
        weights = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(9), leaf.shape, leaf.dtype), out)
        return out, pull(weights)

    return run(args)


def direct(q, k, v, weights, same, scale):
    n = v.shape[2] // q.shape[2]
    scores = jnp.einsum("bihk,bjhk->bijh", heads(q, n) * scale, heads(k, n)) * weights * same[..., None]
    return scores, jnp.einsum("bijh,bjhv->bihv", scores, v)
