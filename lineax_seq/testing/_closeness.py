"""When two results are equal: the only tolerances, and a comparison that says which array is wrong, where, by how much.

Tolerances are relative root mean squares against the float64 token scan. They only tighten.
"""

import chex
import jax
import numpy as np

OUTPUTS = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 1e-2}
GRADIENTS = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 2e-2}


def relative_rms(got, want) -> float:
    """rms(got - want) / rms(want); where nothing is wanted, nothing may be got (0 or infinity).

    Infinity where `got` is not finite.

    Raises:
        AssertionError: the shapes differ.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, wants {want.shape}"
    error, scale = np.sqrt(np.mean((got - want) ** 2)), np.sqrt(np.mean(want**2))
    if not np.isfinite(error):
        return np.inf
    return 0.0 if error == 0 else float("inf") if scale == 0 else float(error / scale)


def assert_close(got, want, tolerance: float, what: str = "") -> None:
    """Every leaf of two trees of one structure within the tolerance.

    Raises:
        AssertionError: it names all leaves that are not, each with its error and the worst element.
    """
    chex.assert_trees_all_equal_structs(got, want)
    bad = []
    for (path, leaf), expected in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = " ".join(filter(None, [what, jax.tree_util.keystr(path)])) or "the array"
        if np.shape(leaf) != np.shape(expected):
            bad.append(f"{name}: got shape {np.shape(leaf)}, wants {np.shape(expected)}")
        elif not (error := relative_rms(leaf, expected)) <= tolerance:
            bad.append(f"{name}: relative rms {error:.1e}, wants at most {tolerance:.0e}; {worst(leaf, expected)}")
    assert not bad, "\n".join(bad)


def worst(got, want) -> str:
    """The element that is furthest off, in words; the first one that is not finite, where there is one."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    distance = np.where(np.isnan(got - want), np.inf, np.abs(got - want))
    place = np.unravel_index(np.argmax(distance), distance.shape)
    off = np.count_nonzero(~np.isfinite(got))
    infinite = f" ({off} of {got.size} are not finite)" if off else ""
    return f"the worst is at {[int(i) for i in place]}: got {got[place]:.8g}, wanted {want[place]:.8g}{infinite}"
