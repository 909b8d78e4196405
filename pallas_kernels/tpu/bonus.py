"""RWKV-6 on the kernel of decays per key channel: o_t = q_t (S_{t-1} + diag(u) k_t v_t^T).

A query reads the state before its token, which is the state after the token before: the kernel takes every query one
token earlier and gives its output one token later. The bonus and the first token are added outside.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .._shared.kernel import Kernel
from .._shared.machine import Machine
from ._matrix_state import chunk_form, refuses
from .diagonal import DIAGONAL_DECAY


def _run(
    machine: Machine,
    scale: float | None,
    chunk_size: int | None,
    fields: dict,
    reset: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `chunk_form`, with the parameter u among the fields."""
    q, k, v, u = (fields[name] for name in ("q", "k", "v", "u"))
    shared = v.shape[2] // k.shape[2]
    next_q = jnp.concatenate([q[:, 1:], jnp.zeros_like(q[:, :1])], axis=1)
    tokens = {"q": next_q, "k": k, "v": v, "g": fields["g"]}
    final, o = chunk_form(DIAGONAL_DECAY, machine, scale, chunk_size, tokens, reset, state)

    q = q.astype(jnp.float32) * (1.0 if scale is None else scale)
    first = jnp.einsum("bhk,bhkv->bhv", jnp.repeat(q[:, 0], shared, axis=1), state, precision=lax.Precision.HIGHEST)
    before = jnp.concatenate([first[:, None], o[:, :-1].astype(jnp.float32)], axis=1)
    if reset is not None:
        before = jnp.where(reset[:, :, None, None], 0, before)
    weights = (q * u.astype(jnp.float32) * k.astype(jnp.float32)).sum(-1)
    own = jnp.repeat(weights, shared, axis=2)[..., None] * v.astype(jnp.float32)
    return final, (before + own).astype(v.dtype)


BONUS = Kernel("diagonal_decay_bonus", "tpu", "chunk", DIAGONAL_DECAY.fields, _run, refuses, parameters={"u": "H K"})
