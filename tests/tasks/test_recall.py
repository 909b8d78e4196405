"""Associative recall: what a row asks, rows of several processes, a run that learns, its report."""

import json
from itertools import islice

import numpy as np
import pytest

from experiments import train_recall
from lineax_seq.tasks import HybridConfig, RecallConfig, RecallData, RecallTask, recall_row
from lineax_seq.training import Reading, Run, parse_flags, read_metrics

DATA = RecallData(length=24, vocabulary=16, pairs=(2, 5), heldout_rows=64)


def task(**model):
    model = dict(vocab_size=16, d_model=32, num_layers=2, pattern="L", linear_layer="delta_net", num_heads=2) | model
    return RecallTask(RecallConfig(model=HybridConfig(**model), data=DATA))


@pytest.mark.parametrize("pairs", [1, 5, 6])
def test_every_query_has_been_answered_before(pairs):
    for seed in range(20):
        row = recall_row(DATA, pairs, np.random.default_rng(seed))
        inputs, asked = row["inputs"].tolist(), np.flatnonzero(row["loss_weights"])
        memory = dict(zip(inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2], strict=True))
        assert len(memory) == len(set(memory.values())) == len(asked) == pairs
        assert all(1 <= key < 8 <= value < 16 for key, value in memory.items())
        assert (asked >= 2 * pairs).all()
        assert [memory[inputs[t]] for t in asked] == row["targets"][asked].tolist()
        others = np.delete(row["inputs"], [*range(2 * pairs), *asked])
        assert not others.any() and not np.delete(row["targets"], asked).any()


def test_processes_read_different_rows_of_one_order_and_columns_of_them():
    def rows(reading, count):
        iterator = task().batches(3, reading)
        found = [np.array(batch["inputs"]) for batch in islice(iter(lambda: next(iterator), None), count)]
        iterator.close()
        return found

    (whole,) = rows(Reading(8), 1)
    halves = [rows(Reading(4, process, 2), 1)[0] for process in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([h[:, None] for h in halves], 1).reshape(8, -1), whole)
    (stretch,) = rows(Reading(8, columns=slice(6, 18)), 1)
    np.testing.assert_array_equal(stretch, whole[:, 6:18])


def test_evaluation_rows_are_the_same_over_processes_and_unknown_to_training():
    held = np.concatenate([b["inputs"] for b in task()._heldout(5, 64, Reading(8))])
    parts = [[b["inputs"] for b in task()._heldout(5, 64, Reading(4, process, 2))] for process in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([x for pair in zip(*parts, strict=True) for x in pair]), held)
    iterator = task().batches(0, Reading(64))
    trained = {row.tobytes() for row in next(iterator)["inputs"]}
    iterator.close()
    assert len(trained) == 64 and not trained & {row.tobytes() for row in held}


def test_position_is_kept():
    first, again = (task().batches(3, Reading(4)) for _ in range(2))
    next(first)
    state = json.loads(json.dumps(first.get_state()))
    wanted = next(first)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["inputs"], wanted["inputs"])
    first.close(), again.close()


def test_a_small_decoder_learns_it(tmp_path, capsys):
    flags = [
        *("--model.vocab-size", "16", "--data.vocabulary", "16", "--data.length", "16", "--data.pairs", "1", "3"),
        *("--model.d-model", "32", "--model.num-layers", "1", "--data.heldout-rows", "64"),
        *("--training.steps", "120", "--training.batch-size", "16", "--training.eval-every", "60"),
        *("--optimizer.learning-rate", "0.03", "--run-dir", str(tmp_path / "run")),
    ]
    assert train_recall.main(flags) == 0
    records = [r for r in read_metrics(tmp_path / "run") if "eval_accuracy_1" in r]
    assert [r["step"] for r in records] == [60, 120] and records[-1]["eval_accuracy_1"] > 0.9
    steps = [r for r in read_metrics(tmp_path / "run") if "accuracy" in r]
    assert len(steps) == 120 and steps[0]["accuracy"] < 0.3 < 0.8 < steps[-1]["accuracy"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["accuracy"] == {"1": records[-1]["eval_accuracy_1"], "3": records[-1]["eval_accuracy_3"]}
    assert (tmp_path / "run" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert "pairs  accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(pairs=(2, 7)), r"pairs is \(2, 7\); rows of 24 tokens of 16 ids hold 1 to 6 pairs"),
        (dict(pairs=()), "there must be a number of them"),
        (dict(power=2.0), "power is 2.0"),
        (dict(length=0, vocabulary=2), "length is 0.*vocabulary is 2"),
    ],
)
def test_rows_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RecallData(**{"length": 24, "vocabulary": 16, "pairs": (2,)} | fields)
    with pytest.raises(ValueError, match="make them equal"):
        RecallConfig(model=HybridConfig(vocab_size=17, d_model=16, num_layers=1, pattern="L"), data=DATA)


@pytest.mark.slow
def test_a_run_over_a_mesh_is_the_same(tmp_path):
    """Rows over two devices and time over four."""
    flags = ["--training.steps", "3", "--training.batch-size", "4", "--training.eval-every", "None"]
    for name, mesh in (("one", []), ("mesh", ["--mesh", "data=2,seq=4"])):
        more = [*flags, *mesh, "--run-dir", str(tmp_path / name)]
        config = parse_flags(train_recall.DEFAULT, more, program="", description="")
        Run(config, RecallTask(config)).train()
    curves = [[r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("one", "mesh")]
    np.testing.assert_allclose(*curves, rtol=1e-5)
