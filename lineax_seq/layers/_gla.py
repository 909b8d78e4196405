"""The gated linear attention layer.

    q, k = x W_q, x W_k     v = x W_v     g = logsigmoid(x W_1 W_2 + b) / 16     o = GLA(q, k, v, g)
    y = (RMSNorm(o) ⊙ silu(x W_g)) W_o        per head; W_1 has 16 columns

Source: Yang et al. 2023, arXiv:2312.06635, the section on the GLA Transformer.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ..recurrences import gla
from ._check import check_positive
from ._conv import ShortConv
from ._dense import dense
from ._init import NORMAL
from ._linear import LinearLayer
from ._norm import GatedRMSNorm, wide


class GatedLinearAttention(LinearLayer):
    """Gated linear attention, `[B, T, D] -> [B, T, D]`.

    Args:
        d_model: D.
        num_heads: H.
        head_dim: key channels per head K; None is `expand_k · D / H`.
        expand_k, expand_v: width of all keys and of all values over D.
        gate_rank: columns of W_1.
        gate_normalizer: divides the log-decay, so that it starts near 0.
        conv_width: of short convolutions (with silu) on q, k, v; None leaves them out, as in the paper.
        form, chunk_size, implementation: of the recurrence.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    recurrence = gla

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        conv_width: int | None = None,
        norm_eps: float = 1e-5,
        form: str = "chunk",
        chunk_size: int | None = None,
        implementation: str | None = None,
        kernel_init=NORMAL,
        out_init=None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, form=form, chunk_size=chunk_size, implementation=implementation, dtype=dtype)
        name = "GatedLinearAttention"
        sizes = dict(d_model=d_model, num_heads=num_heads, head_dim=head_dim)
        check_positive(name, **sizes, gate_rank=gate_rank, conv_width=conv_width)
        K = head_dim or head_width(name, "expand_k", expand_k, d_model, num_heads)
        V = head_width(name, "expand_v", expand_v, d_model, num_heads)
        project = functools.partial(dense, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        self.q_proj = project(d_model, num_heads * K)
        self.k_proj = project(d_model, num_heads * K)
        self.v_proj = project(d_model, num_heads * V)
        self.decay_down_proj = project(d_model, gate_rank)
        self.decay_up_proj = project(gate_rank, num_heads * K, use_bias=True)
        self.gate_proj = project(d_model, num_heads * V)
        self.o_norm = GatedRMSNorm(V, eps=norm_eps, dtype=dtype, param_dtype=param_dtype)
        out = functools.partial(project, kernel_init=out_init or kernel_init)
        self.o_proj = out(num_heads * V, d_model)
        self.convs = nnx.List()
        if conv_width:
            conv = functools.partial(ShortConv, width=conv_width, param_dtype=param_dtype, rngs=rngs)
            self.convs = nnx.List([conv(num_heads * width) for width in (K, K, V)])
        self.num_heads, self.key_dim, self.value_dim, self.gate_normalizer = num_heads, K, V, gate_normalizer

    def convolutions(self) -> tuple[ShortConv, ...]:
        return tuple(self.convs)

    def tokens(self, x: jax.Array, convolve) -> tuple[jax.Array, ...]:
        def heads(y):
            return y.reshape(*y.shape[:2], self.num_heads, -1)

        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.convs:
            q, k, v = convolve(0, q), convolve(1, k), convolve(2, v)
        logits = wide(self.decay_up_proj(self.decay_down_proj(x)))
        g = jax.nn.log_sigmoid(logits) / self.gate_normalizer
        return heads(q), heads(k), heads(v), heads(g)

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        gate = self.gate_proj(x).reshape(o.shape)
        return self.o_proj(self.o_norm(o, gate).reshape(*o.shape[:2], -1))

    def state_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.num_heads, self.key_dim, self.value_dim)


def head_width(caller: str, what: str, expand: float, d_model: int, num_heads: int) -> int:
    """`expand · d_model / num_heads`.

    Raises:
        ValueError: it is not a whole number of at least 1.
    """
    width = expand * d_model / num_heads
    if width < 1 or width != int(width):
        raise ValueError(
            f"{caller}: {what}={expand} of d_model={d_model} over num_heads={num_heads} is {width} channels per head; "
            "choose numbers that make it whole."
        )
    return int(width)
