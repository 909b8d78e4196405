"""The gated linear attention layer.

    q, k = x W_q, x W_k     v = x W_v     g = logsigmoid(x W_1 W_2 + b) / 16     o = GLA(q, k, v, g)
    y = (RMSNorm(o) ⊙ silu(x W_g)) W_o        per head; W_1 has 16 columns

Source: Yang et al. 2023, arXiv:2312.06635, the section on the GLA Transformer.
"""

import dataclasses
from typing import ClassVar

import jax

from ..recurrences import gla
from ._config import RecurrentConfig, channels
from ._context import Context
from ._mixer import Mixer
from ._norm import wide
from ._parts import ZEROS, Parts, heads, merged
from ._tap import Taps


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionConfig(RecurrentConfig):
    """Gated linear attention.

    Attributes:
        num_heads: H.
        head_dim: key channels per head K; None is `expand_k · D / H`.
        expand_k, expand_v: width of all keys and of all values over D.
        gate_rank: columns of W_1.
        gate_normalizer: divides the log-decay, so that it starts near 0.
        conv_width: of short convolutions (with silu) on q, k, v; None leaves them out, as in the paper.
    """

    name: ClassVar[str] = "gla"
    num_heads: int = 4
    head_dim: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    conv_width: int | None = None

    def sizes(self, d_model: int) -> dict[str, int]:
        return attention_sizes(self, d_model)

    def build(self, parts: Parts) -> "GatedLinearAttention":
        return GatedLinearAttention(self, parts)


def attention_sizes(config, d_model: int) -> dict[str, int]:
    """Sizes from `num_heads`, `head_dim`, `expand_k` and `expand_v`, as many value heads as key heads."""
    caller, H = type(config).__name__, config.num_heads
    of_width = f"of d_model={d_model} over num_heads={H}"
    K = config.head_dim or channels(caller, f"expand_k={config.expand_k} {of_width}", config.expand_k * d_model / H)
    V = channels(caller, f"expand_v={config.expand_v} {of_width}", config.expand_v * d_model / H)
    return {"H": H, "HV": H, "K": K, "V": V}


class GatedLinearAttention(Mixer):
    """Gated linear attention, `[B, T, D] -> [B, T, D]`."""

    operator = gla

    def __init__(self, config: GatedLinearAttentionConfig, parts: Parts):
        H, _, K, V = config.sizes(parts.d_model).values()
        self.q_proj = parts.project(H * K)
        self.k_proj = parts.project(H * K)
        self.v_proj = parts.project(H * V)
        self.decay = parts.low_rank(config.gate_rank, H * K, kind="decay", bias_init=ZEROS)
        self.gate_proj = parts.project(H * V)
        self.o_norm = parts.gated_norm(V)
        self.o_proj = parts.out(H * V)
        widths = {"q": H * K, "k": H * K, "v": H * V}
        taps = {name: parts.conv(w, config.conv_width) for name, w in widths.items()} if config.conv_width else {}
        super().__init__(config, parts, taps)

    def arguments(self, x: jax.Array, taps: Taps, context: Context, shared):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.conv_width:
            q, k, v = taps("q", q), taps("k", k), taps("v", v)
        g = jax.nn.log_sigmoid(wide(self.decay(x))) / self.config.gate_normalizer
        H = self.config.num_heads
        return dict(q=heads(q, H), k=heads(k, H), v=heads(v, H), g=heads(g, H)), shared

    def output(self, o: jax.Array, x: jax.Array, arguments: dict[str, jax.Array]) -> jax.Array:
        gate = heads(self.gate_proj(x), self.config.num_heads)
        return self.o_proj(merged(self.o_norm(o, gate)))
