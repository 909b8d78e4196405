"""Batches: order, shards, exact resume, evaluation, and a quiet log."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lineax_seq.data import (
    ByteTokenizer,
    Document,
    PackedSource,
    WindowSource,
    eval_batches,
    tokenize_documents,
    train_iterator,
)

LENGTH = 8
RNG = np.random.default_rng(0)
TOKENS = tokenize_documents(
    [Document(str(i), "".join(map(chr, RNG.integers(97, 123, n)))) for i, n in enumerate(RNG.integers(1, 40, 30))],
    ByteTokenizer(),
)
SOURCES = {
    "windows": WindowSource(TOKENS, LENGTH, segment_documents=True),
    "packed": PackedSource(TOKENS, LENGTH),
}


@pytest.fixture(params=SOURCES)
def source(request):
    return SOURCES[request.param]


class Numbered:
    """Rows that carry their own number, to see the order."""

    def __init__(self, count):
        self.count, self.length, self.tokens = count, 1, TOKENS

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"inputs": np.array([index], np.int32)}


def order(iterator, batches):
    return [next(iterator)["inputs"][:, 0].tolist() for _ in range(batches)]


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def test_columns_are_a_stretch_of_every_row(source):
    """Two processes that share rows, each with its half of them, as of a row whose time is split over devices."""
    halves = slice(0, LENGTH // 2), slice(LENGTH // 2, LENGTH)
    batches = [train_iterator(source, batch_size=3, seed=5, columns=columns) for columns in (None, *halves)]
    for _ in range(3):
        whole, left, right = (next(iterator) for iterator in batches)
        same({key: np.concatenate([left[key], right[key]], 1) for key in whole}, whole)
    assert len({json.dumps(iterator.get_state()) for iterator in batches}) == 1
    whole, left, right = (eval_batches(source, 2, columns=columns) for columns in (None, *halves))
    same({key: np.concatenate([left[-1][key], right[-1][key]], 1) for key in whole[-1]}, whole[-1])


@pytest.mark.parametrize("process_count", [1, 2])
def test_resume_is_exact_at_fifty_points(source, process_count):
    options = {"batch_size": 3, "seed": 5, "process_index": process_count - 1, "process_count": process_count}
    assert len(source) // 3 < 50  # so that resuming crosses epochs
    straight = train_iterator(source, **options)
    states, batches = [], []
    for _ in range(54):
        states.append(json.dumps(straight.get_state()))
        batches.append(next(straight))
    straight.close()
    for point in range(50):
        resumed = train_iterator(source, **options)
        resumed.set_state(json.loads(states[point]))
        for batch in batches[point : point + 4]:
            same(next(resumed), batch)
        assert json.loads(json.dumps(resumed.get_state())) == json.loads(states[point + 4])
        resumed.close()


def test_a_used_iterator_goes_back_too(source):
    iterator = train_iterator(source, batch_size=3, seed=5)
    first = next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(4)]
    iterator.set_state(state)
    for batch in expected:
        same(next(iterator), batch)
    assert not np.array_equal(first["inputs"], expected[0]["inputs"])


@pytest.mark.parametrize("threads", [{"num_threads": 0}, {"num_threads": 3, "prefetch": 7}])
def test_threads_do_not_change_the_order(source, threads):
    plain, threaded = (
        train_iterator(source, batch_size=4, seed=1),
        train_iterator(source, batch_size=4, seed=1, **threads),
    )
    for _ in range(30):
        same(next(plain), next(threaded))


def test_every_epoch_holds_each_row_once_in_its_own_order():
    iterator = train_iterator(Numbered(60), batch_size=4, seed=3)
    epochs = [sum(order(iterator, 15), []) for _ in range(3)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(epoch != sorted(epoch) for epoch in epochs)


def test_the_shuffle_is_global():
    first = np.array(sum(order(train_iterator(Numbered(1000), batch_size=10, seed=0), 20), []))
    assert np.histogram(first, bins=4, range=(0, 1000))[0].min() > 25  # 50 expected of each quarter


def test_seeds_give_unrelated_orders():
    epochs = set()
    for seed in range(4):
        iterator = train_iterator(Numbered(40), batch_size=4, seed=seed)
        epochs |= {tuple(sum(order(iterator, 10), [])) for _ in range(4)}
    assert len(epochs) == 16  # Grain's own seeds 0 1 2 3 would share most of these


def test_without_shuffle_rows_come_in_order():
    iterator = train_iterator(Numbered(5), batch_size=2, seed=0, shuffle=False)
    assert order(iterator, 5) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


@pytest.mark.parametrize("count", [24, 25, 31])
def test_shards_are_disjoint_and_together_the_single_process_epoch(count):
    """Step by step: the processes' rows of a step are the rows of that step of one process with the whole batch."""
    single = train_iterator(Numbered(count), batch_size=4, seed=7, num_epochs=3)
    shards = [
        train_iterator(Numbered(count), batch_size=2, seed=7, num_epochs=3, process_index=i, process_count=2)
        for i in range(2)
    ]
    whole = [batch["inputs"][:, 0].tolist() for batch in single]
    parts = [[batch["inputs"][:, 0].tolist() for batch in shard] for shard in shards]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 3 * count // 4
    for rows, left, right in zip(whole, *parts, strict=True):
        assert sorted(left + right) == sorted(rows)
    first_epoch = [sum(part, [])[: count // 2] for part in parts]
    assert not set(first_epoch[0]) & set(first_epoch[1])
    assert len(set(first_epoch[0] + first_epoch[1])) == 2 * (count // 2)


def test_shards_of_real_rows(source):
    options = {"batch_size": 1, "seed": 2, "num_epochs": 1}
    single = [batch["targets"].tobytes() for batch in train_iterator(source, **options)]
    shards = [
        [batch["targets"].tobytes() for batch in train_iterator(source, **options, process_index=i, process_count=2)]
        for i in range(2)
    ]
    assert [row for pair in zip(*shards, strict=True) for row in pair] == single[: 2 * len(shards[0])]


def test_numbers_of_numpy_are_numbers(source):
    options = {"batch_size": 2, "seed": 3, "num_epochs": 2, "num_threads": 1, "prefetch": 2, "process_count": 2}
    batches = train_iterator(source, **options)
    others = train_iterator(source, **{name: np.int64(value) for name, value in options.items()})
    for batch, other in zip(batches, others, strict=True):
        same(batch, other)
        assert json.dumps(batches.get_state()) == json.dumps(others.get_state())
    same(
        eval_batches(source, np.int32(2), process_count=np.int8(2))[np.int64(1)],
        eval_batches(source, 2, process_count=2)[1],
    )


def test_a_number_of_epochs_ends():
    assert len(order_all := list(train_iterator(Numbered(10), batch_size=4, seed=0, num_epochs=2))) == 5
    rows = sum((batch["inputs"][:, 0].tolist() for batch in order_all), [])
    assert sorted(rows) == sorted([*range(10)] * 2)
    assert len(list(train_iterator(Numbered(10), batch_size=4, seed=0, num_epochs=1))) == 2  # two rows left over


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_holds_every_row_once(source, batch_size, process_count):
    shards = [
        eval_batches(source, batch_size, process_index=i, process_count=process_count) for i in range(process_count)
    ]
    assert len({len(shard) for shard in shards}) == 1
    batches = [batch for step in zip(*shards, strict=True) for batch in step]
    for batch in batches:
        assert all(value.shape == (batch_size, LENGTH) for value in batch.values())
    rows = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    for i in range(len(source)):
        same({key: value[i] for key, value in rows.items()}, source[i])
    for key, filler in (("loss_weights", 0), ("segment_ids", 0), ("inputs", TOKENS.pad_id), ("targets", TOKENS.pad_id)):
        assert (rows[key][len(source) :] == filler).all()
    assert rows["loss_weights"].sum() == source.num_targets
    text = rows["targets"][rows["loss_weights"] > 0]
    assert sorted(text) == sorted(TOKENS.ids[TOKENS.ids != TOKENS.bos_id])


def test_evaluation_is_a_sequence():
    batches = eval_batches(SOURCES["packed"], 3)
    same(batches[-1], batches[len(batches) - 1])
    assert len(batches[1:3]) == 2 and len(list(batches)) == len(batches)
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size=0, wants an integer of at least 1"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"batch_size": True}, "batch_size=True, wants an integer"),
        ({"seed": -1}, "seed=-1"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"num_threads": -1}, "num_threads=-1"),
        ({"num_threads": 4, "prefetch": 2}, "prefetch=2, wants an integer of at least 4"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 of process_count=2"),
        ({"process_count": 0}, "process_count=0"),
        ({"batch_size": 100, "num_epochs": 1}, "wants at least 100 for one batch of 100 on 1 process"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"train_iterator: .*{message}"):
        train_iterator(Numbered(10), **{"batch_size": 2, "seed": 0} | options)
    if "seed" not in options and options.keys() <= {"batch_size", "process_index", "process_count"}:
        with pytest.raises(ValueError, match=f"eval_batches: .*{message}"):
            eval_batches(Numbered(10), **{"batch_size": 2} | options)


def test_a_user_sees_no_noise():
    """Warnings as errors, and nothing on either stream: Grain's and absl's notes stay out of a training log."""
    code = """
from lineax_seq.data import *
documents = [Document(str(i), "some text " * 9) for i in range(9)]
for source in (WindowSource, PackedSource):
    rows = source(tokenize_documents(documents, ByteTokenizer()), 16)
    it = train_iterator(rows, batch_size=2, seed=0)
    for _ in range(40): next(it)
    it.set_state(it.get_state()); next(it)
    for batch in train_iterator(rows, batch_size=2, seed=0, num_epochs=1): pass
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
