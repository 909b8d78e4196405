"""Chunked cross-entropy against the plain one: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import GRADIENTS, OUTPUTS, assert_close

from lineax_seq.models import cross_entropy

B, T, D, V = 2, 11, 5, 7


def plain(hidden, head, targets, weights):
    log_p = jax.nn.log_softmax(hidden @ head)
    nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return jnp.sum(nll * weights), jnp.sum(weights)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden, head, weights = rng.normal(size=(B, T, D)), rng.normal(size=(D, V)), rng.uniform(size=(B, T))
    arrays = (jnp.asarray(a, jnp.float32) for a in (hidden, head, weights))
    hidden, head, weights = arrays
    return hidden, head, jnp.asarray(rng.integers(0, V, (B, T))), weights.at[0, :3].set(0)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
def test_values_and_gradients(inputs, chunk_size):
    hidden, head, targets, weights = inputs

    def both(loss):
        def scaled(hidden, head, weights):
            total, count = loss(hidden, head, targets, weights)
            return 3 * total / count, (total, count)

        return jax.jit(jax.value_and_grad(scaled, (0, 1, 2), has_aux=True))(hidden, head, weights)

    (_, got), got_gradient = both(lambda *xs: cross_entropy(*xs, chunk_size=chunk_size))
    (_, want), want_gradient = both(plain)
    assert_close(got, want, OUTPUTS["float32"])
    assert_close(got_gradient, want_gradient, GRADIENTS["float32"])
    assert_close(cross_entropy(*inputs, chunk_size=chunk_size), want, OUTPUTS["float32"])  # undifferentiated


def test_no_weights_is_ones(inputs):
    hidden, head, targets, weights = inputs
    want = plain(hidden, head, targets, jnp.ones_like(weights))
    assert_close(cross_entropy(hidden, head, targets), want, OUTPUTS["float32"])


def test_bfloat16_hidden_sums_in_float32(inputs):
    hidden, head, targets, weights = inputs
    low = hidden.astype(jnp.bfloat16)
    loss = lambda h, w: cross_entropy(h, w, targets, weights, chunk_size=4)[0]  # noqa: E731
    total, gradient = jax.value_and_grad(loss, (0, 1))(low, head)
    want, want_gradient = jax.value_and_grad(lambda h, w: plain(h, w, targets, weights)[0], (0, 1))(hidden, head)
    assert total.dtype == jnp.float32 and [g.dtype for g in gradient] == [jnp.bfloat16, jnp.float32]
    assert_close(total, want, OUTPUTS["bfloat16"])
    assert_close(gradient, want_gradient, GRADIENTS["bfloat16"])


def largest(jaxpr) -> int:
    """Elements of the largest array in a program, inner programs included."""
    size = 0
    for equation in jaxpr.eqns:
        size = max([size, *(v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))])
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    size = max(size, largest(inner))
    return size


@pytest.mark.parametrize("differentiate", [False, True])
def test_chunks_never_hold_all_logits(differentiate):
    length, vocab = 64, 1000
    arguments = jnp.ones((1, length, D)), jnp.ones((D, vocab)), jnp.zeros((1, length), int)

    def program(chunk_size):
        loss = lambda *xs: cross_entropy(*xs, chunk_size=chunk_size)[0]  # noqa: E731
        return jax.make_jaxpr(jax.grad(loss, (0, 1)) if differentiate else loss)(*arguments)

    assert largest(program(None).jaxpr) >= length * vocab
    assert largest(program(8).jaxpr) <= 8 * vocab


def test_bad_arguments_are_refused(inputs):
    hidden, head, targets, weights = inputs
    with pytest.raises(ValueError, match=r"head has shape \[7, 5\].*targets is float32"):
        cross_entropy(hidden, head.T, weights)
    with pytest.raises(ValueError, match="weights has shape"):
        cross_entropy(hidden, head, targets, weights[0])
    with pytest.raises(ValueError, match="chunk_size=0"):
        cross_entropy(hidden, head, targets, chunk_size=0)


@pytest.mark.parametrize("outside", [-100, -1, V, 10**6])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_target_outside_the_vocabulary_counts_only_with_a_weight(inputs, outside, chunk_size):
    hidden, head, targets, weights = inputs
    other = targets.at[0, :3].set(outside)  # where the weights are 0

    def scalar(targets, weights):
        loss = lambda h, w, ws: cross_entropy(h, w, targets, ws, chunk_size=chunk_size)[0]  # noqa: E731
        return jax.value_and_grad(loss, (0, 1, 2))(hidden, head, weights)

    (got, got_gradients), (want, want_gradients) = scalar(other, weights), scalar(targets, weights)
    assert_close((got, got_gradients[:2]), (want, want_gradients[:2]), OUTPUTS["float32"])
    assert not np.any(got_gradients[2][0, :3]) and np.array_equal(got_gradients[2][1:], want_gradients[2][1:])
    assert np.isnan(scalar(targets.at[1, 4].set(outside), weights)[0])
