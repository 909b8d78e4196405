"""The run folder: configuration there and back, when a run may be continued, nothing half-written."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from lineax_seq.training import OptimizerConfig, load_run, open_run
from lineax_seq.training._run_directory import write_atomically


@dataclass(frozen=True)
class Config:
    optimizer: OptimizerConfig = OptimizerConfig()
    pattern: str = "LLLN"
    sizes: tuple[int, ...] = (1, 2)
    nested: tuple[tuple[str, int], ...] | None = (("a", 1),)
    extra: OptimizerConfig | None = None
    rate: float = 1.0
    log_every: int = 1


CONFIG = Config(
    optimizer=OptimizerConfig(name="adamw", learning_rate=1 / 3), sizes=(), extra=OptimizerConfig(eps=1e-15)
)


def test_configuration_comes_back_equal_with_seed_and_versions(tmp_path):
    open_run(tmp_path / "run", CONFIG, resolve=lambda: {"seed": 5}).resolve(steps=7)
    found = load_run(tmp_path / "run", Config)
    assert found.config == CONFIG
    assert found.resolved == {"seed": 5, "steps": 7}
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "grain"} <= set(record["versions"])
    assert "git_commit" in record


def test_whole_numbers_come_back_as_the_floats_they_were(tmp_path):
    open_run(tmp_path, dataclasses.replace(CONFIG, rate=2))
    assert isinstance(load_run(tmp_path, Config).config.rate, float)


def test_same_configuration_resumes_with_the_resolved_values(tmp_path):
    open_run(tmp_path, CONFIG, resolve=lambda: {"seed": 5})
    again = open_run(tmp_path, dataclasses.replace(CONFIG, log_every=5), may_differ=frozenset({"log_every"}))
    assert again.resolved == {"seed": 5} and again.config.log_every == 5


def test_another_configuration_is_refused_and_every_difference_told(tmp_path):
    open_run(tmp_path, CONFIG)
    other = dataclasses.replace(CONFIG, pattern="N", optimizer=OptimizerConfig(name="adamw", learning_rate=0.5))
    with pytest.raises(ValueError) as error:
        open_run(tmp_path, other)
    for part in ("pattern: 'LLLN' there, 'N' here", "optimizer.learning_rate: 0.33", "another run directory"):
        assert part in str(error.value)
    assert load_run(tmp_path, Config).config == CONFIG


def test_resume_must_and_never(tmp_path):
    with pytest.raises(ValueError, match="no run to resume"):
        open_run(tmp_path / "a", CONFIG, resume="must")
    assert not (tmp_path / "a").exists()
    open_run(tmp_path / "a", CONFIG, resume="never")
    open_run(tmp_path / "a", CONFIG, resume="must")
    with pytest.raises(ValueError, match="already holds a run"):
        open_run(tmp_path / "a", CONFIG, resume="never")
    with pytest.raises(ValueError, match="auto, must or never"):
        open_run(tmp_path / "a", CONFIG, resume="yes")


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not a run"):
        open_run(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_load_errors(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        load_run(tmp_path / "nowhere", Config)
    with pytest.raises(ValueError, match="holds no run"):
        load_run(tmp_path, Config)
    (tmp_path / "config.json").write_text('{"config": {')
    with pytest.raises(ValueError, match="not a run's configuration"):
        load_run(tmp_path, Config)
    (tmp_path / "config.json").write_text('{"config": {"optimizer": {"learning_rat": 1}}, "resolved": {}}')
    with pytest.raises(ValueError, match="no field 'learning_rat' .did you mean 'learning_rate'"):
        load_run(tmp_path, Config)


def test_values_that_json_would_change_are_refused(tmp_path):
    with pytest.raises(ValueError, match="plain values"):
        open_run(tmp_path / "run", dataclasses.replace(CONFIG, pattern={"a": 1}))
    assert not (tmp_path / "run").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomically(tmp_path / "a", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_nothing_is_written_when_the_run_cannot_be_settled(tmp_path):
    def refuse():
        raise ValueError("too few seconds")

    with pytest.raises(ValueError, match="too few seconds"):
        open_run(tmp_path / "run", CONFIG, resolve=refuse)
    assert not (tmp_path / "run").exists()
