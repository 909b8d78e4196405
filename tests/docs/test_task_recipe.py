"""CONTRIBUTING's "A task", taken literally: its file is run, its line put into the room, and the task trained."""

from types import ModuleType

import pytest
import recipes

from lineax_seq import tasks
from lineax_seq.testing import check_task, task_laws
from lineax_seq.training import OptimizerConfig, Reading, Run, TrainingConfig, read_metrics

MODULE, ROOM = recipes.listed("A task")
TASK = MODULE.LineTask(MODULE.LineConfig())
READING = Reading(batch_size=8)


def test_the_recipe_s_line_offers_it():
    assert ROOM.LineTask is MODULE.LineTask and ROOM.LineConfig is MODULE.LineConfig
    public = {
        name for name, value in vars(tasks).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public <= vars(ROOM).keys()


@pytest.mark.parametrize("law", task_laws(TASK, READING))
def test_law(law):
    check_task(TASK, READING, laws=[law])


def test_it_learns(tmp_path):
    config = MODULE.LineConfig(
        slope=-3.0,
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.2, weight_decay=0.0),
        training=TrainingConfig(steps=100, batch_size=32),
        run_dir=str(tmp_path / "line"),
    )
    assert Run(config, MODULE.LineTask(config)).train() is not None
    records = read_metrics(tmp_path / "line")
    assert records[-1]["loss"] < 1e-3 < records[0]["loss"]
