"""Rows: hand-made examples in full, and that no token is lost or predicted twice."""

import numpy as np
import pytest

from lineax_seq.data import PackedSource, Tokens, WindowSource
from lineax_seq.data._sources import best_fit

BOS, P = 0, 65_000  # P: padding


def make_tokens(*lengths: int) -> Tokens:
    """Documents of the given lengths, separator included; every text token is its own position in the stream."""
    offsets = np.cumsum([0, *lengths])
    ids = np.arange(offsets[-1]).astype(np.uint16)
    ids[offsets[:-1]] = BOS
    rest = {"vocab_size": 2**16, "bos_id": BOS, "pad_id": P, "num_bytes": int(offsets[-1]), "tokenizer": ""}
    return Tokens(ids=ids, offsets=offsets, **rest)


def check(row, **expected):
    for key, value in expected.items():
        np.testing.assert_array_equal(row[key], value, err_msg=key)


def test_windows_over_the_stream():
    #         0  1  2 | 3  4  5  6  7 | 8  9
    source = WindowSource(make_tokens(3, 5, 2), 4)
    assert len(source) == 3 and source.num_targets == 9
    ones = {"segment_ids": [1] * 4, "positions": [0, 1, 2, 3], "loss_weights": [1] * 4}
    check(source[0], inputs=[BOS, 1, 2, BOS], targets=[1, 2, BOS, 4], **ones)
    check(source[1], inputs=[4, 5, 6, 7], targets=[5, 6, 7, BOS], **ones)
    check(source[2], inputs=[BOS, P, P, P], targets=[9, P, P, P])
    check(source[2], segment_ids=[1, 0, 0, 0], positions=[0] * 4, loss_weights=[1, 0, 0, 0])


def test_windows_with_a_segment_for_each_document():
    source = WindowSource(make_tokens(3, 5, 2), 4, segment_documents=True)
    assert len(source) == 3 and source.num_targets == 7
    check(source[0], inputs=[BOS, 1, 2, BOS], targets=[1, 2, BOS, 4])
    check(source[0], segment_ids=[1, 1, 1, 2], positions=[0, 1, 2, 0], loss_weights=[1, 1, 0, 1])
    check(source[1], inputs=[4, 5, 6, 7], targets=[5, 6, 7, BOS])  # starts inside a document, ends before one
    check(source[1], segment_ids=[1] * 4, positions=[0, 1, 2, 3], loss_weights=[1, 1, 1, 0])
    check(source[2], segment_ids=[1, 0, 0, 0], positions=[0] * 4, loss_weights=[1, 0, 0, 0])
    tiny = WindowSource(make_tokens(1, 1, 1, 2, 1), 4, segment_documents=True)  # documents without text among them
    check(tiny[0], segment_ids=[1, 2, 3, 4], positions=[0] * 4, loss_weights=[0, 0, 0, 1])
    check(tiny[1], segment_ids=[1, 0, 0, 0], loss_weights=[0] * 4)


def test_packed_rows():
    #                    0  1  2 | 3  4  5  6  7  8  9 | 10 11 | 12
    source = PackedSource(make_tokens(3, 7, 2, 1), 4)
    # places: 2, 4 + 2, 1, none  ->  [4], [2, 2], [1]
    assert len(source) == 3 and source.num_targets == 9 and source.density == 9 / 12
    check(source[0], inputs=[BOS, 4, 5, 6], targets=[4, 5, 6, 7], segment_ids=[1] * 4, positions=[0, 1, 2, 3])
    check(source[1], inputs=[BOS, 1, 7, 8], targets=[1, 2, 8, 9], segment_ids=[1, 1, 2, 2], positions=[0, 1, 0, 1])
    check(source[2], inputs=[BOS, P, P, P], targets=[11, P, P, P], segment_ids=[1, 0, 0, 0], positions=[0] * 4)
    for i, weights in enumerate(([1] * 4, [1] * 4, [1, 0, 0, 0])):
        check(source[i], loss_weights=weights)


def random_tokens(seed):
    rng = np.random.default_rng(seed)
    return make_tokens(*np.minimum(rng.geometric(0.05, 60), 90).tolist(), 1, 1, 33, 34, 65)


SOURCES = {
    "windows": WindowSource,
    "segmented windows": lambda tokens, length: WindowSource(tokens, length, segment_documents=True),
    "packed": PackedSource,
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("length", [1, 7, 32, 2000])
def test_every_token_is_predicted_exactly_once(kind, length):
    tokens = random_tokens(length) if length < 2000 else make_tokens(*[100] * 21)
    source = SOURCES[kind](tokens, length)
    dtypes = {"inputs": "i4", "targets": "i4", "segment_ids": "i4", "positions": "i4", "loss_weights": "f4"}
    predicted, separators = [], 0
    for i in range(len(source)):
        row = source[i]
        assert {key: value.dtype.str[1:] for key, value in row.items()} == dtypes
        assert all(value.shape == (length,) for value in row.values())
        segments, weights = row["segment_ids"], row["loss_weights"]
        used = int((segments > 0).sum())
        assert used and set(np.unique(weights)) <= {0, 1}
        check(row, segment_ids=np.pad(np.sort(segments[:used]), (0, length - used)))  # 1 2 3 ..., then padding
        assert segments[0] == 1 and set(np.unique(np.diff(segments[:used]))) <= {0, 1}
        assert not weights[used:].any() and (row["inputs"][used:] == P).all() and (row["targets"][used:] == P).all()
        new = np.concatenate([[True], np.diff(segments[:used]) > 0])
        starts = np.maximum.accumulate(np.where(new, np.arange(used), 0))
        check(row, positions=np.pad(np.arange(used) - starts, (0, length - used)))
        if kind != "windows":  # a segment is one document: its separator is at the start or nowhere
            assert not ((row["inputs"][:used] == BOS) & ~new).any()
        text = row["targets"][weights == 1]
        separators += (text == BOS).sum()
        text_positions = (weights == 1) & (row["targets"] != BOS) & (row["inputs"] != BOS)
        assert (row["targets"] - row["inputs"] == 1)[text_positions].all()  # the next token of the same document
        predicted.append(text[text != BOS])
    predicted = np.sort(np.concatenate(predicted))
    text_ids = np.setdiff1d(np.arange(tokens.num_tokens), tokens.offsets[:-1])
    np.testing.assert_array_equal(predicted, text_ids)
    assert separators == (tokens.num_documents - 1 if kind == "windows" else 0)
    assert source.num_targets == len(predicted) + separators


def test_short_documents_share_a_row_whole():
    tokens = make_tokens(*np.random.default_rng(0).integers(2, 17, 400).tolist())
    source = PackedSource(tokens, 16)
    begun = sum(int((source[i]["inputs"] == BOS).sum()) for i in range(len(source)))
    segments = sum(int(source[i]["segment_ids"].max()) for i in range(len(source)))
    assert begun == segments == 400  # none is cut
    assert source.density == np.mean([source[i]["loss_weights"] for i in range(len(source))])


def naive_best_fit(sizes, capacity):
    """How much is in each row, by a plain search for the fullest row that still has room."""
    rows = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, used in enumerate(rows) if used + size <= capacity]
        if fitting:
            rows[max(fitting, key=lambda i: rows[i])] += size
        else:
            rows.append(size)
    return sorted(rows)


@pytest.mark.parametrize("capacity", [1, 10, 100])
def test_the_plan_is_best_fit(capacity):
    sizes = np.random.default_rng(capacity).integers(1, capacity + 1, 300)
    rows = best_fit(sizes, capacity)
    assert sorted(np.concatenate(rows)) == list(range(300))
    assert sorted(sum(sizes[i] for i in row) for row in rows) == naive_best_fit(sizes.tolist(), capacity)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("length", [7, 100])  # a row of more than 64 places has no bit in NumPy's integers
def test_a_length_of_numpy_is_a_length(kind, length):
    tokens = random_tokens(0)
    expected = SOURCES[kind](tokens, length)
    source = SOURCES[kind](tokens, np.int64(length))
    assert len(source) == len(expected)
    for i in range(len(source)):
        check(source[np.int32(i)], **expected[i])


def test_tokens_of_lists():
    rest = {"vocab_size": 9, "bos_id": 0, "pad_id": 0, "num_bytes": 3, "tokenizer": ""}
    tokens = Tokens(ids=[0, 5, 6, 0, 7], offsets=[0, 3, 5], **rest)
    check(WindowSource(tokens, 4)[0], inputs=[0, 5, 6, 0], targets=[5, 6, 0, 7])
    with pytest.raises(ValueError, match=r"ids is int64\[1, 2\], wants integers of one axis"):
        Tokens(ids=[[0, 5]], offsets=[0, 2], **rest)


def test_bad_options_are_refused():
    tokens = make_tokens(3, 5)
    assert len(WindowSource(tokens, 7)) == 1
    with pytest.raises(ValueError, match="8 tokens are too few for one window of length=8 .*shorter length"):
        WindowSource(tokens, 8)
    for source in SOURCES.values():
        for length in (0, -1, 2.0, "8", True):
            with pytest.raises(ValueError, match=f"length={length!r}, wants an integer of at least 1"):
                source(tokens, length)
        for index in (-1, 10_000):
            with pytest.raises(IndexError):
                source(tokens, 2)[index]
    with pytest.raises(ValueError, match="no document has a token after its separator"):
        PackedSource(make_tokens(1, 1), 4)
