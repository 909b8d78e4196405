"""Decoders with parameters from NumPy: initialisers cost more compile time than the models they initialise."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lineax_seq.models import Decoder, DecoderConfig


@pytest.fixture(scope="session")
def filled() -> Callable[[DecoderConfig], Decoder]:
    """config -> a decoder: norm scales near 1, all else normal with `init_std`."""

    def fill(config: DecoderConfig) -> Decoder:
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
        rng = np.random.default_rng(0)

        def values(path, leaf):
            mean, std = (1, 0.1) if "scale" in jax.tree_util.keystr(path) else (0, config.init_std)
            return jnp.asarray(rng.normal(mean, std, leaf.shape), leaf.dtype)

        return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(values, abstract))

    return fill
