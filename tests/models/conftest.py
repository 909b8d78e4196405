"""Decoders with parameters from NumPy: initialisers cost more compile time than the models they initialise."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lineax_seq.layers import parameter_kinds
from lineax_seq.models import Decoder, DecoderConfig, HybridConfig


@pytest.fixture(scope="session")
def filled() -> Callable[[DecoderConfig | HybridConfig], Decoder]:
    """config -> a decoder: norm scales near 1, all else normal with `init_std`."""

    def fill(config: DecoderConfig | HybridConfig) -> Decoder:
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        graphdef, abstract = nnx.split(model)
        rng = np.random.default_rng(0)

        def values(kind, leaf):
            mean, std = (1, 0.1) if kind == "norm" else (0, config.init_std)
            return jnp.asarray(rng.normal(mean, std, leaf.shape), leaf.dtype)

        return nnx.merge(graphdef, jax.tree.map(values, parameter_kinds(model), nnx.to_pure_dict(abstract)))

    return fill
