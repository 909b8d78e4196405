"""The contract: the task of the documentation trains; frozen parameters; what a run refuses; one trace of the step."""

import inspect
import json
import textwrap

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineax_seq.training import OptimizerConfig, Run, RunConfig, Task, TrainingConfig, _task, read_metrics


def documented(directory):
    """The names that the example in the documentation of `Task` makes; it trains in `directory`."""
    code = textwrap.dedent(inspect.getdoc(_task).split("This one fits a line:")[1])
    code = code.replace("RunConfig(", f"RunConfig(run_dir={str(directory)!r}, ")
    names = dict(
        Task=Task,
        Run=Run,
        OptimizerConfig=OptimizerConfig,
        RunConfig=RunConfig,
        TrainingConfig=TrainingConfig,
        jnp=jnp,
        np=np,
        grain=grain,
    )
    exec(code, names)
    return names


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Directory and names of the documented example, trained."""
    directory = tmp_path_factory.mktemp("line") / "run"
    return directory, documented(directory)


def config(directory, **training):
    return RunConfig(run_dir=str(directory), training=TrainingConfig(**{"steps": 6, "checkpoint_every": 3} | training))


def losses(directory):
    return [record["loss"] for record in read_metrics(directory) if "loss" in record]


def test_the_documented_task_trains(line):
    directory, names = line
    found = losses(directory)
    assert len(found) == 50 and found[-1] < 0.1 * found[0]
    assert names["result"].steps == 50 and names["result"].parameters == 2
    assert json.loads((directory / "results.json").read_text())["steps"] == 50


def test_a_run_that_was_cut_goes_on_exactly(line, tmp_path):
    class Cut(line[1]["Line"]):
        def batches(self, seed, reading):
            inner = super().batches(seed, reading)

            class Batches:
                get_state, set_state, asked = inner.get_state, inner.set_state, 0

                def __next__(self):
                    self.asked += 1
                    if self.asked == 5:
                        raise KeyboardInterrupt
                    return next(inner)

            return Batches()

    task = line[1]["Line"]()
    Run(config(tmp_path / "whole"), task).train()
    with pytest.raises(KeyboardInterrupt):
        Run(config(tmp_path / "cut"), Cut()).train()
    assert len(losses(tmp_path / "cut")) == 3
    Run(config(tmp_path / "cut"), task).train()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_frozen_parameters_stay_and_come_back(line, tmp_path):
    class Steep(line[1]["Line"]):
        def trainable(self, path):
            return path == "slope"

        def report(self, run, params, found):
            return {"height": float(params["height"]), "slope": float(params["slope"])}

    first = Run(config(tmp_path / "run"), Steep()).train()
    assert first.measured["height"] == 0 and first.measured["slope"] != 0
    (tmp_path / "run" / "results.json").unlink()
    again = Run(config(tmp_path / "run"), Steep()).train()  # the state of a part of the parameters is restored
    assert again.measured == first.measured


def test_the_step_is_traced_once(line, tmp_path):
    traces = []

    class Counted(line[1]["Line"]):
        def loss(self, params, batch, key, axis_name=None):
            traces.append(batch["x"].shape)
            return super().loss(params, batch, key, axis_name)

    run = Run(config(tmp_path / "run"), Counted())
    before = len(traces)
    assert before and not (tmp_path / "run" / "metrics.jsonl").exists()
    run.train()
    assert len(traces) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kinds=lambda self: {"slope": "vectr", "height": "vector"}), "did you mean 'vector'"),
        (dict(trainable=lambda self, path: False), "none of the 2 parameters is trainable"),
        (
            dict(loss=lambda self, params, batch, key, axis_name=None: params["slope"] @ batch["x"]),
            "matmul",
        ),
        (dict(loss=lambda self, params, batch, key, axis_name=None: 1), "a step of line cannot be computed"),
        (dict(identity=lambda self: {"data": object()}), "plain values|JSON"),
    ],
)
def test_a_task_that_cannot_run_is_refused_before_anything_is_written(line, tmp_path, change, message):
    task = type("Other", (line[1]["Line"],), change)()
    with pytest.raises(ValueError, match=message):
        Run(config(tmp_path / "run"), task)
    assert not (tmp_path / "run").exists()


def test_a_mesh_needs_rows_of_tokens(line, tmp_path):
    task = line[1]["Line"]()
    with pytest.raises(ValueError, match="only rows of tokens"):
        Run(RunConfig(run_dir=str(tmp_path / "run"), mesh=f"data={jax.device_count()}"), task)


def test_other_data_is_refused(line, tmp_path):
    made = [type("Other", (line[1]["Line"],), dict(identity=lambda self, n=n: {"rows": n}))() for n in (1, 2)]
    Run(config(tmp_path / "run"), made[0])
    with pytest.raises(ValueError, match="the rows has changed since this run began"):
        Run(config(tmp_path / "run"), made[1])
