"""Which files a folder gives: patterns, links, hidden files, and folders that look like files."""

import os
from pathlib import Path

import pytest

from lineax_seq.data import prepare_corpus, read_documents, source_fingerprint


def names(source, **options):
    return [document.name for document in read_documents(source, **options)]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.c", "b.txt", "src/a.c", "src/deep/er/b.c", "src/deep/c.h", "other/src/d.c", ".git/e.c", "src/.f.c"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    (tmp_path / "tree" / "rows.jsonl").write_text('{"text": "a row"}\n')
    return tmp_path / "tree"


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (None, ["b.txt", "rows.jsonl:1"]),
        ("*.c", ["a.c", "other/src/d.c", "src/a.c", "src/deep/er/b.c"]),
        ("*.[ch]", ["a.c", "other/src/d.c", "src/a.c", "src/deep/c.h", "src/deep/er/b.c"]),
        ("src/*.c", ["src/a.c"]),
        ("src/**/*.c", ["src/a.c", "src/deep/er/b.c"]),
        ("**/src/*.c", ["other/src/d.c", "src/a.c"]),
        ("src/**", ["src/a.c", "src/deep/c.h", "src/deep/er/b.c"]),
        ("src/*/*/b.c", ["src/deep/er/b.c"]),
        ("*.jsonl", ["rows.jsonl:1"]),  # still read as rows
        ("?.txt", ["b.txt"]),
    ],
)
def test_a_pattern_picks_the_files_of_a_folder(folder, pattern, expected):
    assert names(folder, files=pattern) == expected
    assert names([folder, folder / "b.txt"], files=pattern) == [*expected, "b.txt"]  # what is named is read


def test_everything(folder):
    assert len(names(folder, files="*")) == 7  # hidden ones never


def test_a_pattern_is_obeyed_or_refused(folder):
    with pytest.raises(ValueError, match=r"holds only files ending in .*wants at least one that fits files='\*.java'"):
        read_documents(folder, files="*.java")
    for source in ("sotu", folder / "b.txt", [folder / "b.txt"]):
        for function in (read_documents, source_fingerprint):
            with pytest.raises(ValueError, match="read_documents: files='[*].c' picks files of a folder.*leave it out"):
                function(source, files="*.c")
    for pattern in ("", "/a.c", "src//a.c", "src/", 5):
        with pytest.raises(ValueError, match=f"files={pattern!r}, wants a pattern such as"):
            read_documents(folder, files=pattern)
    with pytest.raises(ValueError, match=r"unreadable='ignore', wants one of \('refuse', 'pass'\)"):
        read_documents(folder, unreadable="ignore")
    for source in (5, b"x", None):
        with pytest.raises(ValueError, match=f"source={source!r}, wants a path"):
            read_documents(source)
    for source in ("the text itself\n" * 999, "a\0b"):
        with pytest.raises(ValueError, match="there is no file or folder"):
            read_documents(source)


def test_the_fingerprint_is_that_of_the_files_picked(folder):
    before = source_fingerprint(folder, files="*.c")
    assert before != source_fingerprint(folder) and before == source_fingerprint(folder, files="**/*.c")
    (folder / "b.txt").write_text("changed")
    assert source_fingerprint(folder, files="*.c") == before


def test_a_corpus_of_the_files_picked(folder, tmp_path):
    corpus = prepare_corpus(folder, tmp_path / "corpus", files="*.c", heldout_source=folder / "b.txt")
    assert (corpus.train.num_documents, corpus.heldout.num_documents) == (4, 1)
    with pytest.raises(ValueError, match="made from something else: source was"):
        prepare_corpus(folder, tmp_path / "corpus", heldout_source=folder / "b.txt")
    with pytest.raises(ValueError, match="prepare_corpus: files="):
        prepare_corpus(folder / "b.txt", tmp_path / "other", files="*.c")


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("tree/z/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    tree = tmp_path / "tree"
    (tree / "again").symlink_to(tree / "z")  # keeps the name of its own place
    (tree / "link").symlink_to(tmp_path / "elsewhere")
    (tree / "second").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "back").symlink_to(tree)  # a circle
    (tree / "z" / "self").symlink_to(".")
    (tree / "z" / "file.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    assert names(tree) == ["link/b.txt", "link/deep/c.txt", "z/a.txt", "z/file.txt"]
    assert len(source_fingerprint(tree)) == 64


def test_a_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / "x.txt").mkdir()
    (tmp_path / "x.txt" / "rows.jsonl").mkdir()
    (tmp_path / "x.txt" / "rows.jsonl" / "a.txt").write_text("inside")
    assert names(tmp_path) == ["x.txt/rows.jsonl/a.txt"]
    assert names(tmp_path / "x.txt") == ["rows.jsonl/a.txt"]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """Simulated, because root may list every folder."""
    for name in ("open/a.txt", "closed/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("text")
    scandir = os.scandir

    def scan(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(ValueError, match=r"the folder 'closed' cannot be listed \(Permission denied\)"):
        read_documents(tmp_path)
    with pytest.warns(UserWarning, match="passed over 1 .*'closed' cannot be listed"):
        assert names(tmp_path, unreadable="pass") == ["open/a.txt"]
