"""The whole job of any task: configuration, run directory, resume, training, report.

run = Run(config, task)      # what can be refused is refused here, before anything is computed or written
result = run.train()         # None if a signal ended it: everything is saved, the same again continues
"""

import contextlib
import json
import math
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import parallel
from ._checkpoint import Checkpoints, latest_step
from ._config import RunConfig
from ._evaluate import Evaluator
from ._loop import Profile, seconds_per_step, train
from ._metrics import RunLog
from ._optimizer import check_kinds, learning_rate_schedule, make_optimizer
from ._placement import Placement
from ._run_directory import open_run, write_atomically
from ._step import TrainState, leaf_paths, make_train_step, trained_part
from ._task import Batch, Task

PyTree = Any

REPORT_SECONDS = 30.0  # kept free of max_seconds: what the task writes and compiles for its report


@dataclass(frozen=True)
class Result:
    """What a finished run measured; also in its results.json. Seconds are of the last process that worked on it."""

    steps: int
    parameters: int
    tokens_per_second: float
    seconds: float
    measured: dict[str, Any] = field(default_factory=dict)  # what the task's report returned

    def to_json(self) -> dict[str, Any]:
        own = {"steps": self.steps, "parameters": self.parameters}
        return own | self.measured | {"tokens_per_second": self.tokens_per_second, "seconds": self.seconds}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Result":
        names = ("steps", "parameters", "tokens_per_second", "seconds")
        measured = {name: value for name, value in values.items() if name not in names}
        return cls(**{name: values[name] for name in names}, measured=measured)


class Run:
    """A task's run in its directory, ready to train from the start or from its newest checkpoint.

    `begin` is the `time.monotonic()` from which `max_seconds` counts; None: now. Over several processes, each makes
    one with the same configuration, after `parallel.initialize`.

    Attributes:
      path: of the run directory.
      resolved: what the run settled at its start, such as `seed` and `steps`.
      parameters: how many numbers there are in them.
      log: shows and keeps what `report` has to say, while the run trains.

    Raises:
      ValueError, NotImplementedError: a configuration that does not fit the task, the devices, the time or the run
        directory. A new run leaves nothing on disk then.
    """

    def __init__(self, config: RunConfig, task: Task, *, begin: float | None = None):
        self._begin = time.monotonic() if begin is None else begin
        self.config, self.task = config, task
        self.stopped_by: signal.Signals | None = None
        with jax.transfer_guard("allow"):  # what is done once; training and evaluation transfer what they name
            self._prepare()

    def _prepare(self) -> None:
        config, task = self.config, self.task
        mesh = None if config.mesh is None else parallel.make_mesh(config.mesh)
        training = config.training

        with traced(f"the parameters of {task.name}"):
            shapes = jax.eval_shape(task.init, jax.random.key(0))
        self.parameters = sum(x.size for x in jax.tree.leaves(shapes))
        self._trainable = _trainable(task, shapes)
        kinds = task.kinds()
        check_kinds(kinds, shapes)
        optimizer = make_optimizer(config.optimizer, trained_part(kinds, self._trainable))
        self._placement = placement = Placement(
            mesh, shapes, optimizer, trainable=self._trainable, length=task.row_length
        )
        loss = placement.loss(task)
        self._step = make_train_step(
            loss,
            optimizer,
            microbatches=training.microbatches,
            shardings=placement.shardings,
            trainable=self._trainable,
        )
        self._reading = placement.reading(training.batch_size)
        rows = min(training.batch_size // training.microbatches, training.eval_rows)
        self._measured_rows = -(-rows // placement.row_shards) * placement.row_shards
        self._measure = Evaluator(loss, placement, placement.reading(self._measured_rows))
        sample = self._sample()
        # Shapes, options and implementations that do not fit are refused while tracing. The trace is kept for training.
        with traced(f"a step of {task.name}"):
            jax.eval_shape(self._step, placement.abstract_state(), sample, np.float32(0))

        self._directory = Path(config.run_dir or Path("runs") / task.name)
        self.run = open_run(
            self._directory,
            config,
            resolve=lambda: self._resolve(sample),
            resume=config.resume,
            may_differ=config.may_differ,
            writes=parallel.is_main(),
        )
        self.path, self.resolved = self.run.path, self.run.resolved
        for name, value in task.identity().items():
            if self.resolved.get(name) != value:
                raise ValueError(
                    f"{self.path}: the {name} has changed since this run began; bring back what it was to continue, "
                    "or choose another run directory"
                )
        self._profile = self._planned_profile(latest_step(self.run.checkpoints) or 0, self.resolved["steps"])
        self.run.resolve()
        if parallel.is_main():
            task.save(self.path)

    def train(self) -> Result | None:
        """Train to the last step and report; None if a signal (`stopped_by`) ended it, with everything saved.

        Raises:
          NonFiniteError: see `train`; the last good checkpoint stays.
          OSError: the disk is full or gone; the same again continues from the last checkpoint.
        """
        training, steps = self.config.training, self.resolved["steps"]
        state = self.new_state()
        batches = self.task.batches(self.resolved["seed"], self._reading)
        notes: list[str] = []
        with Checkpoints(
            self.run.checkpoints, every=training.checkpoint_every, keep=training.keep_checkpoints
        ) as checkpoints:
            if checkpoints.latest is not None:
                state = checkpoints.restore(state, batches, notes.append)
            start = int(jax.device_get(state.step))
            if start == steps and (found := self.path / "results.json").exists():
                return Result.from_json(json.loads(found.read_text(encoding="utf-8")))
            shown = dict(log_every=training.log_every, enabled=parallel.is_main())
            with RunLog(self.path, steps=steps, start=start, **shown) as self.log:
                for text in (*notes, self._introduction(start, steps)):
                    self.log.note(text)
                state, self.stopped_by = train(
                    state,
                    self._step,
                    batches,
                    learning_rates=learning_rate_schedule(self.config.optimizer, steps),
                    log=self.log,
                    checkpoints=checkpoints,
                    evaluate=lambda params: self.task.evaluate(params, self._measure, training.eval_rows),
                    eval_every=training.eval_every,
                    profile=self._profile,
                    place=lambda batch: self._placement.batch(batch, self._reading),
                    trainable=self._trainable,
                    stall_seconds=training.stall_seconds,
                )
                if self.stopped_by is not None:
                    return None
                return self._report(state.params, steps)

    def new_state(self, seed: int | None = None) -> TrainState:
        """The state before the first update; `seed` None: the run's."""
        seed = self.resolved["seed"] if seed is None else seed
        with jax.transfer_guard("allow"):
            return self._placement.new_state(self.task.init(jax.random.key(seed)), seed)

    def _report(self, params: PyTree, steps: int) -> Result:
        """Evaluate on everything, let the task report, and write results.json last."""
        if self.task.evaluation_rows:
            self.log.note(f"evaluating on all {self.task.evaluation_rows:,} held-out rows")
        found = self.task.evaluate(params, self._measure)
        if found:
            self.log.record(steps, found)
        with jax.transfer_guard("allow"):
            measured = self.task.report(self, params, found)
        seconds = time.monotonic() - self._begin
        result = Result(steps, self.parameters, self.log.tokens_per_second, seconds, measured).to_json()
        if parallel.is_main():
            write_atomically(self.path / "results.json", json.dumps(result, indent=2) + "\n")
        return Result.from_json(parallel.broadcast(result))

    def _sample(self) -> Batch:
        """A training batch on the devices, to trace and time with."""
        batches = self.task.batches(0, self._reading)
        try:
            return self._placement.batch(next(batches), self._reading)
        finally:
            if (close := getattr(batches, "close", None)) is not None:
                close()  # of Grain: ends the threads that read ahead

    def _resolve(self, sample: Batch) -> dict[str, Any]:
        """What a new run settles once and for all."""
        training, limit = self.config.training, self.config.training.max_seconds
        settled = {
            "seed": secrets.randbits(31) if training.seed is None else training.seed,
            "steps": training.steps if limit is None else self._steps_in_time(sample, limit),
            **self.task.identity(),
        }
        try:
            json.dumps(settled)
        except TypeError as error:
            raise ValueError(f"{self.task.name}: identity() must give values that JSON holds: {error}") from error
        settled = parallel.broadcast(settled)
        self._planned_profile(0, settled["steps"])  # refuses before anything is written
        return settled

    def _planned_profile(self, start: int, steps: int) -> Profile | None:
        text, folder = self.config.training.profile_steps, self._directory / "profile"
        return None if text is None else Profile.parse(text, folder, start=start, steps=steps)

    def _steps_in_time(self, sample: Batch, max_seconds: float) -> int:
        """The steps asked for, or as many as `max_seconds` leaves time for."""
        training, state = self.config.training, self.new_state(0)
        step_seconds = seconds_per_step(self._step, state, sample)
        self.task.evaluate(state.params, self._measure, 1)  # compiles
        begin = time.monotonic()
        self.task.evaluate(state.params, self._measure, 1)
        end = time.monotonic()
        batches = math.ceil(min(training.eval_rows, self.task.evaluation_rows) / self._measured_rows)
        return steps_within(
            max_seconds,
            spent=end - self._begin,
            step_seconds=step_seconds,
            batch_seconds=end - begin,
            batches_per_step=batches / training.eval_every if training.eval_every else 0.0,
            batches_at_end=math.ceil(self.task.evaluation_rows / self._measured_rows),
            at_most=training.steps,
        )

    def _introduction(self, start: int, steps: int) -> str:
        about = f"{self.path}: {self.parameters:,} parameters, {self.task.describe(steps)}; "
        if self._trainable is not None:
            trained = sum(x.size for x in jax.tree.leaves(trained_part(self._placement.shapes, self._trainable)))
            about += f"{trained:,} of the parameters are trained; "
        return about + (f"continuing after step {start} of {steps}" if start else f"{steps} steps")


@contextlib.contextmanager
def traced(what: str) -> Iterator[None]:
    """Make the refusals of JAX and of the layers below it, while `what` is traced, refusals of the configuration."""
    try:
        yield
    except NotImplementedError:
        raise
    except (TypeError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(f"{what} cannot be computed with these options here: {lines[0]}") from error


def _trainable(task: Task, params: PyTree) -> PyTree | None:
    """Which parameters the task trains, as a tree of bools; None: all of them."""
    leaves, structure = jax.tree.flatten(params)
    chosen = [bool(task.trainable(path)) for path in leaf_paths(params)]
    if not any(chosen):
        raise ValueError(f"{task.name}: none of the {len(leaves)} parameters is trainable; train at least one")
    return None if all(chosen) else jax.tree.unflatten(structure, chosen)


def steps_within(
    max_seconds: float,
    *,
    spent: float,
    step_seconds: float,
    batch_seconds: float,
    batches_per_step: float,
    batches_at_end: int,
    at_most: int,
) -> int:
    """Steps that fit in `max_seconds` of which `spent` are gone, with evaluation batches of `batch_seconds` and report.

    Raises:
      ValueError: not one step fits.
    """
    end = REPORT_SECONDS + batch_seconds * batches_at_end
    per_step = step_seconds + batch_seconds * batches_per_step
    steps = min(at_most, int((max_seconds - spent - end) / per_step))
    if steps < 1:
        raise ValueError(
            f"max_seconds is {max_seconds:g}, too few for a step: preparation took {spent:.0f}, evaluation and report "
            f"will take {end:.0f}, a step {per_step:.1f}; give more, or None"
        )
    return steps
