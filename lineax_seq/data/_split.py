"""Which text is held out: by year where documents are dated, else every 20th document, else the end of the text."""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..core.checks import integer
from ._readers import Document

HELDOUT_FROM_YEAR = 2009
HELDOUT_EVERY = 20

# Where a text may be cut, best first: after a line, after a sentence, after a word.
_BOUNDARIES = tuple(re.compile(pattern) for pattern in (r"\n+", r"[.!?][\"')\]]*\s+", r"\s+"))


class Split(NamedTuple):
    train: list[Document]
    heldout: list[Document]


def split_documents(
    documents: Iterable[Document], *, every: int = HELDOUT_EVERY, heldout_from_year: int = HELDOUT_FROM_YEAR
) -> Split:
    """`Split(train, heldout)`: two lists that together hold every byte of `documents` once, in order.

    * Dated documents (`sotu`) are held out from the year `heldout_from_year` on: a test on the future.
    * Of the others every `every`-th is held out: numbers 20, 40, 60, ... of the stream.
    * If there are fewer than `every` of them, the last `1/every` of their bytes (5 percent) is: the text is cut
      at the line end nearest to that point, or if there is none near, at a sentence end, a space, or right there
      ("near": within half of the held-out length). The two parts are named `name[:n]` and `name[n:]`, n in characters.

    Raises:
      ValueError: `every < 2`, or a part that would be empty.
    """
    split = Split([], [])
    for heldout, document in label_heldout(documents, every=every, heldout_from_year=heldout_from_year):
        split[heldout].append(document)
    check_both_parts(len(split.train), len(split.heldout), heldout_from_year)
    return split


def label_heldout(
    documents: Iterable[Document], *, every: int = HELDOUT_EVERY, heldout_from_year: int = HELDOUT_FROM_YEAR
) -> Iterator[tuple[bool, Document]]:
    """`(held out?, document)` for each document, by the rules of `split_documents`; looks `every` documents ahead."""
    every = integer("split_documents", "every", every, 2)
    heldout_from_year = integer("split_documents", "heldout_from_year", heldout_from_year, 0)
    return _label(documents, every, heldout_from_year)


def _label(documents: Iterable[Document], every: int, heldout_from_year: int) -> Iterator[tuple[bool, Document]]:
    waiting: list[Document] = []  # undated ones, until there are `every`: only then is the rule known
    count = itertools.count(1)
    for document in documents:
        if document.year is not None:
            yield document.year >= heldout_from_year, document
        elif (number := next(count)) < every:
            waiting.append(document)
        else:
            yield from ((False, earlier) for earlier in waiting)
            waiting.clear()
            yield number % every == 0, document
    if waiting:
        yield from _cut_end(waiting, every)


def check_both_parts(train: int, heldout: int, heldout_from_year: int) -> None:
    """Refuses a split with an empty part."""
    if not train or not heldout:
        raise ValueError(
            f"split_documents: the split has {train} training and {heldout} held-out documents, wants at least one "
            f"of each; give more text, or for dated documents another year than heldout_from_year={heldout_from_year}."
        )


def _cut_end(documents: list[Document], every: int) -> Iterator[tuple[bool, Document]]:
    sizes = [len(document.text.encode()) for document in documents]
    share = max(1, sum(sizes) // every)
    start = sum(sizes) - share  # the first held-out byte
    for document, size in zip(documents, sizes, strict=True):
        if start >= size:
            yield False, document
        elif start <= 0:
            yield True, document
        else:
            text = document.text
            at = len(text.encode()[:start].decode(errors="ignore"))
            at = _nearest_boundary(text, at, reach=share // 2)
            for heldout, part, span in ((False, text[:at], f"[:{at}]"), (True, text[at:], f"[{at}:]")):
                if part:
                    yield heldout, Document(document.name + span, part)
        start -= size


def _nearest_boundary(text: str, at: int, reach: int) -> int:
    for pattern in _BOUNDARIES:
        ends = [match.end() for match in pattern.finditer(text, max(0, at - reach), min(len(text), at + reach))]
        if ends:
            return min(ends, key=lambda end: abs(end - at))
    return at
