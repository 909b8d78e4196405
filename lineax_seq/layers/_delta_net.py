"""The DeltaNet and Gated DeltaNet layers.

    q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))      (width 4);   q, k <- q/|q|, k/|k|   (float32)
    beta = sigmoid(x W_b), doubled with `allow_neg_eigval`
    g = -exp(A_log) softplus(x W_a + dt_bias)                       (Gated DeltaNet only)
    y = RMSNorm(o) W_o   (DeltaNet),     y = (RMSNorm(o) ⊙ silu(x W_g)) W_o   (Gated DeltaNet)        per head

Source: Yang et al. 2024, arXiv:2406.06484 (DeltaNet) and arXiv:2412.06464 (gated), their sections on the architecture;
negative eigenvalues: Grazzi et al. 2024, arXiv:2411.12537.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ..recurrences import delta_rule, gated_delta_rule
from ._check import check_positive
from ._conv import ShortConv
from ._dense import dense
from ._gla import head_width
from ._init import NORMAL, inverse_softplus_step, log_decay_rate
from ._linear import LinearLayer
from ._norm import GatedRMSNorm, RMSNorm, l2_normalize, wide


class _DeltaLayer(LinearLayer):
    """Projections, convolutions, normalised keys and write strength: what both layers share."""

    def __init__(
        self,
        d_model,
        K,
        V,
        H,
        HV,
        *,
        allow_neg_eigval,
        conv_width,
        kernel_init,
        out_init,
        dtype,
        param_dtype,
        rngs,
        **run,
    ):
        super().__init__(d_model, dtype=dtype, **run)
        project = functools.partial(dense, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        conv = functools.partial(ShortConv, width=conv_width, param_dtype=param_dtype, rngs=rngs)
        self.q_proj = project(d_model, H * K, kernel_init=kernel_init)
        self.k_proj = project(d_model, H * K, kernel_init=kernel_init)
        self.v_proj = project(d_model, HV * V, kernel_init=kernel_init)
        self.b_proj = project(d_model, HV, kernel_init=kernel_init)
        self.o_proj = project(HV * V, d_model, kernel_init=out_init or kernel_init)
        self.q_conv, self.k_conv, self.v_conv = conv(H * K), conv(H * K), conv(HV * V)
        self.allow_neg_eigval = allow_neg_eigval
        self.num_heads, self.num_v_heads, self.key_dim, self.value_dim = H, HV, K, V

    def convolutions(self) -> tuple[ShortConv, ...]:
        return self.q_conv, self.k_conv, self.v_conv

    def state_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.num_v_heads, self.key_dim, self.value_dim)

    def _qkv_beta(self, x: jax.Array, convolve):
        def heads(y, n):
            return y.reshape(*y.shape[:2], n, -1)

        H, HV = self.num_heads, self.num_v_heads
        q = l2_normalize(heads(convolve(0, self.q_proj(x)), H)).astype(self.dtype)
        exact = l2_normalize(heads(convolve(1, self.k_proj(x)), H))
        k = exact.astype(self.dtype)
        v = heads(convolve(2, self.v_proj(x)), HV)
        beta = jax.nn.sigmoid(wide(self.b_proj(x)))
        if self.allow_neg_eigval:
            beta = 2 * beta
        if k.dtype != exact.dtype:
            # |k| must be 1 for beta = 2 to be a reflection: the write strength makes up for rounding the key
            beta = beta * jnp.repeat((_square(exact) + 1e-6) / (_square(wide(k)) + 1e-6), HV // H, -1)
        return q, k, v, beta


def _square(x: jax.Array) -> jax.Array:
    return jnp.sum(x * x, -1)


class DeltaNet(_DeltaLayer):
    """DeltaNet, `[B, T, D] -> [B, T, D]`.

    Args:
        d_model: D.
        num_heads: H.
        head_dim: key channels per head K; None is `expand_k · D / H`.
        expand_k, expand_v: width of all keys and of all values over D.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        conv_width: of the short convolutions on q, k, v.
        form, chunk_size, implementation: of the recurrence.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    recurrence = delta_rule

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        allow_neg_eigval: bool = False,
        conv_width: int = 4,
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
        check_positive("DeltaNet", d_model=d_model, num_heads=num_heads, head_dim=head_dim, conv_width=conv_width)
        K = head_dim or head_width("DeltaNet", "expand_k", expand_k, d_model, num_heads)
        V = head_width("DeltaNet", "expand_v", expand_v, d_model, num_heads)
        run = dict(
            form=form, chunk_size=chunk_size, implementation=implementation, dtype=dtype, param_dtype=param_dtype
        )
        init = dict(kernel_init=kernel_init, out_init=out_init, rngs=rngs)
        heads = (num_heads, num_heads)
        super().__init__(d_model, K, V, *heads, allow_neg_eigval=allow_neg_eigval, conv_width=conv_width, **run, **init)
        self.o_norm = RMSNorm(V, eps=norm_eps, dtype=dtype, param_dtype=param_dtype)

    def tokens(self, x: jax.Array, convolve) -> tuple[jax.Array, ...]:
        return self._qkv_beta(x, convolve)

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        return self.o_proj(self.o_norm(o).reshape(*o.shape[:2], -1))


class GatedDeltaNet(_DeltaLayer):
    """Gated DeltaNet, `[B, T, D] -> [B, T, D]`.

    Args:
        d_model: D.
        num_heads: key heads H.
        num_v_heads: value heads HV, a multiple of H; None is H. Value head j reads key head j // (HV / H).
        head_dim: key channels per head K; None is 3/4 · D / H.
        expand_v: value channels per head V over K.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        conv_width: of the short convolutions on q, k, v.
        form, chunk_size, implementation: of the recurrence.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    recurrence = gated_delta_rule

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        allow_neg_eigval: bool = False,
        conv_width: int = 4,
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
        name = "GatedDeltaNet"
        sizes = dict(d_model=d_model, num_heads=num_heads, num_v_heads=num_v_heads, head_dim=head_dim)
        check_positive(name, **sizes, conv_width=conv_width)
        HV = num_v_heads or num_heads
        if HV % num_heads:
            raise ValueError(f"{name}: num_v_heads={HV} is no multiple of num_heads={num_heads}; change one.")
        K = head_dim or head_width(name, "3/4 (give head_dim to change it)", 0.75, d_model, num_heads)
        V = head_width(name, "expand_v, with head_dim for", expand_v, K, 1)
        run = dict(
            form=form, chunk_size=chunk_size, implementation=implementation, dtype=dtype, param_dtype=param_dtype
        )
        init = dict(kernel_init=kernel_init, out_init=out_init, rngs=rngs)
        heads = (num_heads, HV)
        super().__init__(d_model, K, V, *heads, allow_neg_eigval=allow_neg_eigval, conv_width=conv_width, **run, **init)
        project = functools.partial(dense, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        self.a_proj = project(d_model, HV)
        self.gate_proj = project(d_model, HV * V)
        self.A_log = nnx.Param(log_decay_rate(rngs.params(), (HV,)))
        self.dt_bias = nnx.Param(inverse_softplus_step(rngs.params(), (HV,)))
        self.o_norm = GatedRMSNorm(V, eps=norm_eps, dtype=dtype, param_dtype=param_dtype)

    def tokens(self, x: jax.Array, convolve) -> tuple[jax.Array, ...]:
        q, k, v, beta = self._qkv_beta(x, convolve)
        rate = jax.nn.softplus(wide(self.a_proj(x)) + self.dt_bias[...])
        g = -jnp.exp(self.A_log[...].astype(rate.dtype)) * rate
        return q, k, v, g, beta

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        gate = self.gate_proj(x).reshape(o.shape)
        return self.o_proj(self.o_norm(o, gate).reshape(*o.shape[:2], -1))
