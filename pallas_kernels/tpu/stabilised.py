"""mLSTM on the kernel of one decay per head: its state is divided by exp(m), m the largest log-weight so far.

m_t = max(f_t + m_{t-1}, i_t) is a scan of its own, without the vectors. With it decays are exp(f_t + m_{t-1} - m_t) and
keys exp(i_t - m_t) k_t, none above its input, and o_t = q_t C_t / max(|q_t n_t|, exp -m_t). The kernel runs twice: n is
the state of values that are one. Products are float32's: the quotient magnifies what they lose.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .._shared.kernel import Kernel
from .._shared.machine import Machine
from .._shared.quotient import EMPTY, bounded_quotient
from ._matrix_state import WIDTHS, chunk_form, refuses
from .scalar import SCALAR_DECAY


def _run(
    machine: Machine,
    scale: float | None,
    chunk_size: int | None,
    fields: dict,
    reset: jax.Array | None,
    state: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """As `chunk_form`, with log-gates i and f [B, T, HV] and the state (C [B, HV, K, V], n [B, HV, K], m [B, HV])."""
    q, k, v = (fields[name].astype(jnp.float32) for name in ("q", "k", "v"))
    i, f = (fields[name].astype(jnp.float32) for name in ("i", "f"))
    C, n, m = state
    if reset is not None:
        f = jnp.where(reset[:, :, None], EMPTY, f)
    decay, largest = lax.associative_scan(
        lambda earlier, later: (earlier[0] + later[0], jnp.maximum(earlier[1] + later[0], later[1])), (f, i), axis=1
    )
    # a constant to gradients: it only keeps the numbers in range
    size = lax.stop_gradient(jnp.maximum(decay + m[:, None], largest))
    before = jnp.concatenate([m[:, None], size[:, :-1]], axis=1)

    shared = v.shape[2] // k.shape[2]
    keys = jnp.exp(i - size)[..., None] * jnp.repeat(k, shared, axis=2)
    tokens = {"q": jnp.repeat(q, shared, axis=2), "k": keys, "v": v, "g": f + before - size}
    ones = jnp.ones((*v.shape[:3], WIDTHS[0]), v.dtype)
    counts = jnp.broadcast_to(n[..., None], (*n.shape, WIDTHS[0]))
    C, numerator = chunk_form(SCALAR_DECAY, machine, scale, chunk_size, tokens, reset, C)
    n, denominator = chunk_form(SCALAR_DECAY, machine, scale, chunk_size, {**tokens, "v": ones}, reset, counts)
    o = bounded_quotient(numerator, denominator[..., 0], size)
    return (C, n[..., 0], size[:, -1]), o.astype(fields["v"].dtype)


STABILISED = Kernel(
    "stabilised",
    "tpu",
    "chunk",
    {"q": "H K", "k": "H K", "v": "HV V", "i": "HV", "f": "HV"},
    _run,
    refuses,
)
