"""Kinds of a decoder's parameters by name and shape, until the layers themselves say them."""

from typing import Any

import jax

PyTree = Any

# A gate with one output per head is a bundle of vectors, not a map between feature spaces: orthogonalising it would
# give every head's gate the same size of step whatever its gradient.
MATRIX_MIN_WIDTH = 32


def parameter_kinds(params: PyTree) -> PyTree:
    """One of `training.KINDS` for every leaf."""

    def kind(path, leaf) -> str:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        if any(word in name for name in names for word in ("head_kernel", "lm_head", "unembed")):
            return "head"
        if any("embed" in name for name in names):
            return "embedding"
        is_projection = names[-1] == "kernel" and not any("conv" in name for name in names)
        if is_projection and leaf.ndim >= 2 and min(leaf.shape[-2:]) >= MATRIX_MIN_WIDTH:
            return "matrix"
        return "vector"

    return jax.tree_util.tree_map_with_path(kind, params)
