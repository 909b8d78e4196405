"""The only tolerances: relative root mean square against the float64 token scan. They only tighten."""

import jax
import numpy as np

OUTPUTS = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 1e-2}
GRADIENTS = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 2e-2}


def relative_rms(got, want) -> float:
    """rms(got - want) / rms(want); where nothing is wanted, nothing may be got (0 or infinity)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, wants {want.shape}"
    error, scale = np.sqrt(np.mean((got - want) ** 2)), np.sqrt(np.mean(want**2))
    if not np.isfinite(error):
        return np.inf
    return 0.0 if error == 0 else float("inf") if scale == 0 else float(error / scale)


def assert_close(got, want, tolerance: float, what: str = "") -> None:
    """Every leaf of two equal trees within the tolerance; names all that are not."""
    got_leaves, want_leaves = jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    assert len(got_leaves) == len(want_leaves), f"{what}: {len(got_leaves)} leaves, wants {len(want_leaves)}"
    errors = {
        jax.tree_util.keystr(path): relative_rms(leaf, expected)
        for (path, leaf), expected in zip(got_leaves, want_leaves, strict=True)
    }
    bad = {path: f"{error:.1e}" for path, error in errors.items() if not error <= tolerance}
    assert not bad, f"{what}: relative rms above {tolerance:.0e}: {bad}"
