"""From a source to training and held-out tokens on disk in one call, done once and reused."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._documents import Document, Source, read_documents, source_fingerprint
from ._split import HELDOUT_EVERY, HELDOUT_FROM_YEAR, label_heldout
from ._tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from ._tokens import Tokens, new_directory, open_tokens, write_labelled


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenised corpus, the tokenizer that made it, and the recipe it was made by."""

    tokenizer: Tokenizer
    train: Tokens
    heldout: Tokens
    recipe: dict[str, Any]


def prepare_corpus(
    source: Source,
    directory: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | Tokenizer = "bytes",
    vocab_size: int | None = None,
    heldout_source: Source | None = None,
    every: int = HELDOUT_EVERY,
    heldout_from_year: int = HELDOUT_FROM_YEAR,
    text_key: str = "text",
    overwrite: bool = False,
    progress: bool = True,
) -> Corpus:
    """The `Corpus` of `source`, made in the folder `directory` the first time, opened from there afterwards.

    `tokenizer` is `"bytes"`, `"bpe"` (trained on the training documents to exactly `vocab_size` ids), the path of a
    `tokenizer.json`, or a `Tokenizer`. Held out are the documents of `heldout_source`, or without one those that
    `split_documents(every=, heldout_from_year=)` picks.

    The folder is reused if it was made by the same recipe from sources with the same content (the files are hashed).
    It is written under a temporary name and renamed when complete; several processes may prepare it at once.

    Raises:
      ValueError: the folder was made from something else (`overwrite=True` makes it anew), or is no corpus folder
        (never overwritten); bad options; and whatever `read_documents` and the tokenizers refuse.
    """
    directory = Path(directory)
    if heldout_source is not None and (every, heldout_from_year) != (HELDOUT_EVERY, HELDOUT_FROM_YEAR):
        raise ValueError(
            "prepare_corpus: heldout_source= holds out its own documents, every= and heldout_from_year= pick some of "
            "the source; give one or the other"
        )
    make_tokenizer, tokenizer_name = _tokenizer_maker(tokenizer, vocab_size, progress)
    recipe = {
        "source": source_fingerprint(source, text_key=text_key),
        "heldout_source": None if heldout_source is None else source_fingerprint(heldout_source, text_key=text_key),
        "every": every,
        "heldout_from_year": heldout_from_year,
        "tokenizer": tokenizer_name,
    }
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        differences = _differences(directory, recipe)
        if not differences:
            return _open(directory, recipe)
        if not overwrite:
            raise ValueError(
                f"prepare_corpus: {str(directory)!r} was made from something else: {'; '.join(differences)}; "
                "choose another directory, or make it anew with overwrite=True"
            )

    def labelled() -> Iterator[tuple[bool, Document]]:
        documents = read_documents(source, text_key=text_key)
        if heldout_source is None:
            yield from label_heldout(documents, every=every, heldout_from_year=heldout_from_year)
        else:
            yield from ((False, document) for document in documents)
            yield from ((True, document) for document in read_documents(heldout_source, text_key=text_key))

    made = make_tokenizer(document.text for heldout, document in labelled() if not heldout)
    try:
        with new_directory(directory) as temporary:
            write_labelled(labelled(), made, [temporary / "train", temporary / "heldout"], progress=progress)
            made.save(temporary / "tokenizer.json")
            (temporary / "corpus.json").write_text(json.dumps({"recipe": recipe}, indent=1), encoding="utf-8")
            if overwrite and directory.exists():
                shutil.rmtree(directory)
    except OSError as error:
        # Another process finished first: its result stands if it is the same.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or _differences(directory, recipe):
            raise
    return _open(directory, recipe)


def _tokenizer_maker(
    tokenizer: str | os.PathLike[str] | Tokenizer, vocab_size: int | None, progress: bool
) -> tuple[Callable[[Iterable[str]], Tokenizer], str]:
    """A function from the training texts to the tokenizer, and what stands for it in the recipe."""
    if tokenizer == "bpe":
        if vocab_size is None:
            raise ValueError("prepare_corpus: tokenizer='bpe' needs vocab_size=, for example 4096")
        return lambda texts: BPETokenizer.train(texts, vocab_size, progress=progress), f"bpe {vocab_size}"
    if vocab_size is not None:
        raise ValueError(
            f"prepare_corpus: vocab_size={vocab_size} is for tokenizer='bpe' only, got {tokenizer!r}; leave it out"
        )
    if tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif isinstance(tokenizer, str | os.PathLike):
        if not Path(tokenizer).is_file():
            raise ValueError(
                f"prepare_corpus: got tokenizer={str(tokenizer)!r}, wanted 'bytes', 'bpe', or the path of an existing "
                "tokenizer.json"
            )
        tokenizer = load_tokenizer(tokenizer)
    elif not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"prepare_corpus: got tokenizer={tokenizer!r}, wanted 'bytes', 'bpe', the path of a tokenizer.json, or an "
            "object with the members of lineax_seq.data.Tokenizer"
        )
    made = tokenizer
    return lambda texts: made, made.fingerprint


def _differences(directory: Path, recipe: dict[str, Any]) -> list[str]:
    path = directory / "corpus.json"
    if not path.is_file():
        raise ValueError(
            f"prepare_corpus: {str(directory)!r} exists and was not made by prepare_corpus; choose another directory"
        )
    there = json.loads(path.read_bytes())["recipe"]
    return [
        f"{key} was {str(there.get(key))[:12]}, now {str(value)[:12]}"
        for key, value in recipe.items()
        if there.get(key) != value
    ]


def _open(directory: Path, recipe: dict[str, Any]) -> Corpus:
    return Corpus(
        tokenizer=load_tokenizer(directory / "tokenizer.json"),
        train=open_tokens(directory / "train"),
        heldout=open_tokens(directory / "heldout"),
        recipe=recipe,
    )
