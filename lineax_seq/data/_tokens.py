"""A tokenised corpus: one long array of ids, memory-mapped from disk, with the offset of every document.

On disk a folder of three files: `tokens.bin` (the ids) and `offsets.bin` (int64), both little-endian without a header,
and `meta.json`. It is written under a temporary name and then renamed, so that it is there whole or not at all.
"""

import contextlib
import json
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tqdm

from ._directory import new_directory, writing
from ._readers import Document
from ._tokenizers import Tokenizer

_FORMAT = 2
FILES = ("tokens.bin", "offsets.bin", "meta.json")
_NUMBERS = ("num_tokens", "num_documents", "num_bytes", "vocab_size", "bos_id", "pad_id")
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
        for name in ("ids", "offsets"):  # lists too
            value = np.asarray(getattr(self, name))
            object.__setattr__(self, name, value)
            if value.ndim != 1 or not np.issubdtype(value.dtype, np.integer):
                raise ValueError(f"Tokens: {name} is {value.dtype}{list(value.shape)}, wants integers of one axis.")
        ids, offsets = self.ids, self.offsets
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) <= 0).any():
            raise ValueError(
                f"Tokens: offsets is {offsets}, wants numbers that rise strictly from 0 to {len(ids)}, the number of "
                "ids: where each document starts, and where the last ends."
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
        with writing(directory):
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
            with writing(self._directory):
                self._stream.write(document.tobytes())
            self._offsets.append(self._offsets[-1] + len(document))
            self._num_bytes += len(text.encode())
        self._waiting.clear()
        self._waiting_size = 0

    def close(self) -> None:
        self._flush()
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
        with writing(self._directory):
            self._stream.close()
            (self._directory / "offsets.bin").write_bytes(np.array(self._offsets, "<i8").tobytes())
            (self._directory / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer, which nobody wants now
            self._stream.close()


def write_tokens(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> Tokens:
    """Tokenises `documents` into the new folder `directory` and opens it. `prepare_corpus` does this with reuse.

    Raises:
      ValueError: `directory` exists or cannot be written, or there are no documents. Nothing is left on disk then.
    """
    directory = Path(directory)
    if os.path.exists(directory):
        _refuse_existing(directory)
    with new_directory(directory, _refuse_existing) as temporary:
        write_labelled(((0, document) for document in documents), tokenizer, [temporary], progress=progress)
    return open_tokens(directory)


def _refuse_existing(directory: Path) -> bool:
    raise ValueError(
        f"write_tokens: {str(directory)!r} exists already; open it with open_tokens, remove it, or choose another."
    )


def write_labelled(
    labelled: Iterable[tuple[int, Document]], tokenizer: Tokenizer, directories: list[Path], *, progress: bool
) -> None:
    """Tokenises each `(i, document)` into `directories[i]`, in one pass."""
    counts = [0] * len(directories)
    bar = tqdm.tqdm(desc="tokenising", unit="char", unit_scale=True, disable=None if progress else True, delay=1.0)
    with contextlib.ExitStack() as stack:
        writers = []
        for directory in directories:
            writers.append(TokenWriter(directory, tokenizer))
            stack.callback(writers[-1].abandon)
        stack.enter_context(bar)
        for label, document in labelled:
            writers[label].add(document.text)
            counts[label] += 1
            bar.update(len(document.text))
        if not all(counts):
            raise ValueError(
                "write_tokens: got no documents, or none for one side of a split, wants at least one; "
                "give more text or another split."
            )
        for writer in writers:
            writer.close()


def open_tokens(directory: str | os.PathLike[str]) -> Tokens:
    """The `Tokens` of a folder that was written before, memory-mapped: opening takes no time and no memory.

    Raises:
      ValueError: not such a folder, or a damaged one.
    """
    directory = Path(directory)
    try:
        meta = json.loads((directory / "meta.json").read_bytes())
        size = (directory / "tokens.bin").stat().st_size
        offsets = np.fromfile(directory / "offsets.bin", np.uint8)
    except OSError as error:
        raise ValueError(
            f"open_tokens: {str(directory)!r} has no {Path(error.filename).name} that can be read ({error.strerror}); "
            "write it with write_tokens or prepare_corpus."
        ) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(directory, f"meta.json is not JSON ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise ValueError(
            f"open_tokens: {str(directory)!r} has format {meta.get('format') if isinstance(meta, dict) else meta!r}, "
            f"wants {_FORMAT}, which this version writes; remove the folder and write it again."
        )
    wrong = [name for name in _NUMBERS if type(meta.get(name)) is not int or meta[name] < 0]
    wrong += ["dtype"] if meta.get("dtype") not in ("<u2", "<u4") else []
    wrong += ["tokenizer"] if not isinstance(meta.get("tokenizer"), str) else []
    if wrong:
        raise _damaged(directory, f"meta.json has no good {', '.join(wrong)}")
    dtype = np.dtype(meta["dtype"])
    wants = meta["num_tokens"] * dtype.itemsize, 8 * (meta["num_documents"] + 1)
    if (size, len(offsets)) != wants or not size:
        raise _damaged(directory, f"tokens.bin and offsets.bin have {size} and {len(offsets)} bytes, want {wants}")
    try:
        # A plain view of the map: slicing a np.memmap itself is several times slower.
        ids = np.asarray(np.memmap(directory / "tokens.bin", dtype, mode="r"))
        rest = {name: meta[name] for name in ("vocab_size", "bos_id", "pad_id", "num_bytes", "tokenizer")}
        return Tokens(ids=ids, offsets=offsets.view("<i8"), **rest)
    except (ValueError, OSError) as error:
        raise _damaged(directory, str(error)) from None


def _damaged(directory: Path, what: str) -> ValueError:
    return ValueError(
        f"open_tokens: {str(directory)!r} is damaged: {what.rstrip('.')}; remove the folder and write it again."
    )


def tokenize_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Tokens:
    """`Tokens` in memory, for texts that are small.

    Raises:
      ValueError: no documents.
    """
    texts = [document.text for document in documents]
    if not texts:
        raise ValueError("tokenize_documents: got no documents, wants at least one.")
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
