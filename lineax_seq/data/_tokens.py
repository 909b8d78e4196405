"""A tokenised corpus: one long array of ids, memory-mapped from disk, with the offset of every document.

On disk a folder of three files: `tokens.bin` (the ids, little-endian), `offsets.npy`, `meta.json`. It is written under
a temporary name and then renamed, so that it is there whole or not at all.
"""

import contextlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Generator, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from ._documents import Document
from ._tokenizers import Tokenizer

_FORMAT = 1
_BATCH = 2**22  # characters tokenised at a time


@dataclass(frozen=True, eq=False)
class Tokens:
    """Ids [N] of D documents end to end; document d is `ids[offsets[d]:offsets[d+1]]` and starts with `bos_id`.

    `num_bytes` counts the UTF-8 bytes of the text: a summed loss in nats over all text tokens is
    `loss / (log(2) * num_bytes)` bits per byte. `tokenizer` is the fingerprint of the tokenizer that made the ids.
    """

    ids: np.ndarray  # [N] unsigned integers (uint16 or uint32 on disk)
    offsets: np.ndarray  # [D+1] int64, from 0 to N, strictly increasing: every document has at least its separator
    vocab_size: int
    bos_id: int
    pad_id: int
    num_bytes: int
    tokenizer: str

    def __post_init__(self):
        ids, offsets = self.ids, self.offsets
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"Tokens: got ids of shape {ids.shape} and dtype {ids.dtype}, wanted [N] integers")
        if offsets.ndim != 1 or not np.issubdtype(offsets.dtype, np.integer):
            raise ValueError(
                f"Tokens: got offsets of shape {offsets.shape} and dtype {offsets.dtype}, wanted [D+1] integers"
            )
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) <= 0).any():
            raise ValueError(
                f"Tokens: the offsets of the documents must rise strictly from 0 to {len(ids)}, the number of ids; "
                f"got {offsets}"
            )

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token of text; the separators are not counted."""
        return self.num_bytes / max(1, self.num_tokens - self.num_documents)


class TokenWriter:
    """Tokenises documents one after the other into a folder that exists; `close` completes it. Memory stays bounded."""

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        self._directory, self._tokenizer = directory, tokenizer
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self._offsets = array("q", [0])
        self._num_bytes = 0
        self._waiting: list[str] = []
        self._waiting_size = 0
        directory.mkdir(exist_ok=True)
        self._stream = open(directory / "tokens.bin", "xb")

    def add(self, text: str) -> None:
        self._waiting.append(text)
        self._waiting_size += len(text)
        if self._waiting_size >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        bos = np.array([self._tokenizer.bos_id], self._dtype)
        for text, ids in zip(self._waiting, self._tokenizer.encode_batch(self._waiting), strict=True):
            document = np.concatenate([bos, ids.astype(self._dtype)])
            self._stream.write(document.tobytes())
            self._offsets.append(self._offsets[-1] + len(document))
            self._num_bytes += len(text.encode())
        self._waiting.clear()
        self._waiting_size = 0

    def close(self) -> None:
        self._flush()
        self._stream.close()
        np.save(self._directory / "offsets.npy", np.array(self._offsets, np.int64))
        meta = {
            "format": _FORMAT,
            "dtype": self._dtype.str,
            "num_tokens": self._offsets[-1],
            "num_documents": len(self._offsets) - 1,
            "num_bytes": self._num_bytes,
            "vocab_size": self._tokenizer.vocab_size,
            "bos_id": self._tokenizer.bos_id,
            "pad_id": self._tokenizer.pad_id,
            "tokenizer": self._tokenizer.fingerprint,
        }
        (self._directory / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    def abandon(self) -> None:
        self._stream.close()


@contextlib.contextmanager
def new_directory(directory: Path) -> Generator[Path, None, None]:
    """A temporary folder beside `directory`, renamed to it when the block ends, removed if the block raises."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:12]}.partial")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, directory)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_tokens(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> Tokens:
    """Tokenises `documents` into the new folder `directory` and opens it. `prepare_corpus` does this with reuse.

    Raises:
      ValueError: `directory` exists, or there are no documents. Nothing is left on disk then.
    """
    directory = Path(directory)
    if directory.exists():
        raise ValueError(
            f"write_tokens: {str(directory)!r} exists already; open it with open_tokens, remove it, or choose another"
        )
    with new_directory(directory) as temporary:
        write_labelled(((0, document) for document in documents), tokenizer, [temporary], progress=progress)
    return open_tokens(directory)


def write_labelled(
    labelled: Iterable[tuple[int, Document]], tokenizer: Tokenizer, directories: list[Path], *, progress: bool
) -> None:
    """Tokenises each `(i, document)` into `directories[i]`, in one pass."""
    writers = [TokenWriter(directory, tokenizer) for directory in directories]
    counts = [0] * len(writers)
    bar = tqdm.tqdm(desc="tokenising", unit="char", unit_scale=True, disable=None if progress else True, delay=1.0)
    try:
        with bar:
            for label, document in labelled:
                writers[label].add(document.text)
                counts[label] += 1
                bar.update(len(document.text))
        for writer, count in zip(writers, counts, strict=True):
            if not count:
                raise ValueError(
                    "write_tokens: got no documents, or none for one side of a split; give more text or another split"
                )
            writer.close()
    finally:
        for writer in writers:
            writer.abandon()


def open_tokens(directory: str | os.PathLike[str]) -> Tokens:
    """The `Tokens` of a folder that was written before, memory-mapped: opening takes no time and no memory.

    Raises:
      ValueError: not such a folder, or a damaged one.
    """
    directory = Path(directory)
    try:
        meta: dict[str, Any] = json.loads((directory / "meta.json").read_bytes())
        size = (directory / "tokens.bin").stat().st_size
        offsets = np.load(directory / "offsets.npy")
    except FileNotFoundError as error:
        raise ValueError(
            f"open_tokens: {str(directory)!r} has no {Path(error.filename).name}; "
            "write it with write_tokens or prepare_corpus"
        ) from None
    if meta.get("format") != _FORMAT:
        raise ValueError(
            f"open_tokens: {str(directory)!r} has format {meta.get('format')}, this version reads {_FORMAT}; "
            "remove the folder and write it again"
        )
    dtype = np.dtype(meta["dtype"])
    if size != meta["num_tokens"] * dtype.itemsize or len(offsets) != meta["num_documents"] + 1:
        raise ValueError(
            f"open_tokens: {str(directory)!r} is damaged: tokens.bin has {size} bytes and offsets.npy {len(offsets)} "
            f"numbers, meta.json says {meta['num_tokens']} tokens of {dtype} in {meta['num_documents']} documents; "
            "remove the folder and write it again"
        )
    # A plain view of the map: slicing a np.memmap itself is several times slower.
    ids = np.asarray(np.memmap(directory / "tokens.bin", dtype, mode="r"))
    names = {field.name for field in fields(Tokens)}
    return Tokens(ids=ids, offsets=offsets, **{key: value for key, value in meta.items() if key in names})


def tokenize_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Tokens:
    """`Tokens` in memory, for texts that are small.

    Raises:
      ValueError: no documents.
    """
    texts = [document.text for document in documents]
    if not texts:
        raise ValueError("tokenize_documents: got no documents; give at least one")
    encoded = [np.concatenate([[tokenizer.bos_id], ids]) for ids in tokenizer.encode_batch(texts)]
    return Tokens(
        ids=np.concatenate(encoded).astype(np.uint32),
        offsets=np.cumsum([0, *map(len, encoded)]),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
        num_bytes=sum(len(text.encode()) for text in texts),
        tokenizer=tokenizer.fingerprint,
    )
