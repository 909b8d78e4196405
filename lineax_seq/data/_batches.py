"""Batches of rows: an endless shuffled iterator with exact resume for training, a finite sequence for evaluation."""

from collections.abc import Sequence
from typing import Protocol, overload

import grain
import numpy as np

from ..core.checks import integer
from ._sources import Row, empty_row
from ._tokens import Tokens


class RowSource(Protocol):
    """Random access to rows: `WindowSource` and `PackedSource`."""

    tokens: Tokens
    length: int

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...


def train_iterator(
    source: RowSource,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    columns: slice | None = None,
    num_epochs: int | None = None,
    shuffle: bool = True,
    num_threads: int = 1,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """A Grain iterator of batches: dicts of arrays [B, T], the keys of `source`'s rows, B = `batch_size` per process.

    All rows of an epoch are shuffled together (anew each epoch, by `seed`), and step s of the P processes takes rows
    s·B·P ... (s+1)·B·P-1 of that one order, process p every P-th from the p-th on. So no row is used twice in an epoch,
    and the rows of a step depend on B·P only. `columns` keeps a stretch of every row. Epochs follow each other without
    a gap; `num_epochs=None` never ends, a number drops the rows at its end that do not fill a batch on every process.

    `iterator.get_state()` is a small dict for JSON, `iterator.set_state(state)` on an iterator made with the same
    arguments goes on with exactly the batches that would have come. `num_threads` threads keep `prefetch` batches
    ready; `num_threads=0` reads them when asked. `iterator.close()` ends the threads.

    Raises:
      ValueError: an option out of range, or too few rows for one batch on every process.
    """
    caller = "train_iterator"
    batch_size = integer(caller, "batch_size", batch_size, 1)
    seed = integer(caller, "seed", seed, 0)
    num_threads = integer(caller, "num_threads", num_threads, 0)
    prefetch = integer(caller, "prefetch", prefetch, max(1, num_threads))
    num_epochs = None if num_epochs is None else integer(caller, "num_epochs", num_epochs, 1)
    process_index, process_count = _process(caller, process_index, process_count)
    rows = grain.MapDataset.source(source)
    if shuffle:
        # Grain shuffles epoch e by seed + e: neighbouring seeds would share all epochs but one. Spread them first.
        rows = rows.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    rows = rows.repeat(num_epochs)
    if num_epochs is not None:
        step = batch_size * process_count
        whole = len(rows) - len(rows) % step
        if not whole:
            raise ValueError(
                f"train_iterator: {len(rows)} rows in {num_epochs} epoch(s), wants at least {step} for one "
                f"batch of {batch_size} on {process_count} process(es); "
                "give more text, shorter rows, a smaller batch_size or more epochs."
            )
        rows = rows[:whole]
    rows = rows[process_index::process_count]
    if columns is not None:
        rows = rows.map(lambda row: _stretch(row, columns))
    batches = rows.batch(batch_size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    return iter(batches.to_iter_dataset(options))


def eval_batches(
    source: RowSource,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    columns: slice | None = None,
) -> Sequence[Row]:
    """A sequence of batches [B, T] that holds every row exactly once, in order; the last is filled with padding rows.

    Padding rows have `loss_weights` and `segment_ids` 0. With P processes each has the same number of batches, and
    batch b of process p holds rows (b·P+p)·B ... (b·P+p+1)·B-1. `columns` keeps a stretch of every row. Rows are read
    when a batch is asked for.

    Raises:
      ValueError: an option out of range.
    """
    batch_size = integer("eval_batches", "batch_size", batch_size, 1)
    process_index, process_count = _process("eval_batches", process_index, process_count)
    return _EvalBatches(source, batch_size, process_index, process_count, columns)


def _stretch(row: Row, columns: slice) -> Row:
    return {key: value[columns] for key, value in row.items()}


class _EvalBatches(Sequence[Row]):
    def __init__(
        self, source: RowSource, batch_size: int, process_index: int, process_count: int, columns: slice | None
    ):
        self._source, self._batch_size, self._columns = source, batch_size, columns
        self._process_index, self._process_count = process_index, process_count

    def __len__(self) -> int:
        return -(-len(self._source) // (self._batch_size * self._process_count))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones, and IndexError
        first = (index * self._process_count + self._process_index) * self._batch_size
        there = range(first, min(first + self._batch_size, len(self._source)))
        rows = [self._source[i] for i in there]
        padding = empty_row(self._source.length, self._source.tokens.pad_id)
        rows += [padding] * (self._batch_size - len(rows))
        if self._columns is not None:
            rows = [_stretch(row, self._columns) for row in rows]
        return {key: np.stack([row[key] for row in rows]) for key in padding}


def _process(caller: str, index: int, count: int) -> tuple[int, int]:
    count = integer(caller, "process_count", count, 1)
    index = integer(caller, "process_index", index, 0)
    if index >= count:
        raise ValueError(f"{caller}: process_index={index} of process_count={count}, wants an index below the count.")
    return index, count
