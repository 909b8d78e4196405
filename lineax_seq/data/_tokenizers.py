"""Text to token ids and back: what the library needs of a tokenizer, and the one whose tokens are bytes."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

BYTES = {"tokenizer": "bytes"}  # the whole of a saved ByteTokenizer


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the library needs of a tokenizer.

    `encode` never adds special ids, and text that spells a special token is ordinary text. `bos_id` comes before every
    document and is the only separator; `pad_id` fills rows and is never a target with weight. `decode` leaves both out.
    """

    @property
    def vocab_size(self) -> int: ...  # every id is below it
    @property
    def bos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...  # equal for tokenizers that encode alike

    def encode(self, text: str) -> np.ndarray: ...  # int32 [N]
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def save(self, path: str | os.PathLike[str]) -> None: ...  # for load_tokenizer


class ByteTokenizer:
    """The 256 bytes of UTF-8, then `bos_id` 256 and `pad_id` 257. Needs no training; 1 byte per token.

    >>> ByteTokenizer().encode("né").tolist()
    [110, 195, 169]
    >>> ByteTokenizer().decode([256, 110, 195, 169])
    'né'
    """

    vocab_size = 258
    bos_id = 256
    pad_id = 257
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        ids = checked_ids(ids, self.vocab_size)
        return bytes(ids[ids < 256].astype(np.uint8)).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike[str]) -> None:
        write_text(path, json.dumps(BYTES))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes the file whole or not at all: under another name first, which is then changed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checked_text(text: str) -> str:
    _utf8(text)
    return text


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"encode: text is {type(text).__name__}, wants str; decode bytes first.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"encode: character {error.start} is half of a surrogate pair, which no UTF-8 text has; repair the text "
            "first, for example with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from None


def checked_ids(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    array = np.asarray(ids if hasattr(ids, "__array__") or isinstance(ids, Sequence) else list(ids)).reshape(-1)
    if array.size == 0:
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"decode: ids are {array.dtype}, wants integers.")
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(f"decode: ids run from {array.min()} to {array.max()}, wants 0 to {vocab_size - 1}.")
    return array.astype(np.int64)
