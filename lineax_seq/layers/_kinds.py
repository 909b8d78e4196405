"""What a parameter is. Every `nnx.Param` says it, so that optimizers, weight decay and sharding never look at names.

matrix       a map between feature spaces, [.., in, out]
embedding    token embeddings [vocab, D]
head         the output head [D, vocab]
vector       biases, mixing coefficients
norm         scales and shifts of norms
convolution  the taps of short convolutions
gate         a projection with one output per head: a bundle of vectors, no map between feature spaces
decay        what a state's decay is made of
"""

from typing import Any, Literal, get_args

import jax
from flax import nnx

Kind = Literal["matrix", "embedding", "head", "vector", "norm", "convolution", "gate", "decay"]
KINDS: tuple[str, ...] = get_args(Kind)


def parameter_kinds(module: nnx.Module) -> Any:
    """The kind of every parameter, a tree of strings like `nnx.to_pure_dict(nnx.split(module)[1])`.

    Works on abstract modules (`nnx.eval_shape`) too.

    Raises:
        ValueError: parameters that do not say what they are.
    """
    state = nnx.split(module)[1]
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable)
    unknown = [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.get_metadata().get("kind") not in KINDS]
    if unknown:
        raise ValueError(
            f"parameter_kinds: {', '.join(unknown)}: no kind; make each as nnx.Param(value, kind=...) with one of "
            f"{', '.join(KINDS)}."
        )
    return nnx.to_pure_dict(jax.tree.map(lambda leaf: leaf.get_metadata()["kind"], state, is_leaf=is_variable))
