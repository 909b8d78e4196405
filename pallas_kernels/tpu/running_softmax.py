"""LightNet on the kernel of decays per key channel: its state is divided by exp(z), z the log of all weights so far.

z_t = logaddexp(z_{t-1}, k_t) is a scan of its own, without the values. With it the share of the weights that a token
brings is sigmoid(k_t - z_{t-1}), which is its key, and what is left to the tokens before it, one minus that, its decay.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .._shared.kernel import Kernel
from .._shared.machine import Machine
from .._shared.quotient import EMPTY
from ._matrix_state import chunk_form, refuses
from .diagonal import DIAGONAL_DECAY

PIECE = 64  # tokens that the scan walks through one by one, in all pieces at once


def _run(
    machine: Machine,
    scale: float | None,
    chunk_size: int | None,
    fields: dict,
    reset: jax.Array | None,
    state: tuple[jax.Array, jax.Array],
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """As `chunk_form`, with logits k [B, T, H, K], no gates, and the state (z [B, HV, K], S [B, HV, K, V])."""
    v, (first, mean) = fields["v"], state
    shared = v.shape[2] // fields["k"].shape[2]
    q, k = (jnp.repeat(fields[name], shared, axis=2) for name in ("q", "k"))
    k = k.astype(jnp.float32)
    totals = _totals(k, reset, first)
    before = jnp.concatenate([first[:, None], totals[:, :-1]], axis=1)
    if reset is not None:
        before = jnp.where(reset[..., None, None], EMPTY, before)
    present = k > EMPTY / 2
    share = k - before
    g = jnp.where(present, -jax.nn.softplus(share), 0)
    tokens = {"q": q, "k": jnp.where(present, jax.nn.sigmoid(share), 0), "v": v, "g": g}
    mean, o = chunk_form(DIAGONAL_DECAY, machine, scale, chunk_size, tokens, reset, mean)
    return (totals[:, -1], mean), o


@jax.custom_vjp
def _totals(k: jax.Array, reset: jax.Array | None, first: jax.Array) -> jax.Array:
    """z `[B, T, HV, K]`, after every token."""
    starts = jnp.zeros(k.shape[:2], bool) if reset is None else reset
    starts = starts[..., None, None]
    first = jnp.where(starts[:, 0], EMPTY, first)
    k = k.at[:, 0].set(jnp.logaddexp(k[:, 0], first))
    join = lambda earlier, later: (  # noqa: E731
        earlier[0] | later[0],
        jnp.where(later[0], later[1], jnp.logaddexp(earlier[1], later[1])),
    )
    return _scan(join, (starts, k), (False, EMPTY))[1]


def _totals_forward(k, reset, first):
    totals = _totals(k, reset, first)
    return totals, (k, reset, first, totals)


def _totals_backward(residuals, d_totals):
    """The share of a token's weight in each later total, `exp(k_j - z_t)`, falls by `exp(z_{t-1} - z_t)` a token."""
    k, reset, first, totals = residuals
    before = jnp.concatenate([first[:, None], totals[:, :-1]], axis=1)
    left = jnp.exp(before - totals)
    if reset is not None:
        left = jnp.where(reset[..., None, None], 0, left)
    after = jnp.concatenate([left[:, 1:], jnp.zeros_like(left[:, :1])], axis=1)
    join = lambda later, earlier: (later[0] * earlier[0], earlier[1] + earlier[0] * later[1])  # noqa: E731
    d_totals = _scan(join, (after, d_totals), (1.0, 0.0), reverse=True)[1]
    return jnp.exp(k - totals) * d_totals, None, left[:, 0] * d_totals[:, 0]


_totals.defvjp(_totals_forward, _totals_backward)


def _scan(join, tokens: tuple, empty: tuple, reverse: bool = False) -> tuple:
    """Tokens `[B, T, ...]` joined up to each one, or with `reverse` from each one on; joining `empty` changes nothing.

    In pieces: a scan of all tokens by halves would read and write them once for every level.
    """
    batch, length = tokens[0].shape[:2]
    pieces = -(-length // PIECE)

    def split(x, empty):
        padding = [(0, 0), (0, pieces * PIECE - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, constant_values=empty).reshape(batch, pieces, PIECE, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)

    def body(carry, token):
        joined = join(carry, token)
        return joined, joined

    tokens = tuple(split(x, e) for x, e in zip(tokens, empty, strict=True))
    nothing = tuple(jnp.full_like(x[0], e) for x, e in zip(tokens, empty, strict=True))
    whole, local = lax.scan(body, nothing, tokens, reverse=reverse)
    whole = lax.associative_scan(join, whole, axis=1, reverse=reverse)
    order = (lambda x, e: (x[:, 1:], e[:, :1])) if reverse else (lambda x, e: (e[:, :1], x[:, :-1]))
    others = tuple(jnp.concatenate(order(x, e), axis=1) for x, e in zip(whole, nothing, strict=True))
    joined = join(others, local)
    back = lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, -1, *x.shape[3:])[:, :length]  # noqa: E731
    return tuple(back(x) for x in joined)


RUNNING_SOFTMAX = Kernel("running_softmax", "tpu", "chunk", {"q": "H K", "k": "H K", "v": "HV V"}, _run, refuses)
