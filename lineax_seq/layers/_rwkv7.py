"""RWKV-7: its time mixing and its channel mixing. x' is the token before x, and every input a mixture x + (x' - x) mu.

    r, k, v = x_r W_r, x_k W_k, x_v W_v       g = -exp(-1/2) sigmoid(tanh(x_w W_1) W_2 + b)       a = sigmoid(lora(x_a))
    kappa = k ⊙ xi / |k ⊙ xi|    k <- k ⊙ (1 + (a - 1) ⊙ alpha)    v <- v + (v_1 - v) ⊙ sigmoid(lora(x_v))
    S_t = (diag(exp g) - (a ⊙ kappa) kappa^T) S_{t-1} + k v^T,     o = r S
    y = ((LayerNorm(o) + (r · (rho ⊙ k)) v) ⊙ sigmoid(x_g W_1) W_2) W_o                                    per head

v_1 are the values of the model's first such layer, which has none to mix in. Channel mixing: y = relu(x_k W_k)² W_v.

Source: Peng et al. 2025 (RWKV-7), arXiv:2503.14456, section 4: its weight preparation, time mixing and MLP.
"""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from ..recurrences import rwkv7
from ._config import LayerConfig, RecurrentConfig, channels
from ._context import Context
from ._feed_forward import FeedForward
from ._mixer import Mixer
from ._norm import l2_normalize, wide
from ._parts import ZEROS, Parts, heads, merged
from ._tap import Taps, TokenShift

VALUES = "rwkv7_values"  # in `shared`: the first layer's values [B, T, H, V]
_STRONGEST = -(2.718281828459045**-0.5)  # log-decay, exp(-1/2): so that a chunk's decays stay within float32
_MIXED = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # how fast mu falls over the channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config(RecurrentConfig):
    """RWKV-7's time mixing, with heads of D / num_heads channels.

    Attributes:
        num_heads: H.
        value_residual: mix in the values of the first layer; that one itself has False.
        decay_rank, rate_rank, value_rank, gate_rank: columns of the low-rank maps to g, a, the mixture of values and
            the output gate; None grows with D, as in the paper's models.
    """

    name: ClassVar[str] = "rwkv7"
    num_heads: int = 4
    value_residual: bool = True
    decay_rank: int | None = None
    rate_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None

    def sizes(self, d_model: int) -> dict[str, int]:
        width = channels("RWKV7Config", f"d_model={d_model} over num_heads={self.num_heads}", d_model / self.num_heads)
        return {"H": self.num_heads, "HV": self.num_heads, "K": width, "V": width}

    def first(self) -> Self:
        return dataclasses.replace(self, value_residual=False)

    def build(self, parts: Parts) -> "RWKV7":
        return RWKV7(self, parts)


def _rank(width: float) -> int:
    """The nearest multiple of 32, at least that."""
    return max(32, 32 * round(width / 32))


def _falling(power: float, D: int) -> jax.Array:
    """mu over the channels: from 1, all of the token before, down to 0."""
    return 1 - (jnp.arange(D) / D) ** power


def _half_lives(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32, **_) -> jax.Array:
    """Biases of g: channels from those that hardly forget to those that do so at once."""
    return (-6.5 + 5 * jnp.linspace(0.0, 1.0, shape[0])).astype(dtype)


def _ones(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32, **_) -> jax.Array:
    return jnp.ones(shape, dtype)


class RWKV7(Mixer):
    """RWKV-7's time mixing, `[B, T, D] -> [B, T, D]`."""

    operator = rwkv7
    kept = ("gate",)

    def __init__(self, config: RWKV7Config, parts: Parts):
        D, (H, _, K, V) = parts.d_model, config.sizes(parts.d_model).values()
        super().__init__(config, parts, {"shift": TokenShift(D)})
        self.mu = parts.param(jnp.stack([_falling(power, D) for power in _MIXED.values()]))  # [6, D]
        self.r_proj, self.k_proj, self.v_proj = (parts.project(D) for _ in "rkv")
        narrow, wider = D**0.5, D**0.8
        self.decay = parts.low_rank(
            config.decay_rank or _rank(1.8 * narrow), D, activation="tanh", kind="decay", bias_init=_half_lives
        )
        self.rate = parts.low_rank(config.rate_rank or _rank(1.8 * narrow), D, bias_init=ZEROS)
        if config.value_residual:
            self.value_mixture = parts.low_rank(config.value_rank or _rank(1.3 * narrow), D, bias_init=_ones)
        self.gate = parts.low_rank(config.gate_rank or _rank(0.6 * wider), D, activation="sigmoid")
        self.xi = parts.param(jnp.full((H, K), 0.85))
        self.alpha = parts.param(jnp.ones((H, K)))
        self.rho = parts.param(jnp.zeros((H, K)))
        self.o_norm = parts.layer_norm(H, V, eps=V * 1e-5)
        self.o_proj = parts.out(D)

    def arguments(self, x: jax.Array, taps: Taps, context: Context, shared):
        H, change = self.config.num_heads, taps("shift", x) - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + change * mu for mu in self.mu[...].astype(x.dtype))
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        k, v = wide(heads(k, H)), heads(v, H)
        g = _STRONGEST * jax.nn.sigmoid(wide(self.decay(x_w)))
        rate = heads(jax.nn.sigmoid(wide(self.rate(x_a))), H)
        removal = l2_normalize(k * wide(self.xi[...]))
        k = (k * (1 + (rate - 1) * wide(self.alpha[...]))).astype(x.dtype)
        if not self.config.value_residual:
            shared = {**shared, VALUES: v}
        elif VALUES not in shared:
            raise ValueError(
                "RWKV7: value_residual=True mixes in the values of a model's first layer, and there was none; give "
                "that layer value_residual=False, or this one."
            )
        else:
            mixture = heads(jax.nn.sigmoid(wide(self.value_mixture(x_v))), H)
            v = (v + (shared[VALUES] - v) * mixture).astype(x.dtype)
        given = dict(q=heads(r, H), k=k, v=v, g=heads(g, H), a=-removal, b=removal * rate)
        return {**given, "gate": self.gate(x_g)}, shared

    def output(self, o: jax.Array, x: jax.Array, arguments: dict[str, jax.Array]) -> jax.Array:
        r, k, v = (wide(arguments[name]) for name in "qkv")
        bonus = jnp.sum(r * k * wide(self.rho[...]), -1, keepdims=True) * v
        return self.o_proj(merged(self.o_norm(o) + bonus.astype(o.dtype)) * arguments["gate"])

    def init_shared(self, x: jax.Array):
        if self.config.value_residual:
            return {}
        H = self.config.num_heads
        return {VALUES: jnp.zeros((*x.shape[:2], H, self.d_model // H), x.dtype)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7ChannelMixConfig(LayerConfig):
    """RWKV-7's feed-forward, with `d_ff` hidden channels; None is 4·D."""

    name: ClassVar[str] = "rwkv7_channel_mix"
    d_ff: int | None = None

    def build(self, parts: Parts) -> "RWKV7ChannelMix":
        return RWKV7ChannelMix(self, parts)


class RWKV7ChannelMix(FeedForward):
    """RWKV-7's channel mixing, `[B, T, D] -> [B, T, D]`."""

    def __init__(self, config: RWKV7ChannelMixConfig, parts: Parts):
        super().__init__(config, parts, {"shift": TokenShift(parts.d_model)})
        d_ff = config.d_ff or 4 * parts.d_model
        self.mu = parts.param(_falling(1.0, parts.d_model))
        self.up_proj, self.down_proj = parts.project(d_ff), parts.out(d_ff)

    def tokens(self, x: jax.Array, taps: Taps, context: Context, shared):
        mixed = x + (taps("shift", x) - x) * self.mu[...].astype(x.dtype)
        return self.down_proj(jnp.square(jax.nn.relu(self.up_proj(mixed)))), shared
