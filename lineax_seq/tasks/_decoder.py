"""A `Decoder` as tasks train it: nested dictionaries of parameters, their kinds, and the model made of them again."""

import fnmatch
from typing import Any

import jax
from flax import nnx

from ..layers import parameter_kinds
from ..models import Decoder, HybridConfig
from ..training import Task, traced

PyTree = Any


def new_decoder(config: HybridConfig, key: jax.Array | int) -> Decoder:
    return Decoder(config.decoder(), rngs=nnx.Rngs(key))


def abstract_decoder(config: HybridConfig) -> tuple[nnx.GraphDef, PyTree]:
    """The decoder without its parameters, and their shapes and dtypes as nested dictionaries."""
    with traced("a decoder"):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: new_decoder(config, 0)))
    return graphdef, nnx.to_pure_dict(state)


class DecoderTask(Task):
    """A task whose parameters are a `Decoder`'s. A subclass gives the loss and the batches.

    `freeze` is a shell pattern of the parameters that keep their first values, such as "embed.*"; None: all change.

    Raises:
      ValueError: no parameter matches `freeze`.
    """

    def __init__(self, model: HybridConfig, freeze: str | None = None):
        self.model_config, self.freeze = model, freeze
        self._graphdef, self._shapes = abstract_decoder(model)
        paths = [
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree_util.tree_leaves_with_path(self._shapes)
        ]
        if freeze is not None and not fnmatch.filter(paths, freeze):
            raise ValueError(f"freeze: no parameter matches {freeze!r}; there are {', '.join(paths)}")

    def init(self, key: jax.Array) -> PyTree:
        # Not jitted: compiling all draws as one program takes longer than they do one by one.
        return nnx.to_pure_dict(nnx.split(new_decoder(self.model_config, key))[1])

    def kinds(self) -> PyTree:
        return parameter_kinds(self.model(self._shapes))

    def trainable(self, path: str) -> bool:
        return self.freeze is None or not fnmatch.fnmatchcase(path, self.freeze)

    def model(self, params: PyTree) -> Decoder:
        """The decoder with these parameters."""
        return nnx.merge(self._graphdef, params)
