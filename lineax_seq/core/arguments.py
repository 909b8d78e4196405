"""What an argument of a recurrence looks like: its dimensions and the domain its values come from.

The domain draws examples: tests, benchmarks and notebooks get inputs for any recurrence from its declaration.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape)


def unit(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Vectors of length one along the last axis."""
    x = jax.random.normal(key, shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def log_decay(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Logs of decays, most of them slow: a state still remembers its hundredth predecessor."""
    return -jax.nn.softplus(2 * jax.random.normal(key, shape) - 4)


def rate(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Learning rates in (0, 1)."""
    return jax.nn.sigmoid(jax.random.normal(key, shape))


def wide_rate(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Learning rates in (0, 2): above 1 what a key reads turns its sign."""
    return 2 * rate(key, shape)


def step_size(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Steps dt of a discretised state space, log-uniform in [1e-3, 1e-1], as Mamba starts with."""
    return 10.0 ** jax.random.uniform(key, shape, minval=-3.0, maxval=-1.0)


class Argument(NamedTuple):
    """An argument's shape and domain.

    dims: the legend's letters, e.g. `"B T H K"`; without `T` it is a parameter, the same for every token.
    draw: (key, shape) -> float32 example values.
    optional: whether it may be left out (None).
    """

    dims: str
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array] = normal
    optional: bool = False

    @property
    def letters(self) -> list[str]:
        return self.dims.split()

    @property
    def per_token(self) -> bool:
        return "T" in self.letters

    def token(self) -> "Argument":
        """The argument of a single step: the same without its T axis."""
        return self._replace(dims=" ".join(letter for letter in self.letters if letter != "T"))


QUERIES = Argument("B T H K")
KEYS = Argument("B T H K")
UNIT_KEYS = Argument("B T H K", unit)
VALUES = Argument("B T HV V")
HEAD_DECAYS = Argument("B T HV", log_decay)
CHANNEL_DECAYS = Argument("B T HV K", log_decay)
RATES = Argument("B T HV", rate)


def draw(arguments: Mapping[str, Argument], key: jax.Array, sizes: Mapping[str, int], dtype=jnp.float32) -> dict:
    """Example arguments by name, drawn in float32, then cast; `sizes` gives every letter, HV defaults to H, NH to 2.

    Raises:
        ValueError: letters without a size.
    """
    sizes = {"HV": sizes.get("H", 1), "NH": 2, **sizes}
    missing = sorted({letter for argument in arguments.values() for letter in argument.letters} - sizes.keys())
    if missing:
        raise ValueError(f"example: no size for {', '.join(missing)}; give each as a keyword, as in {missing[0]}=16.")
    keys = jax.random.split(key, len(arguments))
    return {
        name: argument.draw(k, tuple(sizes[letter] for letter in argument.letters)).astype(dtype)
        for k, (name, argument) in zip(keys, arguments.items(), strict=True)
    }
