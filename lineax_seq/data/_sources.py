"""Rows of a fixed length out of `Tokens`, by index: contiguous windows, or whole documents packed together.

A row is computed from its index alone, so a position in the data is one integer and resuming is exact at no cost.

Every row is a dict of arrays [T]:

| key | dtype | |
|---|---|---|
| `inputs` | int32 | token ids; `pad_id` at padding |
| `targets` | int32 | the token after each input, in the stream; `pad_id` at padding |
| `segment_ids` | int32 | 1, 2, ... in the order of the row; 0 at padding |
| `positions` | int32 | 0, 1, ... within each segment; 0 at padding |
| `loss_weights` | float32 | 1 where the target is to be predicted, else 0 |

The weight is 0 at padding, and where the target belongs to another segment than the input.
"""

import operator

import numpy as np

from ..core.checks import integer
from ._tokens import Tokens

Row = dict[str, np.ndarray]


class WindowSource:
    """Windows of `length` tokens, end to end over the concatenated documents; row i predicts tokens i·T+1 ... (i+1)·T.

    The N-1 targets are all tokens of the stream but the first, each in exactly one row; the last row is padded.

    `segment_documents=False`: the row is one segment, documents follow each other through their separator, which is
    predicted like any other token (so the model learns where documents end). All weights are 1 but at padding.
    `segment_documents=True`: each document in the row is a segment of its own; the weight is 0 where the target is
    the separator of the next document. Every token but each document's separator has weight 1 in exactly one row.

    Raises:
      ValueError: fewer than `length + 1` tokens, or `length < 1`.
    """

    def __init__(self, tokens: Tokens, length: int, *, segment_documents: bool = False):
        length = integer("WindowSource", "length", length, 1)
        if tokens.num_tokens < length + 1:
            raise ValueError(
                f"WindowSource: {tokens.num_tokens} tokens are too few for one window of length={length} and its last "
                "target; give more text, or a shorter length."
            )
        self.tokens, self.length, self.segment_documents = tokens, length, segment_documents

    def __len__(self) -> int:
        return -(-(self.tokens.num_tokens - 1) // self.length)

    @property
    def num_targets(self) -> int:
        """The number of weights that are 1, over all rows."""
        separators = self.tokens.num_documents if self.segment_documents else 1
        return self.tokens.num_tokens - separators

    def __getitem__(self, index: int) -> Row:
        index = _check_index(index, len(self))
        start = index * self.length
        ids = self.tokens.ids[start : start + self.length + 1].astype(np.int32)
        row = empty_row(self.length, self.tokens.pad_id)
        n = len(ids) - 1
        row["inputs"][:n] = ids[:-1]
        row["targets"][:n] = ids[1:]
        if not self.segment_documents:
            row["segment_ids"][:n] = 1
            row["positions"][:n] = np.arange(n)
            row["loss_weights"][:n] = 1
            return row
        offsets = self.tokens.offsets
        first, last = np.searchsorted(offsets, [start + 1, start + n + 1])  # the documents that begin inside the row
        begins = offsets[first:last] - start  # positions in 1 ... n of ids
        begins = begins[begins < n]
        segments = np.zeros(n, np.int32)
        segments[begins] = 1
        row["segment_ids"][:n] = 1 + np.cumsum(segments)
        row["positions"][:n] = np.arange(n) - np.concatenate([[0], begins])[row["segment_ids"][:n] - 1]
        row["loss_weights"][:n] = 1
        row["loss_weights"][offsets[first:last] - start - 1] = 0
        return row


class PackedSource:
    """Whole documents packed into rows of `length` tokens by a best-fit plan; each document is a segment of its own.

    A document of L tokens (its separator included) takes L-1 places: its last token is a target only. Longer ones are
    cut into pieces of `length` places and a rest, which are segments of their own; the target at the end of a piece
    is still the document's next token. So every token but each document's separator is predicted exactly once, and
    weights are 0 at padding only. Rows are planned longest piece first, each into the row that it fills best.

    Raises:
      ValueError: no document with text, or `length < 1`.
    """

    def __init__(self, tokens: Tokens, length: int):
        length = integer("PackedSource", "length", length, 1)
        self.tokens, self.length = tokens, length
        places = np.diff(tokens.offsets) - 1
        counts = -(-places // length)  # pieces of each document
        document = np.repeat(np.arange(len(places)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        if not len(document):
            raise ValueError(
                "PackedSource: no document has a token after its separator, wants at least one; give more text."
            )
        sizes = np.minimum(length, places[document] - number * length)
        rows = best_fit(sizes, length)
        order = np.concatenate(rows)
        self._starts = (tokens.offsets[document] + number * length)[order]
        self._sizes = sizes[order]
        self._rows = np.cumsum([0, *map(len, rows)])  # row i holds the pieces _rows[i] ... _rows[i+1]

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def num_targets(self) -> int:
        """The number of weights that are 1, over all rows."""
        return self.tokens.num_tokens - self.tokens.num_documents

    @property
    def density(self) -> float:
        """The share of all places that is not padding."""
        return self.num_targets / (len(self) * self.length)

    def __getitem__(self, index: int) -> Row:
        index = _check_index(index, len(self))
        pieces = slice(self._rows[index], self._rows[index + 1])
        starts, sizes = self._starts[pieces], self._sizes[pieces]
        n = int(sizes.sum())
        positions = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        where = np.repeat(starts, sizes) + positions
        row = empty_row(self.length, self.tokens.pad_id)
        row["inputs"][:n] = self.tokens.ids[where]
        row["targets"][:n] = self.tokens.ids[where + 1]
        row["segment_ids"][:n] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        row["positions"][:n] = positions
        row["loss_weights"][:n] = 1
        return row


def empty_row(length: int, pad_id: int) -> Row:
    """A row of padding."""
    return {
        "inputs": np.full(length, pad_id, np.int32),
        "targets": np.full(length, pad_id, np.int32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "loss_weights": np.zeros(length, np.float32),
    }


def best_fit(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices into `sizes`, none over `capacity`: largest first, each into the fullest row that has room.

    Source: best-fit decreasing, Johnson et al. 1974, SIAM J. Comput. 3(4): at most 11/9 of the fewest rows, plus 4.
    """
    rows: list[list[int]] = []
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # waiting[r]: rows with r free places
    free_sizes = 0  # bit r is set while waiting[r] is not empty: the tightest fit is the lowest bit at or above a size
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = free_sizes >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = waiting[free].pop()
            if not waiting[free]:
                free_sizes ^= 1 << free
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        if free > size:
            waiting[free - size].append(row)
            free_sizes |= 1 << (free - size)
    return rows


def _check_index(index: int, length: int) -> int:
    index = operator.index(index)
    if not 0 <= index < length:
        raise IndexError(f"row {index} of a source with {length} rows")
    return index
