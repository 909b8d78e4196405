"""Every task of the library obeys the laws that the kit has for a user's own."""

import pytest

from lineax_seq.models import HybridConfig
from lineax_seq.tasks import DataConfig, RecallConfig, RecallData, RecallTask, TextConfig, TextTask
from lineax_seq.testing import check_task, task_laws
from lineax_seq.training import Reading

MODEL = dict(d_model=16, num_layers=1, pattern="L", num_heads=1, linear_layer="delta_net")
READING = Reading(8)
TEXT = "In the beginning was the word, and the word was long. " * 40


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "text.txt").write_text(TEXT)
    data = DataConfig(path=str(folder / "text.txt"), tokenizer="bytes", context=32, cache_dir=str(folder / "cache"))
    return {
        "text": TextTask(TextConfig(model=HybridConfig(vocab_size=258, **MODEL), data=data)),
        "recall": RecallTask(
            RecallConfig(
                model=HybridConfig(vocab_size=16, **MODEL), data=RecallData(length=24, vocabulary=16, pairs=(2,))
            )
        ),
    }


@pytest.mark.parametrize("name", ["text", "recall"])
def test_laws(tasks, name):
    task = tasks[name]
    check_task(task, READING, laws=list(task_laws(task, READING)))
