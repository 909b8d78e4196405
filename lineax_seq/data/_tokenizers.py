"""Text to token ids and back: bytes, or byte-level BPE trained here or loaded from a `tokenizer.json`."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tqdm
from tokenizers import Tokenizer as HuggingFaceTokenizer, decoders, models, pre_tokenizers, trainers

from ._common import check_integer

_BYTES = {"tokenizer": "bytes"}  # the whole of a saved ByteTokenizer
_WRAPPED = "huggingface"  # the key of a tokenizer.json inside a file that also names its special tokens

# Names under which published tokenizers keep these two, most telling first.
_BOS_TOKENS = ("<|bos|>", "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>", "<|im_start|>", "[CLS]")
_PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")

_PIECE = 2**18  # characters


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
        ids = _checked_ids(ids, self.vocab_size)
        return bytes(ids[ids < 256].astype(np.uint8)).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike[str]) -> None:
        _write_text(path, json.dumps(_BYTES))


class BPETokenizer:
    """Byte-level byte-pair encoding by the package `tokenizers`: `decode(encode(text)) == text` for every text.

    Made by `BPETokenizer.train`, or by `BPETokenizer.load` from any `tokenizer.json`. (A loaded one may normalise text
    or drop what it does not know; then the round trip is only as exact as that file makes it.)
    Texts beyond 2**18 characters are encoded in pieces that end at line ends, which bounds memory.
    """

    def __init__(self, huggingface: HuggingFaceTokenizer, bos_token: str, pad_token: str):
        self._tokenizer = huggingface
        self._tokenizer.encode_special_tokens = True  # "<|bos|>" written in a text is text; the file does not keep this
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._bos_token, self._pad_token = bos_token, pad_token
        self.bos_id, self.pad_id = self._special_id("bos_token", bos_token), self._special_id("pad_token", pad_token)
        self.vocab_size: int = 1 + max(huggingface.get_vocab(with_added_tokens=True).values())

    def _special_id(self, option: str, token: str) -> int:
        special_id = self._tokenizer.token_to_id(token)
        if special_id is None:
            raise ValueError(
                f"BPETokenizer: there is no {option} {token!r}; the special tokens are {_specials(self._tokenizer)}"
            )
        return special_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, progress: bool = True) -> "BPETokenizer":
        """A BPE of exactly `vocab_size` ids: `<|bos|>`, `<|pad|>`, 256 bytes, and the merges learnt from `texts`.

        Raises:
          ValueError: `vocab_size` below 258, or more than the texts have merges for.
        """
        check_integer("BPETokenizer.train", "vocab_size", vocab_size, 258)  # 256 bytes and 2 special tokens
        tokenizer = HuggingFaceTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_BOS_TOKENS[0], _PAD_TOKENS[0]],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,  # its bars are drawn even where the output is a file
        )
        pieces = (piece for text in texts for piece in _pieces(_checked_text(text)))
        bar = tqdm.tqdm(pieces, desc="reading for BPE", unit=" pieces", disable=None if progress else True, delay=1.0)
        tokenizer.train_from_iterator(bar, trainer)
        reached = tokenizer.get_vocab_size()
        if reached < vocab_size:
            raise ValueError(
                f"BPETokenizer.train: the texts have merges for {reached} ids only, got vocab_size={vocab_size}; "
                f"give more text, or vocab_size={reached} at most"
            )
        return cls(tokenizer, _BOS_TOKENS[0], _PAD_TOKENS[0])

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, bos_token: str | None = None, pad_token: str | None = None
    ) -> "BPETokenizer":
        """The tokenizer of a `tokenizer.json`, whoever made it, or of a file that `save` wrote.

        `bos_token` and `pad_token` name the document separator and the filler; None looks for the usual names, and
        pads with the separator where there is no padding token.

        Raises:
          ValueError: no such file, not a `tokenizer.json`, or a special token it does not have.
        """
        content = _read_json(path)
        if _WRAPPED in content:
            bos_token, pad_token = bos_token or content["bos_token"], pad_token or content["pad_token"]
            content = content[_WRAPPED]
        if not isinstance(content.get("model"), dict):
            raise ValueError(f"load_tokenizer: {str(path)!r} is JSON but no tokenizer.json: it has no 'model'")
        tokenizer = HuggingFaceTokenizer.from_str(json.dumps(content))
        special = _specials(tokenizer)
        bos_token = bos_token or _first(_BOS_TOKENS, special)
        if bos_token is None:
            raise ValueError(
                f"load_tokenizer: no document separator among the special tokens {special} of {str(path)!r}; "
                "name one with bos_token="
            )
        return cls(tokenizer, bos_token, pad_token or _first(_PAD_TOKENS, special) or bos_token)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [list(_pieces(_checked_text(text))) for text in texts]
        encoded = self._encode_pieces([piece for parts in pieces for piece in parts])
        none = np.zeros(0, np.int32)
        return [np.concatenate([none, *(next(encoded) for _ in parts)]) for parts in pieces]

    def _encode_pieces(self, pieces: list[str], group: int = 64) -> Iterator[np.ndarray]:
        # An Encoding takes a hundred bytes a token: keep those of one group at a time.
        for start in range(0, len(pieces), group):
            for encoding in self._tokenizer.encode_batch_fast(pieces[start : start + group], add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text without special tokens; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        ids = _checked_ids(ids, self.vocab_size)
        ids = ids[(ids != self.bos_id) & (ids != self.pad_id)]  # a loaded file need not mark these two as special
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `tokenizer.json` that other software reads too, unless its special tokens have unusual names."""
        _write_text(path, self._to_json())

    def _to_json(self) -> str:
        content = self._tokenizer.to_str()
        special = _specials(self._tokenizer)
        bos_token = _first(_BOS_TOKENS, special)
        if (bos_token, _first(_PAD_TOKENS, special) or bos_token) == (self._bos_token, self._pad_token):
            return content  # `load` finds the same two by itself
        return json.dumps(
            {"bos_token": self._bos_token, "pad_token": self._pad_token, _WRAPPED: json.loads(content)},
            ensure_ascii=False,
        )


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `save` wrote to `path`, or that of a `tokenizer.json` made elsewhere.

    Raises:
      ValueError: no such file, or nothing that is known.
    """
    return ByteTokenizer() if _read_json(path) == _BYTES else BPETokenizer.load(path)


def _read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"load_tokenizer: there is no file {str(path)!r}; give the path of a tokenizer.json")
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"load_tokenizer: {str(path)!r} is not JSON ({error}); give a tokenizer.json") from None
    if not isinstance(content, dict):
        raise ValueError(f"load_tokenizer: {str(path)!r} holds a {type(content).__name__}; give a tokenizer.json")
    return content


def _write_text(path: str | os.PathLike[str], text: str) -> None:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _specials(tokenizer: HuggingFaceTokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


def _first(wanted: Iterable[str], there: Sequence[str]) -> str | None:
    return next((token for token in wanted if token in there), None)


def _checked_text(text: str) -> str:
    _utf8(text)
    return text


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"encode: character {error.start} is half of a surrogate pair, which no UTF-8 text has; repair the text "
            "first, for example with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None


def _checked_ids(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    array = np.asarray(ids if isinstance(ids, np.ndarray | list | tuple) else list(ids)).reshape(-1)
    if array.size == 0:
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"decode: got ids of dtype {array.dtype}, wanted integers")
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(f"decode: ids run from {array.min()} to {array.max()}, wanted 0 to {vocab_size - 1}")
    return array.astype(np.int64)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
