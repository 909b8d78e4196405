"""The DeltaNet and Gated DeltaNet layers.

    q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))      (width 4);   q, k <- q/|q|, k/|k|   (float32)
    beta = sigmoid(x W_b), doubled with `allow_neg_eigval`
    g = -exp(A_log) softplus(x W_a + dt_bias)                       (Gated DeltaNet only)
    y = RMSNorm(o) W_o   (DeltaNet),     y = (RMSNorm(o) ⊙ silu(x W_g)) W_o   (Gated DeltaNet)        per head

Source: Yang et al. 2024, arXiv:2406.06484 (DeltaNet) and arXiv:2412.06464 (gated), their sections on the architecture;
negative eigenvalues: Grazzi et al. 2024, arXiv:2411.12537.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ..recurrences import delta_rule, gated_delta_rule
from ._config import RecurrentConfig, channels
from ._context import Context
from ._gla import attention_sizes
from ._mixer import Mixer
from ._norm import l2_normalize, wide
from ._parts import Parts, heads, inverse_softplus_step, log_decay_rate, merged
from ._tap import Taps


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(RecurrentConfig):
    """DeltaNet.

    Attributes:
        num_heads: H.
        head_dim: key channels per head K; None is `expand_k · D / H`.
        expand_k, expand_v: width of all keys and of all values over D.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        conv_width: of the short convolutions on q, k, v.
    """

    name: ClassVar[str] = "delta_net"
    num_heads: int = 4
    head_dim: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    allow_neg_eigval: bool = False
    conv_width: int = 4

    def sizes(self, d_model: int) -> dict[str, int]:
        return attention_sizes(self, d_model)

    def build(self, parts: Parts) -> "DeltaNet":
        return DeltaNet(self, parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(RecurrentConfig):
    """Gated DeltaNet.

    Attributes:
        num_heads: key heads H.
        num_v_heads: value heads HV, a multiple of H; None is H. Value head j reads key head j // (HV / H).
        head_dim: key channels per head K; None is 3/4 · D / H.
        expand_v: value channels per head V over K.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        conv_width: of the short convolutions on q, k, v.
    """

    name: ClassVar[str] = "gated_delta_net"
    num_heads: int = 4
    num_v_heads: int | None = None
    head_dim: int | None = None
    expand_v: float = 2.0
    allow_neg_eigval: bool = False
    conv_width: int = 4

    def sizes(self, d_model: int) -> dict[str, int]:
        caller, H, K = type(self).__name__, self.num_heads, self.head_dim
        HV = self.num_v_heads or H
        if HV % H:
            raise ValueError(f"{caller}: num_v_heads={HV} is no multiple of num_heads={H}; change one.")
        if K is None:
            what = f"3/4 of d_model={d_model} over num_heads={H} (without head_dim)"
            K = channels(caller, what, 0.75 * d_model / H)
        return {
            "H": H,
            "HV": HV,
            "K": K,
            "V": channels(caller, f"expand_v={self.expand_v} of head_dim={K}", self.expand_v * K),
        }

    def build(self, parts: Parts) -> "GatedDeltaNet":
        return GatedDeltaNet(self, parts)


class _DeltaLayer(Mixer):
    """Projections, convolutions, normalised keys and write strength: what both layers share."""

    def __init__(self, config: DeltaNetConfig | GatedDeltaNetConfig, parts: Parts):
        H, HV, K, V = config.sizes(parts.d_model).values()
        self.q_proj = parts.project(H * K)
        self.k_proj = parts.project(H * K)
        self.v_proj = parts.project(HV * V)
        self.b_proj = parts.gate(HV)
        self.o_proj = parts.out(HV * V)
        widths = {"q": H * K, "k": H * K, "v": HV * V}
        super().__init__(config, parts, {name: parts.conv(w, config.conv_width) for name, w in widths.items()})
        self.num_heads, self.num_v_heads = H, HV

    def arguments(self, x: jax.Array, taps: Taps, context: Context, shared):
        H, HV = self.num_heads, self.num_v_heads
        q = l2_normalize(heads(taps("q", self.q_proj(x)), H)).astype(self.dtype)
        exact = l2_normalize(heads(taps("k", self.k_proj(x)), H))
        k = exact.astype(self.dtype)
        v = heads(taps("v", self.v_proj(x)), HV)
        beta = jax.nn.sigmoid(wide(self.b_proj(x)))
        if self.config.allow_neg_eigval:
            beta = 2 * beta
        if k.dtype != exact.dtype:
            # |k| must be 1 for beta = 2 to be a reflection: the write strength makes up for rounding the key
            beta = beta * jnp.repeat((_square(exact) + 1e-6) / (_square(wide(k)) + 1e-6), HV // H, -1)
        return dict(q=q, k=k, v=v, beta=beta), shared


def _square(x: jax.Array) -> jax.Array:
    return jnp.sum(x * x, -1)


class DeltaNet(_DeltaLayer):
    """DeltaNet, `[B, T, D] -> [B, T, D]`."""

    operator = delta_rule

    def __init__(self, config: DeltaNetConfig, parts: Parts):
        super().__init__(config, parts)
        self.o_norm = parts.rms_norm(config.sizes(parts.d_model)["V"])

    def output(self, o: jax.Array, x: jax.Array, arguments: dict[str, jax.Array]) -> jax.Array:
        return self.o_proj(merged(self.o_norm(o)))


class GatedDeltaNet(_DeltaLayer):
    """Gated DeltaNet, `[B, T, D] -> [B, T, D]`."""

    operator = gated_delta_rule

    def __init__(self, config: GatedDeltaNetConfig, parts: Parts):
        super().__init__(config, parts)
        HV, V = self.num_v_heads, config.sizes(parts.d_model)["V"]
        self.a_proj = parts.gate(HV)
        self.gate_proj = parts.project(HV * V)
        self.A_log = parts.head_param(log_decay_rate, HV)
        self.dt_bias = parts.head_param(inverse_softplus_step, HV)
        self.o_norm = parts.gated_norm(V)

    def arguments(self, x: jax.Array, taps: Taps, context: Context, shared):
        given, shared = super().arguments(x, taps, context, shared)
        rate = jax.nn.softplus(wide(self.a_proj(x)) + self.dt_bias[...])
        g = -jnp.exp(self.A_log[...].astype(rate.dtype)) * rate
        return {**given, "g": g}, shared

    def output(self, o: jax.Array, x: jax.Array, arguments: dict[str, jax.Array]) -> jax.Array:
        return self.o_proj(merged(self.o_norm(o, heads(self.gate_proj(x), self.num_v_heads))))
