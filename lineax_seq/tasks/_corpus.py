"""The text of a run: tokenised once, cut into rows, and as it was for the compressors."""

import hashlib
import json
import re
from pathlib import Path

from ..data import Corpus, PackedSource, Tokens, WindowSource, prepare_corpus, read_documents, split_documents
from ..training import check_place
from ._text_config import DataConfig, TextConfig

VOCABULARY_PADDING = 256  # a vocabulary may be larger than the tokenizer's by less than this, to be a round number


def open_corpus(config: TextConfig) -> Corpus:
    """The tokenised text of `config`, made once under `data.cache_dir`.

    Raises:
      ValueError: text or tokenizer that cannot be read, or a vocabulary that does not fit the model's.
    """
    data, vocab_size = config.data, config.model.vocab_size
    trained = data.tokenizer == "bpe"
    taken = [data.path, data.heldout, data.files, data.unreadable, data.text_key]
    recipe = [*taken, data.heldout_from_year, data.tokenizer, trained and vocab_size]
    name = re.sub(r"\W+", "-", Path(data.path).stem) or "text"
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    directory = Path(data.cache_dir) / f"{name}-{key}"
    if not directory.exists():
        check_place(directory)
    corpus = prepare_corpus(
        data.path,
        directory,
        tokenizer=data.tokenizer,
        vocab_size=vocab_size if trained else None,
        heldout_source=data.heldout,
        heldout_from_year=data.heldout_from_year,
        text_key=data.text_key,
        files=data.files,
        unreadable=data.unreadable,
        overwrite=True,  # the text changed under the same name
    )
    known = corpus.tokenizer.vocab_size
    if not known <= vocab_size < known + VOCABULARY_PADDING:
        raise ValueError(
            f"model.vocab_size is {vocab_size}, but the tokenizer {data.tokenizer!r} has {known} ids; "
            f"set --model.vocab-size {known}, or up to {VOCABULARY_PADDING - 1} more"
        )
    return corpus


def rows(tokens: Tokens, data: DataConfig) -> WindowSource | PackedSource:
    """Rows of `data.context` tokens, cut as `data.rows` says."""
    if data.rows == "packed":
        return PackedSource(tokens, data.context)
    return WindowSource(tokens, data.context, segment_documents=data.rows == "documents")


def heldout_texts(data: DataConfig) -> list[str]:
    """The held-out documents as text, for the compressors."""

    def documents(source: str):
        files = data.files if Path(source).is_dir() else None
        return read_documents(source, text_key=data.text_key, files=files, unreadable=data.unreadable)

    if data.heldout is not None:
        return [document.text for document in documents(data.heldout)]
    held_out = split_documents(documents(data.path), heldout_from_year=data.heldout_from_year).heldout
    return [document.text for document in held_out]
