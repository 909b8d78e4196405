"""`causal=False` and `block_size`: what tokens read of the future, against weights between all pairs of tokens."""

import jax
import jax.numpy as jnp
import pytest
from examples import EXACT, T, direct, example, segments, with_gradients
from tolerances import GRADIENTS, assert_close

import lineax_seq as ls


def decayed_weights(g, borders):
    """`[B, T, T, HV]`: the decay from j to i <= i's past, and back from the future up to the next border.

    `borders [B, T]` numbers the documents, or the blocks, that the future ends with.
    """
    G = jnp.cumsum(g, axis=1)
    past = jnp.exp(G[:, :, None] - G[:, None])  # j < i: g of j+1..i
    before = G - g
    future = jnp.exp(before[:, None] - before[:, :, None])  # j > i: g of i..j-1
    order = jnp.arange(g.shape[1])
    later = (order[None, :] > order[:, None])[None, :, :, None]
    return jnp.where(later, jnp.where((borders[:, :, None] == borders[:, None])[..., None], future, 0), past)


@pytest.mark.parametrize(
    ("name", "block_size", "packed"),
    [
        ("simple_gla", None, False),
        ("simple_gla", 5, True),
        ("retention", None, True),
        ("linear_attention", 5, True),
        ("normalized_linear_attention", None, False),
        ("normalized_linear_attention", None, True),
        ("normalized_linear_attention", 5, False),
    ],
)
def test_reading_the_future(name, block_size, packed, x64):
    """Outputs and gradients against a matrix of weights between all pairs of tokens."""
    operator = ls.RECURRENCES[name]
    args = example(operator)
    ids = segments() if packed else jnp.zeros((2, T), jnp.int32)
    option = dict(causal=False) if block_size is None else dict(block_size=block_size)

    def ours(args):
        return operator(**args, **option, segment_ids=ids if packed else None, chunk_size=8)[0]

    def theirs(args):
        g = jnp.zeros((2, T, 4))
        if name == "simple_gla":
            g = args["g"]
        if name == "retention":
            g = g + jnp.log1p(-(2.0 ** (-5 - jnp.arange(4.0))))
        borders = ids
        if block_size is not None:
            first = jnp.argmax(ids[:, :, None] == ids[:, None], axis=2)  # of the token's document
            borders = ids * T + (jnp.arange(T) - first) // block_size
        same = ids[:, :, None] == ids[:, None]
        scale = 1.0 if name == "normalized_linear_attention" else 4**-0.5
        scores, o = direct(args["q"], args["k"], args["v"], decayed_weights(g, borders), same, scale)
        return o / scores.sum(2)[..., None] if name == "normalized_linear_attention" else o

    got, want = with_gradients(ours, args), with_gradients(theirs, args)
    assert_close(got[0], want[0], EXACT, "outputs")
    assert_close(got[1], want[1], GRADIENTS["float64"], "gradients")


def test_blocks_of_one_token_are_causal_and_one_block_is_not(x64):
    args = example(ls.simple_gla)
    assert_close(ls.simple_gla(**args, block_size=1), ls.simple_gla(**args), EXACT)
    assert_close(ls.simple_gla(**args, block_size=T), ls.simple_gla(**args, causal=False), EXACT)


def test_handing_the_state_over_between_blocks(x64):
    """Three blocks of images at once, or the third after the state of two."""
    args = example(ls.simple_gla, T=24)
    o, final = ls.simple_gla(**args, block_size=8)
    state, parts = None, []
    for part in (slice(0, 16), slice(16, 24)):
        o_part, state = ls.simple_gla(**{n: x[:, part] for n, x in args.items()}, block_size=8, initial_state=state)
        parts.append(o_part)
    assert_close((jnp.concatenate(parts, 1), state), (o, final), EXACT)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("gla", dict(causal=False), "gla: causal=False: this recurrence reads the past only"),
        ("gla", dict(block_size=4), "gla: block_size=4: this recurrence reads the past only"),
        ("lightnet", dict(block_size=4), "lightnet: block_size=4"),
        ("retention", dict(block_size=0), "block_size=0, wants a number of tokens"),
        ("retention", dict(block_size=True), "block_size=True, wants a number of tokens"),
        ("retention", dict(block_size=4, causal=False), "leave block_size out, or causal"),
        ("retention", dict(causal=False, form="scan"), "causal=False has no token scan"),
    ],
)
def test_directions_that_cannot_be_are_refused(name, options, match):
    operator = ls.RECURRENCES[name]
    args = operator.example(jax.random.key(0), B=1, T=8, H=1, K=4, V=4)
    with pytest.raises(ValueError, match=match):
        operator(**args, **options)


def test_a_kernel_that_reads_the_future_is_refused():
    args = ls.retention.example(jax.random.key(0), B=1, T=8, H=1, K=4, V=4)
    with pytest.raises(NotImplementedError, match="no kernel that reads the future"):
        ls.retention(**args, causal=False, implementation="mosaic_gpu")
