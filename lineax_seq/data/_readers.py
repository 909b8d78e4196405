"""The documents of one file: plain text, JSON lines, or a column of a parquet file."""

import codecs
import errno
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ._faults import Faults, shortened
from ._listing import File

_LONGEST_LINE = 2**30  # bytes of a .jsonl file
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # JSON may spell half of a surrogate pair, which no UTF-8 text has
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name. `year` is set where the corpus dates its documents, and decides the held-out split."""

    name: str
    text: str
    year: int | None = None


def open_regular(path: Path) -> io.BufferedReader:
    """The file, opened for reading in binary, if it is one: a pipe would be waited for without end.

    Raises:
      OSError: it cannot be opened, or is no regular file; `strerror` says which.
    """
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    kind = stat.S_IFMT(os.fstat(stream.fileno()).st_mode)
    if kind != stat.S_IFREG:
        stream.close()
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')}, not a file")
    return stream


def refuse(file: File, error: OSError, faults: Faults) -> None:
    """A file that cannot be opened or read."""
    reason = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        reason = "it is a link to nothing" if os.path.islink(file.path) else "it is no longer there"
    faults(f"{file.name!r} cannot be read ({reason})", "mend or remove it")


def read_file(file: File, text_key: str, faults: Faults) -> Iterator[Document]:
    read = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(file.path.suffix.lower(), _read_text)
    try:
        with open_regular(file.path) as stream:
            yield from read(stream, file, text_key, faults)
    except OSError as error:
        refuse(file, error, faults)


def _read_text(stream: BinaryIO, file: File, text_key: str, faults: Faults) -> Iterator[Document]:
    data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (byte {error.start}: {error.reason})"
    else:
        if b"\0" not in data:
            yield Document(file.name, text, file.year)
            return
        problem = f"holds a NUL (byte {data.index(0)})"
    encoding = "latin1"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif data.count(0) > len(data) // 4:  # every other byte of Western text in UTF-16
        encoding = "utf-16le" if data[1::2].count(0) > data[::2].count(0) else "utf-16be"
    elif b"\0" in data:
        faults(f"{file.name!r} {problem}", "remove it if it is no text, or its NULs with: tr -d '\\000' < OLD > NEW")
        return
    faults(f"{file.name!r} {problem}", f"convert it, for example with: iconv -f {encoding} -t utf-8 OLD > NEW")


def _read_jsonl(stream: BinaryIO, file: File, text_key: str, faults: Faults) -> Iterator[Document]:
    number = 0
    while line := stream.readline(_LONGEST_LINE + 1):
        number += 1
        where = f"line {number} of {file.name!r}"
        if len(line) > _LONGEST_LINE:
            faults(f"{where} has more than {_LONGEST_LINE} bytes", "split it")
            while line and not line.endswith(b"\n"):
                line = stream.readline(_LONGEST_LINE)
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or lists in lists without end
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            faults(f"{where} is not JSON ({reason})", "write one JSON object a line")
            continue
        if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
            got = f"the keys {shortened(sorted(row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
            faults(
                f"{where} holds {got}, wants an object with a string under {text_key!r}", "name the key with text_key="
            )
            continue
        if _HALF_A_PAIR.search(row[text_key]):
            faults(f"{where} holds half of a surrogate pair", "repair or drop that line")
            continue
        yield Document(f"{file.name}:{number}", row[text_key], file.year)


def _read_parquet(stream: BinaryIO, file: File, text_key: str, faults: Faults) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"read_documents: {file.name!r} needs the package pyarrow; install it with: pip install pyarrow",
            name="pyarrow",
        ) from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(stream) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                faults(
                    f"{file.name!r} has the columns {shortened(columns)}, wants {text_key!r}",
                    "name the column with text_key=",
                )
                return
            for batch in table.iter_batches(columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        faults(
                            f"column {text_key!r} of {file.name!r} holds {type(text).__name__}, wants strings",
                            "name a text column with text_key=",
                        )
                        return
                    if text is not None:
                        yield Document(f"{file.name}:{row}", text, file.year)
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = shortened(" ".join(str(error).split()))
        faults(f"{file.name!r} is no whole parquet file: from row {row} on, {reason}", "write it again")
