"""What cannot be read is one ValueError that names it, or is passed over and counted; nothing hangs."""

import itertools
import json
import os
import random
import re
import socket
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lineax_seq.data import Document, prepare_corpus, read_documents, source_fingerprint

# What is in a file, or a function that makes something else of its path; and what is said about it.
ASCII, ACCENT = "Ein Satz, e.\n", "Ein Satz, é.\n"
FAULTY = {
    "dangling.txt": (lambda path: path.symlink_to("nowhere"), r"'dangling.txt' cannot be read \(it is a link to not"),
    "circle.txt": (lambda path: path.symlink_to(path), r"'circle.txt' cannot be read \(Too many levels of symb"),
    "pipe.txt": (os.mkfifo, r"'pipe.txt' cannot be read \(it is a named pipe, not a file\)"),
    "pipe.jsonl": (os.mkfifo, r"'pipe.jsonl' cannot be read \(it is a named pipe"),
    "pipe.parquet": (os.mkfifo, r"'pipe.parquet' cannot be read \(it is a named pipe"),
    "zero.txt": (lambda path: path.symlink_to("/dev/zero"), r"'zero.txt' cannot be read \(it is a device"),
    "latin.txt": ("café".encode("latin-1"), r"'latin.txt' is not UTF-8 \(byte 3: .*iconv -f latin1"),
    "wide.txt": (ACCENT.encode("utf-16"), r"'wide.txt' is not UTF-8 \(byte 0: .*iconv -f utf-16 "),
    "little.txt": (ASCII.encode("utf-16-le"), r"'little.txt' holds a NUL \(byte 1\).*iconv -f utf-16le"),
    "big.txt": (ASCII.encode("utf-16-be"), r"'big.txt' holds a NUL \(byte 0\).*iconv -f utf-16be"),
    "accent.txt": (ACCENT.encode("utf-16-le"), r"'accent.txt' is not UTF-8 \(byte 20.*iconv -f utf-16le"),
    "nul.txt": (b"a line\nan\0other\n" * 9, r"'nul.txt' holds a NUL \(byte 9\).*tr -d '\\000'"),
    "deep.jsonl": (b"[" * 200_000, r"line 1 of 'deep.jsonl' is not JSON \(nested too deeply\)"),
    "number.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", r"line 1 of 'number.jsonl' is not JSON \(Exceeds the limit"),
    "nul.jsonl": (b'{"text": "a\0b"}', r"line 1 of 'nul.jsonl' is not JSON \(Invalid control character"),
    "nuls.jsonl": (b"\0" * 4096, r"line 1 of 'nuls.jsonl' is not JSON"),
    "wide.jsonl": ('{"text": "x"}'.encode("utf-16"), r"line 1 of 'wide.jsonl' is not JSON \('utf-8' codec"),
    "latin.jsonl": ('{"text": "é"}\n'.encode("latin-1"), r"line 1 of 'latin.jsonl' is not JSON \('utf-8' codec"),
    "half.jsonl": (b'{"text": "\xed\xa0\x80"}', r"line 1 of 'half.jsonl' is not JSON \('utf-8' codec"),
    "pair.jsonl": (b'{"text": "\\udc00\\ud800"}', r"line 1 of 'pair.jsonl' holds half of a surrogate pair"),
    "cut.jsonl": (b'{"text": "fi', r"line 1 of 'cut.jsonl' is not JSON \(Unterminated string"),
    "keys.jsonl": (json.dumps({str(i): 0 for i in range(9999)}).encode(), r"holds the keys .* \.\.\., wants an object"),
    "empty.parquet": (b"", r"'empty.parquet' is no whole parquet file"),
}  # fmt: skip


def make(path: Path, content) -> Path:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


def read(source, **options) -> list[Document]:
    return list(read_documents(source, **options))


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_named_or_passed_over(tmp_path, name):
    content, message = FAULTY[name]
    (tmp_path / "a.txt").write_text("fine")
    make(tmp_path / name, content)
    with pytest.raises(
        ValueError, match=f"^read_documents: .*{message}.*, or pass over it with unreadable="
    ) as refused:
        read(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    if "cannot be read" in message:  # what cannot even be opened has no fingerprint
        with pytest.raises(ValueError, match=message):
            source_fingerprint(tmp_path)
    said = f"^read_documents: passed over 1 unreadable .*, the first because .*{message.split('.*')[0]}"
    with pytest.warns(UserWarning, match=said):
        assert [document.text for document in read(tmp_path, unreadable="pass")] == ["fine"]
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)  # named outright
    with pytest.raises(ValueError, match="no text in 1 file.*passed over 1 .*the first because"):
        read(tmp_path / name, unreadable="pass")


def test_a_socket_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        with pytest.raises(ValueError, match="'socket.txt' cannot be read"):
            read(".")


def test_lines_are_passed_over_one_by_one(tmp_path):
    good, bad = b'{"text": "good"}\n', b'{"text": \n'
    (tmp_path / "a.jsonl").write_bytes(good + bad + good + b"[]\n" + good)
    with pytest.warns(UserWarning, match="passed over 2 .*line 2 of 'a.jsonl'"):
        assert [d.name for d in read(tmp_path, unreadable="pass")] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5"]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good)  # a byte order mark is none of the text
    assert [document.text for document in read(tmp_path)] == ["good"]


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("lineax_seq.data._readers._LONGEST_LINE", 100)
    line = json.dumps({"text": "x" * 1000}).encode()
    (tmp_path / "a.jsonl").write_bytes(line + b'\n{"text": "short"}\n' + line)
    with pytest.raises(ValueError, match="line 1 of 'a.jsonl' has more than 100 bytes; split it"):
        read(tmp_path)
    with pytest.warns(UserWarning, match="passed over 2 "):
        assert [document.name for document in read(tmp_path, unreadable="pass")] == ["a.jsonl:2"]


def test_a_huge_line_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 2**22}))
    assert len(read(tmp_path)[0].text) == 2**22


def test_what_is_said_when_nothing_is_left(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="no text in 2 file.*passed over 2 .* first because 'a.txt' is not UTF-8"):
        read(tmp_path, unreadable="pass")


def test_files_that_vanish_between_listing_and_reading(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    documents = read_documents(tmp_path)
    assert next(documents).text == "a"
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"'b.txt' cannot be read \(it is no longer there\)"):
        next(documents)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    """Simulated, because root may read every file."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    opened = os.open

    def refuse(path, *arguments):
        if Path(path).name == "b.txt":
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=r"'b.txt' cannot be read \(Permission denied\)"):
        read(tmp_path)
    closed = source_fingerprint(tmp_path, unreadable="pass")
    with pytest.warns(UserWarning, match="passed over 1 "):
        assert [document.text for document in read(tmp_path, unreadable="pass")] == ["a.txt"]
    monkeypatch.undo()
    assert source_fingerprint(tmp_path, unreadable="pass") != closed  # so that a corpus is made anew once it opens


def test_a_corpus_says_what_it_passed_over_each_time(tmp_path):
    source = tmp_path / "texts"
    source.mkdir()
    for i in range(40):
        (source / f"{i:02}.txt").write_bytes(b"caf\xe9" if i in (3, 7) else b"text " * (i + 1))
    with pytest.raises(ValueError, match="'03.txt' is not UTF-8"):
        prepare_corpus(source, tmp_path / "corpus")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]
    for _ in range(2):
        with pytest.warns(UserWarning, match="^prepare_corpus: passed over 2 .*'03.txt' is not UTF-8") as said:
            corpus = prepare_corpus(source, tmp_path / "corpus", unreadable="pass", tokenizer="bpe", vocab_size=262)
        assert len(said) == 1 and said[0].filename == __file__
        assert corpus.passed_over.count == 2 and corpus.train.num_documents + corpus.heldout.num_documents == 38
    with pytest.raises(ValueError, match="'03.txt' is not UTF-8"):  # and is no corpus for who refuses
        prepare_corpus(source, tmp_path / "corpus", tokenizer="bpe", vocab_size=262, overwrite=True)


def test_a_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
    from lineax_seq.data import _corpus

    (tmp_path / "a.txt").write_text("some words " * 99)
    write = _corpus.write_labelled

    def change(*arguments, **options):
        write(*arguments, **options)
        (tmp_path / "a.txt").write_text("other words " * 99)

    monkeypatch.setattr(_corpus, "write_labelled", change)
    with pytest.raises(ValueError, match="the source changed while it was read"):
        prepare_corpus(tmp_path / "a.txt", tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def mutated(random: random.Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    kind = random.choice(["truncate", "flip", "bytes", "nul", "nuls", "repeat", "encode", "swap", "cut"])
    match kind:
        case "truncate":
            return data[:at]
        case "flip":
            return data[:at] + bytes(byte ^ 1 << random.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]
        case "bytes":
            return data[:at] + random.randbytes(random.randrange(1, 9)) + data[at + random.randrange(9) :]
        case "nul" | "nuls":
            return data[:at] + b"\0" * (1 if kind == "nul" else 512) + data[at:]
        case "repeat":
            lines = data.splitlines(True)
            return b"".join(line * random.choice([1, 1, 3]) for line in lines)
        case "encode":
            text = data.decode("utf-8", "replace")
            encodings = ["latin-1", "utf-16", "utf-16-le", "utf-32", "cp1252", "utf-7"]
            return text.encode(random.choice(encodings), "replace")
        case "swap":
            return data[at:] + data[:at]
        case _:
            return data[:at] + data[at + random.randrange(99) :]


def originals(folder: Path) -> dict[str, bytes]:
    rows = [{"text": f"Row {i}, é \U0001f600\n" * (i % 5), "n": i, "x": {"y": [1.5, None]}} for i in range(40)]
    table = pyarrow.table({"text": [row["text"] for row in rows], "n": [row["n"] for row in rows]})
    found = {
        ".txt": "Ein Satz.\nUnd noch einer, mit é und \U0001f600.\r\n".encode() * 20,
        ".jsonl": "".join(json.dumps(row, ensure_ascii=row["n"] % 2 == 0) + "\n" for row in rows).encode(),
    }
    for compression in ("none", "snappy"):
        path = folder / "original.parquet"
        pyarrow.parquet.write_table(table, path, compression=compression, row_group_size=9)
        found[f".{compression}.parquet"] = path.read_bytes()
        path.unlink()
    return found


def test_any_mutation_gives_documents_or_a_sentence(tmp_path):
    """Files damaged in all the ways that come to mind; a fixed seed, so that a failure comes back."""
    draw = random.Random(2024)
    files = originals(tmp_path)
    outcomes = {"read": 0, "refused": 0}
    for number, suffix in itertools.product(range(150), files):
        path = tmp_path / f"x{suffix}"
        data = files[suffix]
        for _ in range(draw.choice([1, 1, 2, 4])):
            data = mutated(draw, data)
        path.write_bytes(data)
        try:
            documents = read(path)
            assert documents and all(document.text.encode() and document.name[:2] == "x." for document in documents)
            outcomes["read"] += 1
        except ValueError as error:
            assert type(error) is ValueError, (number, suffix, error)
            assert re.fullmatch(r"read_documents: .*x\..*\.", str(error)), (number, suffix, error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50, outcomes  # neither is rare


@pytest.mark.parametrize("seed", range(5))
def test_any_folder_gives_documents_or_a_sentence(tmp_path, seed):
    """Folders with all faults among good files: passed over, every good file is there."""
    draw = random.Random(seed)
    good, faulty = {}, 0
    for number in range(60):
        folder = tmp_path / draw.choice(["", "a", "a/b", "c.txt"])
        folder.mkdir(parents=True, exist_ok=True)
        if draw.random() < 0.4:
            name, (content, _) = draw.choice(list(FAULTY.items()))
            if not os.path.lexists(folder / name):
                make(folder / name, content)
                faulty += 1
        elif draw.random() < 0.1:
            (folder / f"link{number}").symlink_to(draw.choice([tmp_path, folder]))
        else:
            path = folder / f"{number}.txt"
            path.write_text(str(number))
            good[path.relative_to(tmp_path).as_posix()] = str(number)
    with pytest.warns(UserWarning, match=f"passed over {faulty} "):
        documents = read(tmp_path, unreadable="pass")
    assert {document.name: document.text for document in documents} == good
    with pytest.raises(ValueError, match="^read_documents: .*, or pass over it"):
        read(tmp_path)
