"""The mLSTM layer of xLSTM-7B: a matrix memory with an exponential input gate and a sigmoid forget gate.

    q, k, v = x W_q, x W_k, x W_v     i = cap(x W_i + b_i)     f = logsigmoid(cap(x W_f + b_f))     one i, f per head
    y = (LayerNorm(mLSTM(q, k, v, i, f)) ⊙ sigmoid(x W_o)) W_y,     cap(z) = 15 tanh(z / 15),     norm per head

b_i starts at -10, so that memories begin almost closed, and b_f at 3 to 6 over the heads.

Source: Beck et al. 2025 (xLSTM 7B), arXiv:2503.13427, section 3 and its initialisation of the gates; the memory itself:
Beck et al. 2024, arXiv:2405.04517, section 2.3.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ..recurrences import mlstm
from ._config import RecurrentConfig
from ._context import Context
from ._gla import attention_sizes
from ._mixer import Mixer
from ._norm import wide
from ._parts import Parts, heads, merged
from ._tap import Taps


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLSTMConfig(RecurrentConfig):
    """mLSTM as in xLSTM-7B.

    Attributes:
        num_heads: H.
        head_dim: key channels per head K; None is `expand_k · D / H`.
        expand_k, expand_v: width of all keys and of all values over D.
        gate_soft_cap: bounds the gates' pre-activations.
    """

    name: ClassVar[str] = "mlstm"
    num_heads: int = 4
    head_dim: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_soft_cap: float = 15.0

    def sizes(self, d_model: int) -> dict[str, int]:
        return attention_sizes(self, d_model)

    def build(self, parts: Parts) -> "MLSTM":
        return MLSTM(self, parts)


def _closed(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32, **_) -> jax.Array:
    return jnp.full(shape, -10.0, dtype)


def _remembering(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32, **_) -> jax.Array:
    return jnp.linspace(3.0, 6.0, shape[0]).astype(dtype)


def soft_cap(x: jax.Array, bound: float) -> jax.Array:
    """`bound · tanh(x / bound)`: x where it is small, never beyond the bound."""
    return bound * jnp.tanh(x / bound)


class MLSTM(Mixer):
    """mLSTM, `[B, T, D] -> [B, T, D]`."""

    operator = mlstm

    def __init__(self, config: MLSTMConfig, parts: Parts):
        super().__init__(config, parts)
        H, _, K, V = config.sizes(parts.d_model).values()
        self.q_proj = parts.project(H * K)
        self.k_proj = parts.project(H * K)
        self.v_proj = parts.project(H * V)
        self.i_proj = parts.gate(H, bias_init=_closed)
        self.f_proj = parts.gate(H, bias_init=_remembering)
        self.gate_proj = parts.project(H * V)
        self.o_norm = parts.layer_norm(H, V, use_bias=False)
        self.o_proj = parts.out(H * V)

    def arguments(self, x: jax.Array, taps: Taps, context: Context, shared):
        H, bound = self.config.num_heads, self.config.gate_soft_cap
        i, f = (soft_cap(wide(gate(x)), bound) for gate in (self.i_proj, self.f_proj))
        q, k, v = (heads(project(x), H) for project in (self.q_proj, self.k_proj, self.v_proj))
        return dict(q=q, k=k, v=v, i=i, f=jax.nn.log_sigmoid(f)), shared

    def output(self, o: jax.Array, x: jax.Array, arguments: dict[str, jax.Array]) -> jax.Array:
        return self.o_proj(merged(self.o_norm(o)) * jax.nn.sigmoid(self.gate_proj(x)))
