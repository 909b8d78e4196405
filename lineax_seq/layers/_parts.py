"""The parts of layers: projections, norms and convolutions made from what all of them share, each of a known kind."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ._conv import ShortConv
from ._dense import dense
from ._kinds import Kind
from ._norm import GatedRMSNorm, LayerNorm, RMSNorm

NORMAL = jax.nn.initializers.normal(0.02)
ZEROS = jax.nn.initializers.zeros
Initializer = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Makes the parts of one layer; see `LayerConfig.make` for the fields."""

    d_model: int
    rngs: nnx.Rngs
    kernel_init: Initializer
    out_init: Initializer
    norm_eps: float
    dtype: Any
    param_dtype: Any

    def dense(
        self,
        inputs: int,
        outputs: int,
        *,
        kind: Kind = "matrix",
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        bias_kind: Kind = "vector",
    ) -> nnx.Linear:
        """A projection; with a bias where `bias_init` is given."""
        return dense(
            inputs,
            outputs,
            use_bias=bias_init is not None,
            kernel_init=kernel_init or self.kernel_init,
            bias_init=bias_init or ZEROS,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
            kernel_metadata={"kind": kind},
            bias_metadata={"kind": bias_kind},
        )

    def project(self, outputs: int, **options: Any) -> nnx.Linear:
        """A projection of the layer's input."""
        return self.dense(self.d_model, outputs, **options)

    def gate(self, heads: int, bias_init: Initializer | None = None) -> nnx.Linear:
        """A projection of the layer's input with one output per head."""
        return self.project(heads, kind="gate", bias_init=bias_init)

    def out(self, inputs: int) -> nnx.Linear:
        """The projection that ends a residual branch."""
        return self.dense(inputs, self.d_model, kernel_init=self.out_init)

    def low_rank(
        self,
        rank: int,
        outputs: int,
        *,
        activation: Literal["tanh", "sigmoid"] | None = None,
        kind: Kind = "matrix",
        bias_init: Initializer | None = None,
    ) -> "LowRank":
        """A projection of the layer's input through `rank` columns."""
        down = self.project(rank, kind=kind)
        return LowRank(down, self.dense(rank, outputs, kind=kind, bias_init=bias_init, bias_kind=kind), activation)

    def rms_norm(self, *shape: int) -> RMSNorm:
        return RMSNorm(*shape, eps=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)

    def gated_norm(self, *shape: int) -> GatedRMSNorm:
        return GatedRMSNorm(*shape, eps=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)

    def layer_norm(self, *shape: int, use_bias: bool = True, eps: float | None = None) -> LayerNorm:
        eps = self.norm_eps if eps is None else eps
        return LayerNorm(*shape, use_bias=use_bias, eps=eps, dtype=self.dtype, param_dtype=self.param_dtype)

    def conv(self, channels: int, width: int) -> ShortConv:
        return ShortConv(channels, width=width, param_dtype=self.param_dtype, rngs=self.rngs)

    def param(self, value: jax.Array, kind: Kind = "vector") -> nnx.Param:
        return nnx.Param(value.astype(self.param_dtype), kind=kind)

    def head_param(self, draw: Callable[[jax.Array, tuple[int, ...]], jax.Array], heads: int) -> nnx.Param:
        """One number per head on which a decay depends, float32 whatever the parameters are."""
        return nnx.Param(draw(self.rngs.params(), (heads,)), kind="decay")


class LowRank(nnx.Module):
    """`activation(x W_1) W_2 + b`: a map through few columns."""

    def __init__(self, down: nnx.Linear, up: nnx.Linear, activation: Literal["tanh", "sigmoid"] | None):
        self.down, self.up, self.activation = down, up, activation

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.down(x)
        return self.up(getattr(jax.nn, self.activation)(y) if self.activation else y)


def heads(x: jax.Array, n: int) -> jax.Array:
    """`[B, T, n·c] -> [B, T, n, c]`."""
    return x.reshape(*x.shape[:2], n, -1)


def merged(x: jax.Array) -> jax.Array:
    """`[B, T, n, c] -> [B, T, n·c]`."""
    return x.reshape(*x.shape[:2], -1)


def log_decay_rate(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A_log = log A with A ~ U(0, 16), float32; the bound below keeps the log finite."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1e-4, 16.0))


def inverse_softplus_step(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """dt_bias with softplus(dt_bias) = dt, log dt ~ U(log 1e-3, log 1e-1), float32.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 3.6.
    """
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
    return dt + jnp.log(-jnp.expm1(-dt))
