"""Held-out text in bits per byte: every token predicted once, whatever the tokenizer.

bits per byte = (sum of nll in nats) / (ln 2 * UTF-8 bytes of the text); comparable with a compressor's output size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from ._step import Batch, LossFunction

PyTree = Any
T = TypeVar("T")


def bits_per_byte(nll: float, num_bytes: float) -> float:
    """Bits per byte of a text of `num_bytes` whose tokens have the negative log-likelihood `nll` (nats) in sum."""
    return nll / (math.log(2.0) * num_bytes)


class Evaluator:
    """`evaluator(params, batches)` -> {"eval_loss": nats per token, "eval_bits_per_byte": ...}; compiles once.

    `bytes_per_target` is the held-out text's UTF-8 bytes over its number of targets: with all batches the result is
    exact, with some of them it estimates the whole. Sums over batches are float64.

    Raises:
      ValueError: the batches have no target.
    """

    def __init__(
        self,
        loss_function: LossFunction,
        *,
        bytes_per_target: float,
        place: Callable[[Batch], Batch] = lambda batch: batch,
    ):
        self._bytes_per_target, self._place = bytes_per_target, place
        key = jax.random.key(0)
        self._sums = jax.jit(lambda params, batch: loss_function(params, batch, key))

    def __call__(self, params: PyTree, batches: Sequence[Batch]) -> dict[str, float]:
        # Sums are fetched one batch late, as in training: the next batch is read while the device works.
        nll, targets, pending = 0.0, 0.0, []
        for batch in batches:
            pending.append(self._sums(params, self._place(batch)))
            if len(pending) == 2:
                nll, targets = np.add((nll, targets), jax.device_get(pending.pop(0)), dtype=np.float64)
        for sums in pending:
            nll, targets = np.add((nll, targets), jax.device_get(sums), dtype=np.float64)
        if not targets:
            raise ValueError("Evaluator: the batches have no token to predict; give held-out text")
        return {
            "eval_loss": float(nll / targets),
            "eval_bits_per_byte": float(bits_per_byte(nll, targets * self._bytes_per_target)),
        }


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly spread over all of them; all if there are fewer."""
    if count < 1:
        raise ValueError(f"spread: count is {count}; it must be at least 1")
    count = min(count, len(items))
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, count).round()]
