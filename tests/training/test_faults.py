"""What a power cut, a full disk and a damaged file leave behind, and that a run goes on from there."""

import errno
import gc
import json
import os
import shutil

import jax
import numpy as np
import pytest
from training import stand_in

from lineax_seq.training import Checkpoints, RunLog, check_place, load_params, read_metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """10 steps with checkpoints after 5 and 10: (directory, losses)."""
    directory = tmp_path_factory.mktemp("whole")
    stand_in.run(directory, steps=10)
    return directory, [record["loss"] for record in read_metrics(directory)]


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


DAMAGE = [
    b"\0" * 64 + b"\n",
    b"\0" * 64,
    b'{"step": 3, "lo',
    b'{"step": 3, "lo\n',
    b"\xff\xfe\x00garbage\n",
    b"[1]\n3\n",
]


@pytest.mark.parametrize("line", DAMAGE)
def test_damaged_lines_of_the_metrics_are_left_out(tmp_path, line):
    records = [{"step": n, "loss": float(n)} for n in (1, 2, 3)]
    good = [json.dumps(record).encode() + b"\n" for record in records]
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(good[0] + good[1] + line)
    assert read_metrics(tmp_path) == records[:2]
    if line.endswith(b"\n") or not line.strip(b"\0"):  # and what came after them is kept
        file.write_bytes(good[0] + line + good[1])
        assert read_metrics(tmp_path) == records[:2]
    with RunLog(tmp_path, steps=3, start=2) as log:
        log.record(3, {"loss": 3.0})
    assert read_metrics(tmp_path) == records and b"\0" not in file.read_bytes()


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def newest(checkpoint, part):
    """The largest file of the arrays of a part of a checkpoint."""
    return max((checkpoint / part / "ocdbt.process_0" / "d").iterdir(), key=lambda file: file.stat().st_size)


DAMAGES = {
    "without parameters": lambda c: shutil.rmtree(c / "params"),
    "without optimizer": lambda c: shutil.rmtree(c / "rest"),
    "without position": lambda c: shutil.rmtree(c / "data"),
    "position cut": lambda c: cut(c / "data" / "position.json"),
    "index cut": lambda c: cut(c / "params" / "manifest.ocdbt"),
    "description missing": lambda c: (c / "rest" / "_METADATA").unlink(),
    "arrays cut": lambda c: cut(newest(c, "rest")),
    "parameters empty": lambda c: os.truncate(newest(c, "params"), 0),
}


@pytest.fixture
def leftovers():
    """A read that fails leaves tasks of the library's event loop behind; they are collected before the test ends."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_newest_whole_checkpoint_is_taken_and_said(run, whole, damage, leftovers):
    damage(run / "checkpoints" / "10")
    state, notes = stand_in.init_state(stand_in.init_params(), stand_in.TRANSFORM, seed=3), []
    batches = stand_in.iterator()
    with Checkpoints(run / "checkpoints", every=5) as checkpoints:
        state = checkpoints.restore(state, batches, notes.append)
        assert int(state.step) == 5 and checkpoints.latest == 5
    (note,) = notes
    assert note.startswith("the checkpoint of step 10 is damaged") and str(run / "damaged" / "10") in note
    assert (run / "damaged" / "10").is_dir() and not (run / "checkpoints" / "10").exists()
    stand_in.run(run, steps=10)  # saves step 10 again
    assert [record["loss"] for record in read_metrics(run)] == whole[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_parameters_are_read_from_the_newest_whole_checkpoint(run, leftovers):
    DAMAGES["without parameters"](run / "checkpoints" / "10")
    assert load_params(run / "checkpoints", stand_in.init_params())[0] == 5
    with pytest.raises(ValueError, match="no checkpoint that can be read .step 10"):
        load_params(run / "checkpoints", stand_in.init_params(), 10)
    DAMAGES["index cut"](run / "checkpoints" / "5")
    with pytest.raises(ValueError, match="no checkpoint that can be read .step 5"):
        load_params(run / "checkpoints", stand_in.init_params())
    with pytest.raises(ValueError, match="no checkpoint that can be read .*to train anew, remove"):
        stand_in.run(run, steps=10)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "5"]  # nothing was moved


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_a_checkpoint_of_another_model_is_not_taken_for_damaged(run, leftovers):
    like = jax.tree.map(lambda x: np.zeros((*x.shape, 2), x.dtype), stand_in.init_params())
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        load_params(run / "checkpoints", jax.device_put(like))
    assert not (run / "damaged").exists()


def test_a_full_disk_ends_the_loop_and_the_same_goes_on(whole, tmp_path, monkeypatch):
    """The record of step 7 is not written."""
    real = RunLog.record

    def record(self, step, values):
        if step == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        real(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "record", record)
        with pytest.raises(OSError, match="No space left"):
            stand_in.run(tmp_path, steps=10)
    stand_in.run(tmp_path, steps=10)
    assert [record["loss"] for record in read_metrics(tmp_path)] == whole[1]


def test_places_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    check_place(tmp_path / "a" / "b")
    for bad in ("file", "file/run", "file/a/b"):
        with pytest.raises(ValueError, match="is no folder; choose another place"):
            check_place(tmp_path / bad)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no folder"):
        check_place(tmp_path / "dangling" / "run")
