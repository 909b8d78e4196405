"""Values that differ between devices, and those that are the same on all of them, inside `jax.shard_map`.

The type of every value says over which mesh axes it may differ, unless `jax.shard_map` runs with `check_vma=False`. The
carry of a scan must keep its type. So a state that starts the same on all devices and comes to differ in the scan has
to get the type of a differing value before the scan begins; `vary` gives it that type.
"""

import jax
from jax import lax


def varying(tree) -> frozenset[str]:
    """The mesh axes over which some leaf may differ between devices."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary(tree, axes: frozenset[str]):
    """The same values, with types that let every leaf differ over the axes.

    The gradient of a leaf that did not differ before is the sum of the devices' gradients.
    """
    order = tuple(sorted(axes))

    def one(x):
        missing = tuple(a for a in order if a not in varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)
