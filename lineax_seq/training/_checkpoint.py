"""Checkpoints: parameters, optimizer state, step, random key and data position in one atomic directory per step.

Orbax writes a step under a temporary name and renames it when every file is there, so a run killed at any moment
leaves whole checkpoints only. Saving is asynchronous: the arrays are copied before `save` returns, the disk is
written while training goes on. Every process of a job calls every function here. What they wrote, any number of
processes reads, over any mesh.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from .. import parallel
from ._step import TrainState

PyTree = Any
# What reading a checkpoint raises that lacks a part, or holds one that is cut short. Orbax wraps most in a KeyError.
DAMAGED = (KeyError, OSError, ValueError)


class _Position:
    """Where a Grain iterator stands, as Orbax saves and loads it: the number of batches, the same on every process."""

    def __init__(self, iterator: Any):
        self._iterator = iterator

    async def save(self, directory):
        return self._write(directory, json.dumps(self._iterator.get_state()))

    async def _write(self, directory, state: str) -> None:
        if parallel.is_main():
            (await directory.await_creation() / "position.json").write_text(state)

    async def load(self, directory):
        return self._read(directory)

    async def _read(self, directory) -> None:
        self._iterator.set_state(json.loads((directory / "position.json").read_text()))


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """A full disk is an OSError for everyone; the library that writes arrays says it in the text of a ValueError."""
    try:
        yield
    except ValueError as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if f"os_error_code='{number}'" in str(error):
                raise OSError(number, os.strerror(number), str(directory)) from error
        raise


class Checkpoints:
    """The checkpoints that a run writes to `directory/<step>`: save and restore. A context manager.

    `every` is in steps; the newest `keep` checkpoints stay on disk. One process tree writes at a time: opening removes
    what a killed save left unfinished.

    Raises:
      ValueError: `every` or `keep` is below 1.
    """

    def __init__(self, directory: str | Path, *, every: int = 100, keep: int = 2):
        if every < 1 or keep < 1:
            raise ValueError(f"Checkpoints: every={every} and keep={keep} must both be at least 1")
        self._directory, self._every, self._keep = Path(directory).resolve(), every, keep
        self._checkpointer = self._open()

    def _open(self) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self._directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(self._every),
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the save under way, if any, and release the threads."""
        with _writing(self._directory):
            self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """Newest step, None if there is none."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def due(self, step: int) -> bool:
        """Whether `step` is one of the regular checkpoints."""
        return self._checkpointer.should_save(step)

    def save(self, step: int, state: TrainState, iterator: Any) -> None:
        """Start saving `state` and the position of the Grain `iterator` as checkpoint `step`."""
        rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
        items = {"params": state.params, "rest": rest, "data": _Position(iterator)}
        with _writing(self._directory):  # also of the save before, which must have ended
            self._checkpointer.save_checkpointables_async(step, items, force=True)

    def restore(self, like: TrainState, iterator: Any, note: Callable[[str], None] = lambda text: None) -> TrainState:
        """State of the newest whole checkpoint; `iterator` is moved to the position saved with it.

        `like` gives tree, shapes, dtypes and shardings; its values are not read. Of every newer checkpoint that is
        damaged `note` is told, and it is moved to the folder `damaged` beside the checkpoints.

        Raises:
          ValueError: there is no whole checkpoint.
        """
        rest = {"step": like.step, "opt_state": like.opt_state, "rng": like.rng}
        items = {"params": abstract(like.params), "rest": abstract(rest), "data": _Position(iterator)}
        steps = [found.step for found in self._checkpointer.checkpoints]
        why, damaged = "there is none", []
        for step in reversed(steps):
            found = {}
            try:
                found = self._checkpointer.load_checkpointables(step, items)
            except DAMAGED as error:
                why = f"step {step}: {_first_line(error)}"
            if not parallel.Agreement()(int(not found), wait=True):  # whole for every process
                break
            damaged.append(step)
        else:
            raise ValueError(
                f"Checkpoints: {self._directory} holds no checkpoint that can be read ({why}); to train anew, remove "
                "the folder"
            )
        for step in damaged:
            note(f"the checkpoint of step {step} is damaged: it is left out, and moved to {self._damaged / str(step)}")
        if damaged:
            self._set_aside(damaged)
        return TrainState(params=found["params"], **found["rest"])

    @property
    def _damaged(self) -> Path:
        return self._directory.parent / "damaged"

    def _set_aside(self, steps: list[int]) -> None:
        self._checkpointer.close()
        if parallel.is_main():
            self._damaged.mkdir(exist_ok=True)
            for step in steps:
                shutil.rmtree(self._damaged / str(step), ignore_errors=True)
                (self._directory / str(step)).rename(self._damaged / str(step))
        parallel.broadcast(None)
        self._checkpointer = self._open()


def _first_line(error: BaseException) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())[:200]


def _reader(directory: Path) -> ocp.training.Checkpointer:
    """Reads beside a run that is writing there: nothing is cleaned up, saved or removed."""
    return ocp.training.Checkpointer(
        directory,
        save_decision_policy=ocp.training.save_decision_policies.SpecificStepsPolicy(()),
        preservation_policy=ocp.training.preservation_policies.PreserveAll(),
    )


def latest_step(directory: str | Path) -> int | None:
    """Newest checkpoint under `directory`, None if there is no such folder or none in it."""
    directory = Path(directory).resolve()
    if not directory.is_dir():
        return None
    with _reader(directory) as reader:
        return None if reader.latest is None else reader.latest.step


def load_params(directory: str | Path, like: PyTree, step: int | None = None) -> tuple[int, PyTree]:
    """Step and parameters of checkpoint `step` (None: the newest whole one) under `directory`; `like` as in `restore`.

    Safe beside a run that is still writing there.

    Raises:
      ValueError: no such folder, no whole checkpoint in it, or no whole checkpoint of that step.
    """
    directory = Path(directory).resolve()
    if not directory.is_dir():
        raise ValueError(f"load_params: {directory} is not a folder; give the checkpoint folder of a run")
    with _reader(directory) as reader:
        steps = [found.step for found in reader.checkpoints]
        if not steps:
            raise ValueError(f"load_params: {directory} holds no finished checkpoint yet; train longer, or save sooner")
        if step is not None and step not in steps:
            raise ValueError(f"load_params: {directory} has no checkpoint of step {step}; it has {steps}")
        why = ""
        for candidate in reversed(steps) if step is None else [step]:
            try:
                return candidate, reader.load_checkpointables(candidate, {"params": abstract(like)})["params"]
            except DAMAGED as error:
                why = f"step {candidate}: {_first_line(error)}"
        raise ValueError(f"load_params: {directory} holds no checkpoint that can be read ({why})")


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a tree of arrays or of shape structs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
