"""A damaged corpus is never used: it is made anew, with a word; and processes do each other no harm."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lineax_seq.data import ByteTokenizer, Document, _corpus, _directory, open_tokens, prepare_corpus, write_tokens

TEXT = "A line of words, é.\n" * 200


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def content(corpus):
    return [corpus.train.ids.tobytes(), corpus.heldout.ids.tobytes(), corpus.train.offsets.tolist(), corpus.recipe]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "nuls": lambda path: path.write_bytes(b"\0" * path.stat().st_size),  # what a power failure leaves
    "flipped": flip,
    "removed": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "nested": lambda path: path.write_text("[" * 200_000),
}


@pytest.mark.parametrize("name", sorted(_corpus._FILES))
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_corpus_is_made_anew(source, tmp_path, damage, name):
    before = content(prepare_corpus(source, tmp_path / "corpus"))
    DAMAGE[damage](tmp_path / "corpus" / name)
    with pytest.warns(UserWarning, match=r"^prepare_corpus: '.*corpus' is damaged \(.*\) and is made anew\.$") as said:
        again = prepare_corpus(source, tmp_path / "corpus")
    assert len(said) == 1 and said[0].filename == __file__ and name in str(said[0].message)
    assert content(again) == before == content(prepare_corpus(source, tmp_path / "corpus"))  # the last: without a word
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "text.txt"]


def test_half_a_folder_is_made_anew(source, tmp_path):
    """As an interrupted copy leaves it."""
    before = content(prepare_corpus(source, tmp_path / "corpus"))
    for name in ("corpus.json", "tokenizer.json", "heldout/meta.json", "heldout/offsets.bin"):
        (tmp_path / "corpus" / name).unlink()
    with pytest.warns(UserWarning, match="corpus.json is missing .* and is made anew"):
        assert content(prepare_corpus(source, tmp_path / "corpus")) == before


def test_what_others_put_into_the_folder_is_never_removed(source, tmp_path):
    prepare_corpus(source, tmp_path / "corpus")
    (tmp_path / "corpus" / "notes.txt").write_text("mine")
    prepare_corpus(source, tmp_path / "corpus")  # does not disturb
    flip(tmp_path / "corpus" / "train" / "tokens.bin")
    with pytest.raises(ValueError, match=r"to be made anew, but also holds \['notes.txt'\].*move these out"):
        prepare_corpus(source, tmp_path / "corpus")
    with pytest.raises(ValueError, match="also holds"):
        prepare_corpus(source, tmp_path / "corpus", every=10, overwrite=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "corpus.json").write_text('{"recipe": {}}')
    with pytest.raises(ValueError, match="was not made by prepare_corpus"):
        prepare_corpus(source, tmp_path / "own", overwrite=True)
    assert (tmp_path / "corpus" / "notes.txt").exists() and (tmp_path / "own" / "corpus.json").exists()


def test_a_folder_that_cannot_be_written(source, tmp_path):
    for directory, reason in (
        (source / "corpus", "Not a directory|File exists"),
        (source / "deeper" / "corpus", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(ValueError, match=f"^write_tokens: .* cannot be written .({reason})"):
            prepare_corpus(source, directory)
        with pytest.raises(ValueError, match=f"^write_tokens: .* cannot be written .({reason})"):
            write_tokens([Document("a", "a")], ByteTokenizer(), directory)
    with pytest.raises(ValueError, match="was not made by prepare_corpus"):
        prepare_corpus(source, source, overwrite=True)
    assert source.read_text() == TEXT


class FullDisk:
    """A stream whose disk is full after `left` bytes: what is written is held back until it is flushed, as usual."""

    def __init__(self, stream, left):
        self.stream, self.left, self.held = stream, left, 0

    def write(self, data):
        self.held += len(data)
        if self.held > 1000:
            self.flush()

    def flush(self):
        if self.held > self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self):
        self.stream.close()
        self.flush()


@pytest.mark.parametrize("left", [0, 500, 2000])
def test_a_full_disk(source, tmp_path, monkeypatch, left):
    from lineax_seq.data import _tokens

    full = lambda *arguments: FullDisk(open(*arguments), left)  # noqa: E731
    monkeypatch.setattr(_tokens, "open", full, raising=False)
    monkeypatch.setattr(_tokens, "_BATCH", 400)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\); free some space, or choose"):
        prepare_corpus(source, tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]  # and nothing takes space
    monkeypatch.undo()
    assert prepare_corpus(source, tmp_path / "corpus").train.num_documents == 1


PREPARE = """
import sys
from lineax_seq.data import ByteTokenizer, prepare_corpus
class Slow(ByteTokenizer):
    def encode_batch(self, texts):
        print("tokenising", flush=True)
        sys.stdin.readline()
        return super().encode_batch(texts)
corpus = prepare_corpus(sys.argv[1], sys.argv[2], tokenizer=Slow(), overwrite=True)
print(corpus.train.num_tokens + corpus.heldout.num_tokens)
"""


def start(source, directory, count):
    command = [sys.executable, "-c", PREPARE, source, directory]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]
    assert [process.stdout.readline() for process in processes] == ["tokenising\n"] * count
    return processes


def test_processes_killed_and_at_once(source, tmp_path):
    """One is killed half way and leaves a folder that nobody uses. Another and this one prepare it at once."""
    killed, other = start(source, tmp_path / "corpus", 2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "corpus").exists()
    expected = len(TEXT.encode()) + 2
    here = prepare_corpus(source, tmp_path / "corpus", overwrite=True)  # the other is half way
    out, _ = other.communicate("\n" * 9)
    assert (other.returncode, out.split()[-1]) == (0, str(expected))
    assert here.train.num_tokens + here.heldout.num_tokens == expected
    left = [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    assert len(left) == 1  # the killed one's
    corpus = prepare_corpus(source, tmp_path / "corpus")
    assert corpus.train.num_tokens + corpus.heldout.num_tokens == expected
    flip(tmp_path / "corpus" / "corpus.json")
    day = time.time() - 25 * 3600
    for path in (left[0], *left[0].rglob("*")):
        os.utime(path, (day, day))
    with pytest.warns(UserWarning, match="made anew"):
        prepare_corpus(source, tmp_path / "corpus")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "text.txt"]


def test_a_process_that_is_late_leaves_the_others_corpus(source, tmp_path, monkeypatch):
    """Both found it damaged, or of another recipe; the late one does not replace what the first one made."""
    prepare_corpus(source, tmp_path / "corpus", every=10)
    write = _corpus.write_labelled

    def slow(*arguments, **options):
        write(*arguments, **options)
        monkeypatch.setattr(_corpus, "write_labelled", write)
        prepare_corpus(source, tmp_path / "corpus", overwrite=True)
        (tmp_path / "corpus" / "first").touch()

    monkeypatch.setattr(_corpus, "write_labelled", slow)
    corpus = prepare_corpus(source, tmp_path / "corpus", overwrite=True)
    assert (tmp_path / "corpus" / "first").exists() and corpus.recipe["every"] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "text.txt"]


def test_a_folder_replaced_by_another_process_stays_open(source, tmp_path):
    corpus = prepare_corpus(source, tmp_path / "corpus")
    before = content(corpus)
    source.write_text("other words " * 300)
    assert content(prepare_corpus(source, tmp_path / "corpus", overwrite=True)) != before == content(corpus)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["meta.json", "offsets.bin", "tokens.bin"])
def test_open_tokens_refuses_in_one_sentence(tmp_path, damage, name):
    tokens = write_tokens([Document("a", TEXT), Document("b", "b")], ByteTokenizer(), tmp_path / "tokens")
    before = tokens.ids.tobytes()
    DAMAGE[damage](tmp_path / "tokens" / name)
    if name == "tokens.bin" and damage in ("nuls", "flipped"):  # not read: that would take as long as the corpus is big
        assert len(open_tokens(tmp_path / "tokens").ids.tobytes()) == len(before)
        return
    with pytest.raises(ValueError, match=r"^open_tokens: '.*tokens' (is damaged|has no|has format).*(again|corpus)\.$"):
        open_tokens(tmp_path / "tokens")


@pytest.mark.parametrize(
    "field, value", [("num_tokens", "5"), ("num_documents", None), ("dtype", "<f4"), ("dtype", [1]), ("tokenizer", 5)]
)
def test_a_field_of_another_kind(tmp_path, field, value):
    write_tokens([Document("a", TEXT)], ByteTokenizer(), tmp_path / "tokens")
    meta = json.loads((tmp_path / "tokens" / "meta.json").read_text()) | {field: value}
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=f"is damaged: meta.json has no good {field}; remove the folder"):
        open_tokens(tmp_path / "tokens")


def test_a_temporary_folder_of_the_same_name_pattern_is_ours_alone(tmp_path):
    """Only the names that we give are removed, and only when nothing was written there for a day."""
    old = time.time() - 2 * 24 * 3600
    names = [".corpus.0123456789ab.partial", ".corpus.0123456789.partial", ".other.0123456789ab.partial", ".corpus.new"]
    for name in [*names, ".corpus.ba9876543210.partial"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").write_bytes(b"x")
        os.utime(tmp_path / name / "tokens.bin", (old, old))
        os.utime(tmp_path / name, (old, old))
    (tmp_path / ".corpus.ba9876543210.partial" / "tokens.bin").write_bytes(b"xy")  # still written to
    with _directory.new_directory(tmp_path / "corpus"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*names[1:], ".corpus.ba9876543210.partial", "corpus"]
    )


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numbers_of_any_integer_kind(source, tmp_path, kind):
    corpus = prepare_corpus(source, tmp_path / "corpus", every=kind(30), heldout_from_year=np.int64(2009))
    again = prepare_corpus(source, tmp_path / "corpus", every=30, heldout_from_year=2009)
    assert content(again) == content(corpus)
    options = {"tokenizer": "bpe", "vocab_size": np.int64(260)}
    assert prepare_corpus(source, tmp_path / "bpe", **options).tokenizer.vocab_size == 260
    for every in (1, 2.5, True, "20", None):
        with pytest.raises(ValueError, match=f"prepare_corpus: every={every!r}, wants an integer of at least 2"):
            prepare_corpus(source, tmp_path / "corpus", every=every)
