"""Byte-level byte-pair encoding, trained here or loaded from a `tokenizer.json`; any saved tokenizer by its file."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from tokenizers import Tokenizer as HuggingFaceTokenizer, decoders, models, pre_tokenizers, trainers

from ..core.checks import integer, nearest
from ._tokenizers import BYTES, ByteTokenizer, Tokenizer, checked_ids, checked_text, write_text

_WRAPPED = "huggingface"  # the key of a tokenizer.json inside a file that also names its special tokens

# Names under which published tokenizers keep these two, most telling first.
_BOS_TOKENS = ("<|bos|>", "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>", "<|im_start|>", "[CLS]")
_PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")

_PIECE = 2**18  # characters


class BPETokenizer:
    """Byte-level byte-pair encoding by the package `tokenizers`: `decode(encode(text)) == text` for every text.

    Made by `BPETokenizer.train`, or by `BPETokenizer.load` from any `tokenizer.json`. (A loaded one may normalise text
    or drop what it does not know; then the round trip is only as exact as that file makes it.)
    Texts beyond 2**18 characters are encoded in pieces that end at line ends, which bounds memory.
    """

    def __init__(self, huggingface: HuggingFaceTokenizer, bos_token: str, pad_token: str):
        self._tokenizer = huggingface
        self._configure()
        self._bos_token, self._pad_token = bos_token, pad_token
        self.bos_id, self.pad_id = self._special_id("bos_token", bos_token), self._special_id("pad_token", pad_token)
        self.vocab_size: int = 1 + max(huggingface.get_vocab(with_added_tokens=True).values())

    def _configure(self) -> None:
        """Settings that a file of the package, and so a pickle or a copy of its tokenizer, does not keep."""
        self._tokenizer.encode_special_tokens = True  # "<|bos|>" written in a text is text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __setstate__(self, state: dict[str, Any]) -> None:  # of pickle, copy and deepcopy
        self.__dict__.update(state)
        self._configure()

    def _special_id(self, option: str, token: str) -> int:
        special_id = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        if special_id is None:
            specials = _specials(self._tokenizer)
            raise ValueError(
                f"BPETokenizer: {option}={token!r}{nearest(str(token), specials)} is no token, "
                f"wants one of the special tokens {specials}."
            )
        return special_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, progress: bool = True) -> "BPETokenizer":
        """A BPE of exactly `vocab_size` ids: `<|bos|>`, `<|pad|>`, 256 bytes, and the merges learnt from `texts`.

        Raises:
          ValueError: `vocab_size` below 258, or more than the texts have merges for.
        """
        vocab_size = integer("BPETokenizer.train", "vocab_size", vocab_size, 258)  # 256 bytes and 2 special tokens
        tokenizer = HuggingFaceTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_BOS_TOKENS[0], _PAD_TOKENS[0]],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,  # its bars are drawn even where the output is a file
        )
        pieces = (piece for text in texts for piece in _pieces(checked_text(text)))
        bar = tqdm.tqdm(pieces, desc="reading for BPE", unit=" pieces", disable=None if progress else True, delay=1.0)
        tokenizer.train_from_iterator(bar, trainer)
        reached = tokenizer.get_vocab_size()
        if reached < vocab_size:
            raise ValueError(
                f"BPETokenizer.train: vocab_size={vocab_size}, but the texts have merges for {reached} ids only; "
                f"give more text, or vocab_size={reached} at most."
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
            bos_token, pad_token = bos_token or content.get("bos_token"), pad_token or content.get("pad_token")
            content = content[_WRAPPED]
        tokenizer = _from_json(path, content)
        special = _specials(tokenizer)
        bos_token = bos_token or _first(_BOS_TOKENS, special)
        if bos_token is None:
            raise ValueError(
                f"load_tokenizer: {str(path)!r} has the special tokens {special}, none of which is known to separate "
                "documents; name one with bos_token=."
            )
        return cls(tokenizer, bos_token, pad_token or _first(_PAD_TOKENS, special) or bos_token)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [list(_pieces(checked_text(text))) for text in texts]
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
        ids = checked_ids(ids, self.vocab_size)
        ids = ids[(ids != self.bos_id) & (ids != self.pad_id)]  # a loaded file need not mark these two as special
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `tokenizer.json` that other software reads too, unless its special tokens have unusual names."""
        write_text(path, self._to_json())

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
    return ByteTokenizer() if _read_json(path) == BYTES else BPETokenizer.load(path)


def _read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise ValueError(f"load_tokenizer: there is no file {str(path)!r}; give the path of a tokenizer.json.")
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"load_tokenizer: {str(path)!r} is not JSON ({error}); give a tokenizer.json.") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"load_tokenizer: {str(path)!r} holds a {type(content).__name__}, wants an object; give a tokenizer.json."
        )
    return content


def _from_json(path: str | os.PathLike[str], content: Any) -> HuggingFaceTokenizer:
    try:
        return HuggingFaceTokenizer.from_str(json.dumps(content))
    except BaseException as error:
        if type(error) is Exception:  # the package has no narrower class for what it cannot parse
            raise ValueError(
                f"load_tokenizer: {str(path)!r} is JSON but no tokenizer.json ({error}); give a tokenizer.json."
            ) from None
        raise


def _specials(tokenizer: HuggingFaceTokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


def _first(wanted: Iterable[str], there: Sequence[str]) -> str | None:
    return next((token for token in wanted if token in there), None)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
