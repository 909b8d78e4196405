"""Cross-entropy of next tokens from hidden states, in chunks that never hold the logits of all tokens.

For a sum over tokens the gradient of a chunk's logits, w (softmax - onehot), is at hand when its loss is. So a
differentiated call forms d hidden and d head in the forward pass, chunk by chunk, and the backward pass only scales
them: three products with the head instead of the four that recomputing the logits costs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ..layers._check import check_positive
from ..parallel.varying import vary, varying


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`(sum of weight · nll in nats, sum of weights)`, float32 scalars.

    Args:
        hidden: [B, T, D] float32 or bfloat16; logits are `hidden @ head`: factors in that dtype, sums and softmax in
            float32.
        head: [D, vocab].
        targets: int [B, T]; token t's is the token after it. Where the weight is 0 it may be any number, such as the
            -100 of other libraries; elsewhere a target outside the vocabulary makes the sum NaN.
        weights: [B, T], 0 for tokens that do not count; None is 1 everywhere.
        chunk_size: tokens of each row whose logits exist at a time; None is all.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    problems = []
    if hidden.ndim != 3 or hidden.dtype not in (jnp.float32, jnp.bfloat16):
        problems.append(f"hidden is {hidden.dtype}{list(hidden.shape)}, wants float32 or bfloat16 [B, T, D]")
    if head.ndim != 2 or head.shape[0] != hidden.shape[-1]:
        problems.append(f"head has shape {list(head.shape)}, wants [{hidden.shape[-1]}, vocab]")
    if targets.shape != hidden.shape[:2] or not jnp.issubdtype(targets.dtype, jnp.integer):
        problems.append(f"targets is {targets.dtype}{list(targets.shape)}, wants int32{list(hidden.shape[:2])}")
    if weights is not None and weights.shape != hidden.shape[:2]:
        problems.append(f"weights has shape {list(weights.shape)}, wants {list(hidden.shape[:2])}")
    if problems:
        raise ValueError(f"cross_entropy: {'; '.join(problems)}.")
    check_positive("cross_entropy", chunk_size=chunk_size)
    B, T, D = hidden.shape
    weights = jnp.ones((B, T), jnp.float32) if weights is None else weights.astype(jnp.float32)
    outside = (targets < 0) | (targets >= head.shape[1])
    # such a target has no logit: it counts for nothing or, with a weight, spoils the sum for all to see
    counted = jnp.where(outside, jnp.where(weights == 0, 0.0, jnp.nan), weights)
    targets = jnp.where(outside, 0, targets)
    everything = hidden, head, targets, counted  # where time is split, a head that all shards share too
    hidden, head, targets, counted = vary(everything, varying(everything))
    size = min(chunk_size or T, T)
    count = -(-T // size)

    def chunks(x):  # [B, T, ...] -> [count, B, size, ...]; padding has weight 0
        x = jnp.pad(x, [(0, 0), (0, count * size - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

    return _chunked(chunks(hidden), head, chunks(targets), chunks(counted)), jnp.sum(weights)


def _nll(hidden, head, targets):
    """nll [B, C], and what it takes to differentiate it: logits and log-normaliser, float32."""
    logits = jnp.einsum("btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    normaliser = jax.nn.logsumexp(logits, -1, keepdims=True)
    target = jnp.take_along_axis(logits, targets[..., None], -1)
    return (normaliser - target)[..., 0], logits, normaliser


@jax.custom_vjp
def _chunked(hidden, head, targets, weights):
    def body(total, chunk):
        h, y, w = chunk
        return total + jnp.sum(_nll(h, head, y)[0] * w), None

    return lax.scan(body, vary(jnp.zeros((), jnp.float32), varying(hidden)), (hidden, targets, weights))[0]


def _forward(hidden, head, targets, weights):
    kernel = head.astype(hidden.dtype)

    def body(carry, chunk):
        total, d_head = carry
        h, y, w = chunk
        nll, logits, normaliser = _nll(h, kernel, y)
        onehot = y[..., None] == jnp.arange(logits.shape[-1], dtype=y.dtype)
        d_logits = ((jnp.exp(logits - normaliser) - onehot) * w[..., None]).astype(h.dtype)
        d_h = jnp.einsum("btv,dv->btd", d_logits, kernel)
        # one contracted axis: XLA's CPU backend has no bfloat16 product with float32 sums over two of them
        rows, d_rows = h.reshape(-1, h.shape[-1]), d_logits.reshape(-1, d_logits.shape[-1])
        d_head += jnp.matmul(rows.T, d_rows, preferred_element_type=jnp.float32)
        return (total + jnp.sum(nll * w), d_head), (d_h, nll)

    zero = vary((jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32)), varying(hidden))
    (total, d_head), (d_hidden, nll) = lax.scan(body, zero, (hidden, targets, weights))
    return total, (d_hidden, d_head.astype(head.dtype), nll)


def _backward(residuals, d_total):
    d_hidden, d_head, nll = residuals
    scale = functools.partial(jnp.multiply, d_total)
    return scale(d_hidden).astype(d_hidden.dtype), scale(d_head).astype(d_head.dtype), None, scale(nll)


_chunked.defvjp(_forward, _backward)
