"""Device time of a program on the machine this runs on, and a trace of it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

CALLS = 10


def tpu_here() -> bool:
    """Whether this machine has a TPU, without waking the driver where there is none."""
    return bool([*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")])


def measure(fn: Callable, args: Sequence[Any], *, repeats: int = 5, trace: Path | None = None) -> float:
    """Milliseconds of a call of `fn(*args)` on the default device, the fastest of some runs of ten calls.

    The calls of a run follow one another without a wait between them, so that starting one is hidden behind the one
    before. `trace` also gets a profile of three calls.

    Inputs are random normal numbers, scaled down so that decays and rates stay in range: the time does not depend on
    them.
    """
    leaves, tree = jax.tree.flatten(args)
    keys = jax.random.split(jax.random.key(0), max(1, len(leaves)))
    inputs = tree.unflatten([_random(key, leaf) for key, leaf in zip(keys, leaves, strict=False)])
    compiled = jax.jit(fn).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([compiled(*inputs) for _ in range(CALLS)][-1])
        best = min(best, (time.perf_counter() - start) / CALLS)
    if trace is not None:
        with jax.profiler.trace(str(trace)):
            for _ in range(3):
                jax.block_until_ready(compiled(*inputs))
    return best * 1e3


def _random(key: jax.Array, leaf) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return (-0.1 * jnp.abs(jax.random.normal(key, leaf.shape))).astype(leaf.dtype)
