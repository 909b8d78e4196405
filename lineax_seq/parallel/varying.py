"""What the compiler knows about where values differ, inside `jax.shard_map`; under `check_vma=False` nothing.

A scan whose state starts the same everywhere and comes to differ has to be told so before it begins.
"""

import jax
from jax import lax


def varying(tree) -> frozenset[str]:
    """The mesh axes over which any of the leaves may differ."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary(tree, axes: frozenset[str]):
    """The tree with every leaf free to differ over the axes: the gradient of what did not is their sum."""
    order = tuple(sorted(axes))

    def one(x):
        missing = tuple(a for a in order if a not in varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)
