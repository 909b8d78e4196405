"""The loop: exact resume after a kill, a clean stop, a non-finite loss, profiles, the records it leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from training import stand_in

from lineax_seq.training import Checkpoints, NonFiniteError, Profile, RunLog, load_params, read_metrics


def losses(directory):
    records = [record for record in read_metrics(directory) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """20 steps in one go: (directory, final parameters)."""
    directory = tmp_path_factory.mktemp("whole")
    state, stopped_by = stand_in.run(directory, steps=20)
    assert stopped_by is None and int(state.step) == 20
    return directory, state.params


KILLED = """
import os, signal, sys
from pathlib import Path
from training import stand_in

def die(n):
    if n == 14:
        os.kill(os.getpid(), signal.SIGKILL)

stand_in.run(Path(sys.argv[1]), steps=20, batches=stand_in.Hooked(die))
"""


def send(number, at):
    """A hook that sends this process a signal when batch `at` is asked for."""
    return lambda n: signal.raise_signal(number) if n == at else None


def test_killed_run_resumes_bit_identical(tmp_path, whole_run):
    directory, params = whole_run
    paths = os.pathsep.join(str(p) for p in (Path(__file__).parents[2], Path(__file__).parents[1]))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 10 <= len(losses(tmp_path)) <= 13
    state, _ = stand_in.run(tmp_path, steps=20)
    assert losses(tmp_path) == losses(directory)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path, whole_run):
    stand_in.run(tmp_path, steps=20, batches=stand_in.Hooked(send(signal.SIGTERM, at=13)))
    unfinished = tmp_path / "checkpoints" / "15.orbax-checkpoint-tmp"
    (unfinished / "params").mkdir(parents=True)
    (unfinished / "params" / "_METADATA").write_text("{")
    state, _ = stand_in.run(tmp_path, steps=20)
    assert losses(tmp_path) == losses(whole_run[0])
    assert not unfinished.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_resumes_exactly(tmp_path, whole_run, number):
    handler = signal.getsignal(number)
    state, stopped_by = stand_in.run(tmp_path, steps=20, batches=stand_in.Hooked(send(number, at=8)))
    assert stopped_by == number and int(state.step) == 8
    assert signal.getsignal(number) is handler
    assert load_params(tmp_path / "checkpoints", stand_in.init_params())[0] == 8
    stand_in.run(tmp_path, steps=20)
    assert losses(tmp_path) == losses(whole_run[0])


def test_non_finite_loss_stops_names_the_leaf_and_keeps_the_last_good_checkpoint(tmp_path):
    """A bad parameter at step 5, where a checkpoint is due: it must not be saved."""

    def poisoned(state, batch, rate):
        if int(state.step) == 4:
            state.params["layers"]["kernel"] = state.params["layers"]["kernel"].at[0, 0, 0].set(np.nan)
        return stand_in.STEP(state, batch, rate)

    with pytest.raises(
        NonFiniteError, match=r"step 5.*parameter layers\.kernel.*last good checkpoint is step 4"
    ) as found:
        stand_in.run(tmp_path, steps=20, every=1, step_function=poisoned)
    assert (found.value.step, found.value.leaf) == (5, "parameter layers.kernel")
    assert len(losses(tmp_path)) == 4
    step, params = load_params(tmp_path / "checkpoints", stand_in.init_params())
    assert step == 4 and all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_batch_without_a_target_is_named(tmp_path):
    def empty(n):
        weights = np.zeros((stand_in.ROWS, stand_in.LENGTH), np.float32)
        return next(stand_in.iterator()) | {"loss_weights": weights}

    with pytest.raises(NonFiniteError, match="step 1.*no token to predict.*no checkpoint"):
        stand_in.run(tmp_path, steps=3, batches=stand_in.Hooked(empty))


def test_evaluations_are_logged_and_do_not_disturb_training(tmp_path, whole_run):
    seen = []

    def evaluate(params):
        seen.append(float(params["layers"]["norm"]["scale"].sum()))
        return {"eval_bits_per_byte": 1.5}

    stand_in.run(tmp_path, steps=20, evaluate=evaluate, eval_every=5)
    records = [r for r in read_metrics(tmp_path) if "eval_bits_per_byte" in r]
    assert [r["step"] for r in records] == [5, 10, 15] and len(set(seen)) == 3
    assert losses(tmp_path) == losses(whole_run[0])


def test_data_that_ends_early_is_told(tmp_path):
    with pytest.raises(ValueError, match="ended before step 3 of 20"):
        stand_in.run(tmp_path, steps=20, batches=iter([next(stand_in.iterator())] * 2), every=100)


@pytest.mark.filterwarnings("ignore:builtin type")  # of the profile reader's own types
def test_profile_writes_a_trace_of_the_asked_steps(tmp_path):
    profile = Profile.parse("3:5", tmp_path / "profile", start=0, steps=6)
    stand_in.run(tmp_path, steps=6, profile=profile)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))  # owns what its planes point into
    steps = {
        value
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for key, value in event.stats
        if key == "step_num"
    }
    assert steps == {3, 4}


@pytest.mark.parametrize("text", ["10", "a:b", "5:5", "4:9", "0:3", "1:3"])
def test_bad_profile_range_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="profile_steps"):
        Profile.parse(text, tmp_path, start=1, steps=7)


def test_log_is_plain_lines_without_a_terminal(tmp_path, capsys):
    stand_in.run(tmp_path, steps=3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 1/3  loss ") and lines[-1].startswith("step 3/3  loss ")
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_log_is_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    stand_in.run(tmp_path, steps=3, evaluate=lambda params: {"eval_bits_per_byte": 1.5}, eval_every=2)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "tokens/s" in shown and "step 2/3  eval_bits_per_byte 1.5000" in shown
    assert "step 1/3  loss" not in shown


def test_log_drops_records_after_the_checkpoint_and_a_cut_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    with RunLog(tmp_path, steps=9, start=1) as log:
        log.record(2, {"loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}]


def test_checkpoint_errors(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        load_params(tmp_path / "nowhere", stand_in.init_params())
    with pytest.raises(ValueError, match="no finished checkpoint"):
        load_params(tmp_path, stand_in.init_params())
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(tmp_path, every=0)
