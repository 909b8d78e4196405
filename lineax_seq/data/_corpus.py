"""From a source to training and held-out tokens on disk in one call, done once and reused."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.checks import integer, nearest
from ._bpe import BPETokenizer, load_tokenizer
from ._directory import damage, files_of, new_directory, read_seal, seal, writing
from ._documents import documents_of, fingerprint_of
from ._faults import Faults, PassedOver, Unreadable
from ._listing import Source, check_pattern, list_files
from ._readers import Document
from ._split import HELDOUT_EVERY, HELDOUT_FROM_YEAR, label_heldout
from ._tokenizers import ByteTokenizer, Tokenizer
from ._tokens import FILES, Tokens, open_tokens, write_labelled

_SEAL = "corpus.json"
_FILES = {_SEAL, "tokenizer.json", *(f"{part}/{name}" for part in ("train", "heldout") for name in FILES)}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenised corpus, the tokenizer that made it, the recipe it was made by, and what of the source was
    passed over because it could not be read."""

    tokenizer: Tokenizer
    train: Tokens
    heldout: Tokens
    recipe: dict[str, Any]
    passed_over: PassedOver = PassedOver()


def prepare_corpus(
    source: Source,
    directory: str | os.PathLike[str],
    *,
    files: str | None = None,
    tokenizer: str | os.PathLike[str] | Tokenizer = "bytes",
    vocab_size: int | None = None,
    heldout_source: Source | None = None,
    every: int = HELDOUT_EVERY,
    heldout_from_year: int = HELDOUT_FROM_YEAR,
    text_key: str = "text",
    unreadable: Unreadable = "refuse",
    overwrite: bool = False,
    progress: bool = True,
) -> Corpus:
    """The `Corpus` of `source`, made in the folder `directory` the first time, opened from there afterwards.

    `tokenizer` is `"bytes"`, `"bpe"` (trained on the training documents to exactly `vocab_size` ids), the path of a
    `tokenizer.json`, or a `Tokenizer`. Held out are the documents of `heldout_source`, or without one those that
    `split_documents(every=, heldout_from_year=)` picks. `files`, `text_key` and `unreadable` are those of
    `read_documents`, for both sources.

    The folder is reused if it was made by the same recipe from sources with the same content, and is as it was
    written: the source's files and the folder's are hashed. A damaged one is made anew, with a warning. It is written
    under a temporary name and renamed when complete; several processes may prepare it at once.

    Raises:
      ValueError: the folder was made from something else (`overwrite=True` makes it anew), holds files that are not
        of a corpus (never overwritten), or cannot be written; the source changes meanwhile; bad options; and whatever
        `read_documents` and the tokenizers refuse.
    """
    directory = Path(directory)
    every = integer("prepare_corpus", "every", every, 2)
    heldout_from_year = integer("prepare_corpus", "heldout_from_year", heldout_from_year, 0)
    if heldout_source is not None and (every, heldout_from_year) != (HELDOUT_EVERY, HELDOUT_FROM_YEAR):
        raise ValueError(
            "prepare_corpus: heldout_source= holds out its own documents, every= and heldout_from_year= pick some of "
            "the source; give one or the other."
        )
    check_pattern("prepare_corpus", files, source, heldout_source)
    make_tokenizer, tokenizer_name = _tokenizer_maker(tokenizer, vocab_size, progress)

    def recipe() -> dict[str, Any]:
        def fingerprint(source: Source) -> str:
            faults = Faults(unreadable)
            return fingerprint_of(list_files(source, files, faults), text_key, faults)

        return {
            "source": fingerprint(source),
            "heldout_source": None if heldout_source is None else fingerprint(heldout_source),
            "every": every,
            "heldout_from_year": heldout_from_year,
            "tokenizer": tokenizer_name,
            "unreadable": unreadable,
        }

    def labelled(faults: Faults) -> Iterator[tuple[bool, Document]]:
        documents = documents_of(list_files(source, files, faults), text_key, faults)
        if heldout_source is None:
            yield from label_heldout(documents, every=every, heldout_from_year=heldout_from_year)
        else:
            yield from ((False, document) for document in documents)
            heldout = documents_of(list_files(heldout_source, files, faults), text_key, faults)
            yield from ((True, document) for document in heldout)

    wanted = recipe()
    corpus = _find(directory, wanted, overwrite)
    if isinstance(corpus, str):
        if corpus:
            warnings.warn(f"prepare_corpus: {str(directory)!r} is damaged ({corpus}) and is made anew.", stacklevel=2)
        faults = Faults(unreadable)
        made = make_tokenizer(document.text for heldout, document in labelled(faults) if not heldout)

        def gives_way(there: Path) -> bool:
            nonlocal corpus
            found = _find(there, wanted, overwrite)
            if not isinstance(found, str):
                corpus = found  # another process was first: its result stands
            return isinstance(found, str)

        with new_directory(directory, gives_way) as temporary:
            faults = Faults(unreadable)  # the text is read a second time
            write_labelled(labelled(faults), made, [temporary / "train", temporary / "heldout"], progress=progress)
            if recipe() != wanted:
                raise ValueError(
                    "prepare_corpus: the source changed while it was read; call it again when its files rest."
                )
            with writing(directory):
                made.save(temporary / "tokenizer.json")
                seal(temporary, _SEAL, {"recipe": wanted, "passed_over": faults.passed})
            # Opened before it is renamed: what is open stays, whatever other processes do to the folder.
            corpus = _open(temporary)
    corpus.passed_over.warn("prepare_corpus", 2)
    return corpus


def _tokenizer_maker(
    tokenizer: str | os.PathLike[str] | Tokenizer, vocab_size: int | None, progress: bool
) -> tuple[Callable[[Iterable[str]], Tokenizer], str]:
    """A function from the training texts to the tokenizer, and what stands for it in the recipe."""
    if tokenizer == "bpe":
        if vocab_size is None:
            raise ValueError("prepare_corpus: tokenizer='bpe' needs vocab_size=; for example 4096.")
        vocab_size = integer("prepare_corpus", "vocab_size", vocab_size, 258)
        return lambda texts: BPETokenizer.train(texts, vocab_size, progress=progress), f"bpe {vocab_size}"
    if vocab_size is not None:
        raise ValueError(
            f"prepare_corpus: vocab_size={vocab_size} is for tokenizer='bpe' only, not {tokenizer!r}; leave it out."
        )
    if tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif isinstance(tokenizer, str | os.PathLike):
        if not os.path.isfile(tokenizer):
            raise ValueError(
                f"prepare_corpus: tokenizer={str(tokenizer)!r}{nearest(str(tokenizer), ('bytes', 'bpe'))}, wants "
                "'bytes', 'bpe', or the path of an existing tokenizer.json."
            )
        tokenizer = load_tokenizer(tokenizer)
    elif not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"prepare_corpus: tokenizer={tokenizer!r}, wants 'bytes', 'bpe', the path of a tokenizer.json, or an "
            "object with the members of lineax_seq.data.Tokenizer."
        )
    made = tokenizer
    return lambda texts: made, made.fingerprint


def _find(directory: Path, recipe: dict[str, Any], overwrite: bool) -> Corpus | str:
    """The corpus of this recipe, if the folder holds it; else why the folder is to be made anew, "" if it is new."""
    if not os.path.lexists(directory) or (os.path.isdir(directory) and not any(directory.iterdir())):
        return ""
    record = read_seal(directory, _SEAL)
    here = files_of(directory) if os.path.isdir(directory) else set()
    if record is None and not ({"train/tokens.bin", "heldout/tokens.bin"} & here and here <= _FILES):
        raise ValueError(
            f"prepare_corpus: {str(directory)!r} exists and was not made by prepare_corpus; choose another directory."
        )
    differences = _differences(record["recipe"], recipe) if record else []
    if differences and not overwrite:
        raise ValueError(
            f"prepare_corpus: {str(directory)!r} was made from something else: {'; '.join(differences)}; "
            "choose another directory, or make it anew with overwrite=True."
        )
    problem = ""
    if not differences:
        problem = damage(directory, record) if record else f"{_SEAL} is missing or not what was written"
        if not problem:
            return _open(directory)
    if here - _FILES:
        raise ValueError(
            f"prepare_corpus: {str(directory)!r} is to be made anew, but also holds {sorted(here - _FILES)[:3]}, "
            "which a corpus does not; move these out of it, or choose another directory."
        )
    return problem


def _differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"{key} was {str(there.get(key))[:12]}, now {str(value)[:12]}"
        for key, value in wanted.items()
        if there.get(key) != value
    ]


def _open(directory: Path) -> Corpus:
    record = read_seal(directory, _SEAL)
    if record is None:
        raise ValueError(f"prepare_corpus: {str(directory)!r} was removed while it was opened; call it again.")
    return Corpus(
        tokenizer=load_tokenizer(directory / "tokenizer.json"),
        train=open_tokens(directory / "train"),
        heldout=open_tokens(directory / "heldout"),
        recipe=record["recipe"],
        passed_over=PassedOver(*record["passed_over"]),
    )
