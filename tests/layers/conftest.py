"""Layers whose parameters all matter: initial values are small, or zero where a gate starts shut."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lineax_seq.layers import Layer, LayerConfig, parameter_kinds


@pytest.fixture(scope="session")
def filled() -> Callable[..., Layer]:
    """(config, d_model, options of `make`) -> a layer: norms near their start, all else normal."""

    def fill(config: LayerConfig, d_model: int, **options: Any) -> Layer:
        layer = config.make(d_model, rngs=nnx.Rngs(0), **options)
        graphdef, state = nnx.split(layer)
        rng = np.random.default_rng(0)

        def value(kind: str, leaf: jax.Array) -> jax.Array:
            drawn = rng.normal(0, 0.1 if kind == "norm" else 0.4, leaf.shape)
            return jnp.asarray(leaf + drawn if kind in ("norm", "decay") else drawn, leaf.dtype)

        return nnx.merge(graphdef, jax.tree.map(value, parameter_kinds(layer), nnx.to_pure_dict(state)))

    return fill
