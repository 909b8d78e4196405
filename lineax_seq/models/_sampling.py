"""Drawing a token from logits: temperature, then top-k, then top-p."""

import jax
import jax.numpy as jnp
from jax import lax


def filter_top_k(logits: jax.Array, k: int) -> jax.Array:
    """The k largest logits of each row `[..., vocab]`, the others -inf; ties with the k-th stay."""
    k = min(k, logits.shape[-1])
    return jnp.where(logits >= lax.top_k(logits, k)[0][..., -1:], logits, -jnp.inf)


def filter_top_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """The fewest tokens of each row `[..., vocab]` whose probabilities reach p, the others -inf; never none.

    Source: Holtzman et al. 2019, arXiv:1904.09751, eq. 2 and 3.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(probability, -1) - probability  # the mass ahead of each token: the first one's is 0
    least = jnp.min(jnp.where(before < p, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= jnp.minimum(least, ordered[..., :1]), logits, -jnp.inf)


def sample(
    logits: jax.Array, keys: jax.Array, *, temperature: jax.Array | float, top_k: int | None, top_p: jax.Array | None
) -> jax.Array:
    """One token per row of logits `[B, vocab]` with that row's key: int32 [B].

    A temperature near 0 draws among the largest logits alone; 0 itself is the caller's `argmax`.
    """
    logits = logits.astype(jnp.float32)
    # from the largest down, so that no temperature makes a logit overflow upwards; a normal number divides
    below = logits - jnp.max(logits, -1, keepdims=True)
    logits = below / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    if top_k is not None:
        logits = filter_top_k(logits, top_k)
    if top_p is not None:
        logits = filter_top_p(logits, top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
