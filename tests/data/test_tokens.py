"""Tokens on disk: what is written is what is read, whole or not at all, and reused by content."""

import json

import numpy as np
import pytest

from lineax_seq.data import (
    BPETokenizer,
    ByteTokenizer,
    Document,
    Tokens,
    open_tokens,
    prepare_corpus,
    read_documents,
    split_documents,
    tokenize_documents,
    write_tokens,
)

# The held-out ones, 20 and 40, have words of their own.
DOCUMENTS = [
    Document(f"{i}.txt", "zqzq " * 50 if i in (19, 39) else f"Document é number {i}.\n" * (i % 7 + 1))
    for i in range(45)
]


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "texts"
    source.mkdir()
    for document in DOCUMENTS:
        (source / f"{int(document.name[:-4]):02}.txt").write_text(document.text)
    return source


def texts_of(tokens: Tokens, tokenizer):
    bounds = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    documents = [tokens.ids[start:end] for start, end in bounds]
    assert all(document[0] == tokenizer.bos_id for document in documents)
    return [tokenizer.decode(document) for document in documents]


def test_written_tokens_are_the_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("lineax_seq.data._tokens._BATCH", 100)  # several batches, and an incomplete last one
    tokenizer = ByteTokenizer()
    tokens = write_tokens(DOCUMENTS, tokenizer, tmp_path / "new" / "tokens")
    assert tokens.ids.dtype == np.uint16 and not tokens.ids.flags.writeable
    assert texts_of(tokens, tokenizer) == [document.text for document in DOCUMENTS]
    num_bytes = sum(len(document.text.encode()) for document in DOCUMENTS)
    assert tokens.num_bytes == num_bytes and tokens.bytes_per_token == 1
    assert (tokens.num_documents, tokens.num_tokens) == (45, num_bytes + 45)
    again, memory = open_tokens(tmp_path / "new" / "tokens"), tokenize_documents(DOCUMENTS, tokenizer)
    for other in (again, memory):
        np.testing.assert_array_equal(other.ids, tokens.ids)
        np.testing.assert_array_equal(other.offsets, tokens.offsets)
        names = ("vocab_size", "bos_id", "pad_id", "num_bytes", "tokenizer")
        assert [getattr(other, name) for name in names] == [getattr(tokens, name) for name in names]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tokens"]


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size, bos_id = 70_000, 69_999

    tokens = write_tokens(DOCUMENTS[:2], Wide(), tmp_path / "tokens")
    assert tokens.ids.dtype == np.uint32 and tokens.ids[0] == 69_999


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    def documents():
        yield from DOCUMENTS[:3]
        raise error("stop")

    with pytest.raises(error, match="stop"):
        write_tokens(documents(), ByteTokenizer(), tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        write_tokens([], ByteTokenizer(), tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"has no meta\.json that can be read .*; write it with"):
        open_tokens(tmp_path)
    write_tokens(DOCUMENTS[:2], ByteTokenizer(), tmp_path / "tokens")
    with pytest.raises(ValueError, match="exists already"):
        write_tokens(DOCUMENTS, ByteTokenizer(), tmp_path / "tokens")
    with open(tmp_path / "tokens" / "tokens.bin", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(ValueError, match="damaged"):
        open_tokens(tmp_path / "tokens")
    meta = tmp_path / "tokens" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        open_tokens(tmp_path / "tokens")
    with pytest.raises(ValueError, match="no documents"):
        tokenize_documents([], ByteTokenizer())


def test_offsets_must_match_the_ids():
    rest = {"vocab_size": 9, "bos_id": 0, "pad_id": 0, "num_bytes": 3, "tokenizer": ""}
    for offsets in ([0, 2], [1, 4], [0, 2, 2, 4], [0]):
        with pytest.raises(ValueError, match="rise strictly from 0 to 4"):
            Tokens(ids=np.arange(4), offsets=np.array(offsets), **rest)
    with pytest.raises(ValueError, match="ids is float64.4., wants integers of one axis"):
        Tokens(ids=np.zeros(4), offsets=np.array([0, 4]), **rest)


@pytest.mark.parametrize("options", [{"tokenizer": "bytes"}, {"tokenizer": "bpe", "vocab_size": 270}])
def test_a_corpus_is_prepared_once(folder, tmp_path, options, monkeypatch):
    corpus = prepare_corpus(folder, tmp_path / "corpus", **options)
    train, heldout = split_documents(read_documents(folder))
    assert texts_of(corpus.train, corpus.tokenizer) == [document.text for document in train]
    assert texts_of(corpus.heldout, corpus.tokenizer) == [document.text for document in heldout]
    assert corpus.train.tokenizer == corpus.heldout.tokenizer == corpus.tokenizer.fingerprint
    if options["tokenizer"] == "bpe":
        expected = BPETokenizer.train([document.text for document in train], 270)  # never sees what is held out
        assert corpus.tokenizer.fingerprint == expected.fingerprint and corpus.train.bytes_per_token > 1.2

    monkeypatch.setattr("lineax_seq.data._corpus.write_labelled", None)  # a second tokenisation would fail
    again = prepare_corpus(folder, tmp_path / "corpus", **options)
    np.testing.assert_array_equal(again.train.ids, corpus.train.ids)
    assert again.recipe == corpus.recipe and again.tokenizer.fingerprint == corpus.tokenizer.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "texts"]


def test_a_corpus_of_something_else_is_not_reused(folder, tmp_path):
    prepare_corpus(folder, tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"something else: every was 20, now 10; choose .*overwrite=True"):
        prepare_corpus(folder, tmp_path / "corpus", every=10)
    (folder / "00.txt").write_text("changed")
    with pytest.raises(ValueError, match="something else: source was"):
        prepare_corpus(folder, tmp_path / "corpus")
    corpus = prepare_corpus(folder, tmp_path / "corpus", overwrite=True)
    assert texts_of(corpus.train, corpus.tokenizer)[0] == "changed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "texts"]


def test_a_folder_of_the_user_is_never_overwritten(folder, tmp_path):
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="not made by prepare_corpus"):
        prepare_corpus(folder, folder, overwrite=True)
    assert sorted(folder.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert prepare_corpus(folder, tmp_path / "empty").train.num_documents == 43


def test_own_held_out_documents(folder, tmp_path):
    (tmp_path / "valid.txt").write_text("held out")
    corpus = prepare_corpus(folder, tmp_path / "corpus", heldout_source=tmp_path / "valid.txt")
    assert texts_of(corpus.heldout, corpus.tokenizer) == ["held out"] and corpus.train.num_documents == 45
    with pytest.raises(ValueError, match="one or the other"):
        prepare_corpus(folder, tmp_path / "other", heldout_source=folder, every=10)


def test_two_processes_may_prepare_one_corpus(folder, tmp_path, monkeypatch):
    """The other finishes while this one still tokenises: its folder stands, and ours is removed."""
    from lineax_seq.data import _corpus

    write = _corpus.write_labelled

    def slow(*arguments, **options):
        write(*arguments, **options)
        monkeypatch.setattr(_corpus, "write_labelled", write)
        prepare_corpus(folder, tmp_path / "corpus")
        (tmp_path / "corpus" / "first").touch()

    monkeypatch.setattr(_corpus, "write_labelled", slow)
    assert prepare_corpus(folder, tmp_path / "corpus").train.num_documents == 43
    assert (tmp_path / "corpus" / "first").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "texts"]


def test_a_tokenizer_of_ones_own(folder, tmp_path):
    bpe = BPETokenizer.train(["to be or not to be, that is the question"], 260, progress=False)
    bpe.save(tmp_path / "tokenizer.json")
    by_path = prepare_corpus(folder, tmp_path / "corpus", tokenizer=tmp_path / "tokenizer.json")
    by_object = prepare_corpus(folder, tmp_path / "corpus", tokenizer=bpe)  # the same: reused
    assert by_path.tokenizer.fingerprint == by_object.tokenizer.fingerprint == bpe.fingerprint
    for options, message in (
        ({"tokenizer": "byte"}, "did you mean 'bytes'.* wants 'bytes', 'bpe', or the path"),
        ({"tokenizer": "bpe"}, "needs vocab_size="),
        ({"vocab_size": 300}, "for tokenizer='bpe' only"),
        ({"tokenizer": 5}, "tokenizer=5, wants"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_corpus(folder, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
