"""A task's loss and metrics over many batches: compiled once, summed in float64."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from ._placement import Placement
from ._step import LossFunction
from ._task import Batch, Reading

PyTree = Any
T = TypeVar("T")


class Evaluator:
    """`evaluator(params, batches)` -> (mean loss, {metric: its mean}); the batches are read as `reading` says.

    Raises:
      ValueError: the batches have no weight.
    """

    def __init__(self, loss_function: LossFunction, placement: Placement, reading: Reading):
        self.reading, self._placement = reading, placement
        key = jax.random.key(0)
        self._sums = jax.jit(lambda params, batch: loss_function(params, batch, key))

    def __call__(self, params: PyTree, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        # Sums are fetched one batch late, as in training: the next batch is read while the device works.
        total, pending = None, []

        def fetch():
            nonlocal total
            found = jax.tree.map(np.float64, jax.device_get(pending.pop(0)))
            total = found if total is None else jax.tree.map(np.add, total, found)

        for batch in batches:
            pending.append(self._sums(params, self._placement.batch(batch, self.reading)))
            if len(pending) == 2:
                fetch()
        while pending:
            fetch()
        if total is None or not total[0][1]:
            raise ValueError("Evaluator: the batches have nothing to predict (all weights are 0); give held-out data")
        (loss, weight), metrics = total
        return float(loss / weight), {name: float(value / count) for name, (value, count) in metrics.items()}


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly spread over all of them; all if there are fewer."""
    if count < 1:
        raise ValueError(f"spread: count is {count}; it must be at least 1")
    count = min(count, len(items))
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, count).round()]
