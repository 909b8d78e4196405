"""The laws of a training task: its loss is a sum over rows, and its batches come again in the same order.

A task gives `init(key)`, `loss(params, batch, key)`, `batches(seed, reading)` and `kinds()`, and says by
`trainable(path)` which parameters change; `reading` says which rows of every batch to read.
"""

import functools
import itertools
import json
from collections.abc import Collection
from typing import Any, Protocol

import chex
import jax
import numpy as np

from ._closeness import OUTPUTS, assert_close
from ._report import Law, run


class Reading(Protocol):
    """What the laws use of a reading, a named tuple."""

    batch_size: int
    process_index: int
    process_count: int

    def _replace(self, **changes: int) -> "Reading": ...


class TrainingTask(Protocol):
    """What the laws use of a task."""

    def init(self, key: jax.Array) -> Any: ...

    def loss(self, params: Any, batch: Any, key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]: ...

    def batches(self, seed: int, reading: Any) -> Any: ...

    def kinds(self) -> Any: ...

    def trainable(self, path: str) -> bool: ...


def check_task(task: TrainingTask, reading: Reading, laws: Collection[str] | None = None) -> None:
    """The task can be trained: loss, batches and parameters are what the training loop relies on.

    Args:
        task: its loss must not draw random numbers, or leave "the loss is a sum over rows" out.
        reading: an even number of rows, of a single process.
        laws: the names of those to check, of `task_laws(task, reading)`; None is all of them.

    Raises:
        AssertionError: the broken laws, each with what was got and wanted and how to see it again.
        ValueError: an unknown law, or a reading with an odd number of rows or of several processes.
    """
    run("check_task", type(task).__name__, task_laws(task, reading), laws)


def task_laws(task: TrainingTask, reading: Reading) -> dict[str, Law]:
    """The laws of a task by name. Each raises an AssertionError where it is broken."""
    if reading.batch_size % 2 or reading.process_count != 1:
        raise ValueError(
            f"task_laws: batch_size={reading.batch_size} rows for {reading.process_count} processes, wants an even "
            "number for one: the laws split it."
        )
    bind = functools.partial
    return {
        "a key decides the parameters": bind(_parameters, task),
        "the loss is a sum over rows": bind(_sums, task, reading),
        "gradients are finite": bind(_gradients, task, reading),
        "a seed decides the batches": bind(_order, task, reading),
        "batches go on from a position": bind(_position, task, reading),
        "processes share a batch": bind(_processes, task, reading),
    }


def _take(batches: Any, n: int) -> list:
    return [jax.tree.map(np.array, batch) for batch in itertools.islice(batches, n)]


def _parameters(task: TrainingTask) -> None:
    """The same parameters for the same key, others for another, and a kind for each."""
    params, again, other = (task.init(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(params, again)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, other)
    chex.assert_trees_all_equal_structs(params, task.kinds())
    chex.assert_tree_all_finite(params)


def _sums(task: TrainingTask, reading: Reading) -> None:
    """What a batch's halves say adds up to what it says, so that microbatches and processes change nothing."""
    params, (batch,) = task.init(jax.random.key(0)), _take(task.batches(0, reading), 1)
    half = reading.batch_size // 2
    loss = jax.jit(lambda batch: task.loss(params, batch, jax.random.key(1)))
    whole = loss(batch)
    first, second = loss(jax.tree.map(lambda x: x[:half], batch)), loss(jax.tree.map(lambda x: x[half:], batch))
    assert_close(jax.tree.map(np.add, first, second), whole, OUTPUTS["float32"], "two halves added against the whole")
    (_, weight), _ = whole
    assert weight > 0, f"the weights of a batch sum up to {weight}, wants more than 0"


def _gradients(task: TrainingTask, reading: Reading) -> None:
    """Of the loss by all that is trainable: finite, and somewhere not zero."""
    params, (batch,) = task.init(jax.random.key(0)), _take(task.batches(0, reading), 1)

    def mean(params):
        (total, weight), _ = task.loss(params, batch, jax.random.key(1))
        return total / weight

    paths = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(mean))(params))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): gradient for path, gradient in paths}
    trainable = {path: gradient for path, gradient in named.items() if task.trainable(path)}
    assert trainable, f"none of the parameters {sorted(named)} is trainable"
    chex.assert_tree_all_finite(trainable)
    assert any(np.any(gradient) for gradient in trainable.values()), "all gradients are zero"


def _order(task: TrainingTask, reading: Reading) -> None:
    first, again, other = (_take(task.batches(seed, reading), 3) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    same = jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), first, other))
    assert not same, "another seed gives the same batches"


def _position(task: TrainingTask, reading: Reading) -> None:
    """The position goes through JSON, as in a checkpoint."""
    batches = task.batches(0, reading)
    _take(batches, 2)
    position, expected = json.dumps(batches.get_state(), default=_text), _take(batches, 2)
    resumed = task.batches(0, reading)
    resumed.set_state(json.loads(position))
    chex.assert_trees_all_equal(_take(resumed, 2), expected)


def _text(state: Any) -> str:
    raise AssertionError(f"the position holds {state!r}, which JSON does not")


def _processes(task: TrainingTask, reading: Reading) -> None:
    """Two processes with half the rows each read the rows that one reads, in whatever order."""
    share = reading._replace(batch_size=reading.batch_size // 2, process_count=2)
    parts = [_take(task.batches(0, share._replace(process_index=index)), 2) for index in range(2)]
    for whole, *pair in zip(_take(task.batches(0, reading), 2), *parts, strict=True):
        assert sorted(_rows(whole)) == sorted(_rows(pair[0]) + _rows(pair[1])), "two processes read other rows than one"


def _rows(batch: Any) -> list[bytes]:
    leaves = [np.asarray(x) for x in jax.tree.leaves(batch)]
    return [b"".join(x[row].tobytes() for x in leaves) for row in range(len(leaves[0]))]
