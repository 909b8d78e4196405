"""Held-out text in bits per byte: every token predicted once, whatever the tokenizer.

bits per byte = (sum of nll in nats) / (ln 2 * UTF-8 bytes of the text); comparable with a compressor's output size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ._step import Batch, LossFunction

PyTree = Any


def bits_per_byte(nll: float, num_bytes: float) -> float:
    """Bits per byte of a text of `num_bytes` whose tokens have the negative log-likelihood `nll` (nats) in sum."""
    return nll / (math.log(2.0) * num_bytes)


class Evaluator:
    """`evaluator(params)` -> {"eval_loss": nats per token, "eval_bits_per_byte": ...} over `batches`.

    `bytes_per_target` is the text's UTF-8 bytes over its number of targets, so that a part of the text (some of its
    batches) estimates the whole. Sums over batches are float64.

    Raises:
      ValueError: no batches, or none of them has a target.
    """

    def __init__(
        self,
        loss_function: LossFunction,
        batches: Sequence[Batch],
        *,
        bytes_per_target: float,
        place: Callable[[Batch], Batch] = lambda batch: batch,
    ):
        if not len(batches):
            raise ValueError("Evaluator: got no batches; give held-out text")
        self._batches, self._bytes_per_target, self._place = batches, bytes_per_target, place
        key = jax.random.key(0)
        self._sums = jax.jit(lambda params, batch: loss_function(params, batch, key))

    def __len__(self) -> int:
        return len(self._batches)

    def __call__(self, params: PyTree) -> dict[str, float]:
        # Sums are fetched one batch late, as in training: the next batch is read while the device works.
        nll, targets, pending = 0.0, 0.0, None
        for batch in (*self._batches, None):
            dispatched = None if batch is None else self._sums(params, self._place(batch))
            if pending is not None:
                batch_nll, batch_targets = jax.device_get(pending)
                nll, targets = nll + float(batch_nll), targets + float(batch_targets)
            pending = dispatched
        if not targets:
            raise ValueError("Evaluator: the batches have no token to predict; give held-out text")
        return {
            "eval_loss": nll / targets,
            "eval_bits_per_byte": bits_per_byte(nll, targets * self._bytes_per_target),
        }


def spread(batches: Sequence[Batch], count: int) -> list[Batch]:
    """`count` of the batches, evenly spread over all of them; all if there are fewer."""
    if count < 1:
        raise ValueError(f"spread: count is {count}; it must be at least 1")
    count = min(count, len(batches))
    return [batches[int(i)] for i in np.linspace(0, len(batches) - 1, count).round()]
