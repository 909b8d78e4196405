"""Every law of a layer finds the layer that breaks it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lineax_seq as ls
from lineax_seq.testing import check_layer, layer_laws

D, HEADS = 8, 2


class Retention(nnx.Module):
    """The smallest layer with every method."""

    def __init__(self):
        draw = jax.nn.initializers.normal(0.5)
        self.weights = nnx.Param(draw(jax.random.key(0), (3, D, D)))

    def qkv(self, x):
        return [(x @ weight).reshape(*x.shape[:-1], HEADS, D // HEADS) for weight in self.weights[...]]

    def merged(self, o):
        return o.reshape(*o.shape[:-2], D)

    def __call__(self, x, *, segment_ids=None):
        return self.merged(ls.retention(*self.qkv(x), segment_ids=segment_ids)[0])

    def init_cache(self, batch, max_length):
        return jnp.zeros((batch, HEADS, D // HEADS, D // HEADS))

    def prefill(self, x, cache, *, lengths=None):
        """Token by token, so that a row's state stays where its tokens end."""
        outputs = []
        for t in range(x.shape[1]):
            y, after = self.step(x[:, t], cache)
            real = jnp.ones(x.shape[0], bool) if lengths is None else t < lengths
            cache = jnp.where(real[:, None, None, None], after, cache)
            outputs.append(y)
        return jnp.stack(outputs, 1), cache

    def step(self, x, cache):
        o, cache = ls.retention.step(*self.qkv(x), state=cache)
        return self.merged(o), cache


class ReadsTheFuture(Retention):
    def __call__(self, x, *, segment_ids=None):
        return super().__call__(jnp.roll(x, -1, 1), segment_ids=segment_ids)


class ForgetsDocuments(Retention):
    def __call__(self, x, *, segment_ids=None):
        return super().__call__(x)


class StepsDiffer(Retention):
    def step(self, x, cache):
        y, cache = super().step(x, cache)
        return 1.01 * y, cache


class PrefillStartsAnew(Retention):
    def prefill(self, x, cache, *, lengths=None):
        return super().prefill(x, jnp.zeros_like(cache), lengths=lengths)


class PaddingCounts(Retention):
    def prefill(self, x, cache, *, lengths=None):
        return super().prefill(x, cache)


class CacheNarrows(Retention):
    def step(self, x, cache):
        y, cache = super().step(x, cache.astype(jnp.float32))
        return y, cache.astype(jnp.bfloat16)


class SquareRootOfNothing(Retention):
    def __call__(self, x, *, segment_ids=None):
        return super().__call__(x, segment_ids=segment_ids) + jnp.sqrt(0 * x)


class SaysNothing(Retention):
    def __call__(self, x, *, segment_ids=None):
        return 0 * x


class Narrow(Retention):
    def __call__(self, x, *, segment_ids=None):
        return super().__call__(x, segment_ids=segment_ids).astype(jnp.bfloat16)


BROKEN = {
    "future": (ReadsTheFuture, "causality", "outputs before the tokens that changed"),
    "nothing": (SaysNothing, "causality", "their own outputs did not"),
    "dtype": (Narrow, "causality", "y is bfloat16 for float32 inputs"),
    "documents": (ForgetsDocuments, "packed = separate", "row 0, the document of tokens 4 to 5"),
    "pieces": (PrefillStartsAnew, "prefill in pieces = whole", "row 0, the second piece of 4 tokens"),
    "steps": (StepsDiffer, "steps = whole", "token 0: relative rms 1.0e-02"),
    "padding": (PaddingCounts, "right-padded = alone", "the token after the padded ones"),
    "cache": (CacheNarrows, "the cache keeps its form", "bfloat16"),
    "gradients": (SquareRootOfNothing, "gradients are finite", "Nonfinite"),
}


def test_a_right_layer_obeys_all_laws():
    check_layer(Retention(), D)


@pytest.mark.parametrize(("kind", "law", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_layer_is_found(kind, law, message):
    with pytest.raises(AssertionError, match=message) as error:
        check_layer(kind(), D, laws=[law])
    assert f"{kind.__name__} breaks 1 of 1 laws.\nlaw {law!r} is broken" in str(error.value)


def test_every_law_has_a_layer_that_breaks_it():
    assert {law for _, law, _ in BROKEN.values()} == set(layer_laws(Retention(), D))
