"""The training loop: updates, metrics one step late, evaluations, checkpoints, and a clean stop on a signal.

The device is never idle for the host: step n + 1 is dispatched before the metrics of step n are fetched. A checkpoint
waits for the metrics of its own step, so a state that is not finite is never saved.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import parallel
from ._checkpoint import Checkpoints
from ._metrics import RunLog
from ._step import TrainState, TrainStep, state_leaf_names
from ._task import Batch, BatchIterator
from ._watchdog import Watchdog


class NonFiniteError(FloatingPointError):
    """The loss, a gradient or a parameter is not finite: `step`, and `leaf`, the first bad one (None if none is)."""

    def __init__(self, step: int, leaf: str | None, values: dict[str, float], last_good: int | None):
        self.step, self.leaf = step, leaf
        shown = ", ".join(f"{name} {value:g}" for name, value in values.items() if not np.isfinite(value))
        if values["tokens"] == 0:
            cause = "the batch has no token to predict (all its loss weights are 0)"
        elif leaf is not None:
            cause = f"the first bad leaf is {leaf}"
        else:
            cause = "every parameter and gradient is finite: the loss overflowed"
        saved = "no checkpoint was saved" if last_good is None else f"the last good checkpoint is step {last_good}"
        super().__init__(f"training stopped at step {step}: {shown}; {cause}; {saved}")


@dataclass
class StopRequest:
    """Set by a signal, read by the loop between two steps."""

    received: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """The first SIGTERM or SIGINT only sets the request; a second one acts as usual. Main thread only, else inert."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {}

    def handle(number, frame):
        request.received = signal.Signals(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    for each in (signal.SIGTERM, signal.SIGINT):
        previous[each] = signal.signal(each, handle)
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


@dataclass
class Profile:
    """`jax.profiler` trace of the steps first .. last - 1, into `directory`."""

    directory: Path
    first: int
    last: int
    active: bool = field(default=False, init=False)

    @classmethod
    def parse(cls, text: str, directory: Path, *, start: int, steps: int) -> "Profile":
        """From "10:15", steps 10 to 14; `start` steps are behind the run of `steps`.

        Raises:
          ValueError: not two whole numbers, or a range that the run does not pass.
        """
        first, colon, last = text.partition(":")
        if not (colon and first.isdigit() and last.isdigit()):
            raise ValueError(f"profile_steps: got {text!r}; give FIRST:END, such as 10:15 for the steps 10 to 14")
        if not start < int(first) < int(last) <= steps + 1:
            raise ValueError(
                f"profile_steps: {text} is not within the steps {start + 1}:{steps + 1} that this run will do; "
                "choose first < end inside them"
            )
        return cls(directory, int(first), int(last))

    def before(self, step: int, state: TrainState) -> None:
        if step == self.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.directory))
            self.active = True

    def after(self, step: int, state: TrainState) -> None:
        if self.active and step == self.last - 1:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        if self.active:
            self.active = False
            jax.profiler.stop_trace()


def train(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterator[Batch] | BatchIterator,
    *,
    learning_rates: np.ndarray,
    log: RunLog,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    eval_every: int | None = None,
    profile: Profile | None = None,
    place: Callable[[Batch], Batch] = jax.device_put,
    trainable: Any = None,
    stall_seconds: float | None = None,
) -> tuple[TrainState, signal.Signals | None]:
    """Train from `state.step` to `len(learning_rates)` updates; returns the state and the signal that ended it early.

    `state` is donated. `batches` is a Grain iterator when there are checkpoints, which hold its position. `place` puts
    a host batch on the devices. `trainable` is that of `make_train_step`. `evaluate(params)` runs every `eval_every`
    steps but the last; what it returns is logged. On SIGTERM or SIGINT the current step is finished and saved; of
    several processes, all stop together at the step after the first to get the signal, and one that stands still for
    `stall_seconds` ends (see `Watchdog`).

    Raises:
      NonFiniteError: the loss, a gradient norm or a parameter norm is not finite.
      ValueError: the data ended before the steps did.
    """
    start, steps = int(jax.device_get(state.step)), len(learning_rates)
    leaf_names = state_leaf_names(state.params, trainable)
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def fetch() -> None:
        """Wait for the pending step and log it."""
        nonlocal pending
        if pending is None:
            return
        step, device_metrics = pending
        pending = None
        values = jax.device_get(device_metrics)
        bad = values.pop("nonfinite")
        values = {name: float(value) for name, value in values.items()}
        if not all(np.isfinite(value) for value in values.values()):
            leaf = leaf_names[int(bad.argmax())] if bad.any() else None
            raise NonFiniteError(step, leaf, values, checkpoints.latest if checkpoints else None)
        log.step(step, values | {"learning_rate": float(learning_rates[step - 1])})

    with contextlib.ExitStack() as stack:
        request, agree = stack.enter_context(stop_on_signal()), parallel.Agreement()
        who = f"process {jax.process_index()} of {jax.process_count()}"
        watchdog = stack.enter_context(Watchdog(stall_seconds if jax.process_count() > 1 else None, who))
        stopped_by = 0
        if profile is not None:
            stack.callback(profile.stop)
        for step in range(start + 1, steps + 1):
            watchdog.at(step, "reading the batch of")
            try:
                batch = place(next(batches))
            except StopIteration:
                raise ValueError(
                    f"train: the data ended before step {step} of {steps}; repeat it, or ask for fewer steps"
                ) from None
            if profile is not None:
                profile.before(step, state)
            watchdog.at(step, "waiting for")
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, batch, jax.device_put(learning_rates[step - 1]))
            fetch()
            pending = (step, metrics)
            if profile is not None:
                profile.after(step, state)

            stopped_by = agree(request.received or 0)
            stopping = stopped_by != 0
            if evaluate is not None and eval_every and step % eval_every == 0 and step < steps and not stopping:
                fetch()
                watchdog.at(step, "evaluating after")
                found = evaluate(state.params)
                log.record(step, found)
                log.note(f"step {step}/{steps}  " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))
                log.restart_clock()
            if checkpoints is not None and (stopping or step == steps or checkpoints.due(step)):
                fetch()
                watchdog.at(step, "saving")
                checkpoints.save(step, state, batches)
                log.restart_clock()
            if stopping:
                break
        watchdog.at(steps, "waiting for")
        fetch()
        stopped_by = stopped_by or agree(request.received or 0, wait=True)  # while the last step was being saved
    return state, signal.Signals(stopped_by) if stopped_by else None


def seconds_per_step(train_step: TrainStep, state: TrainState, batch: Batch, *, repeats: int = 3) -> float:
    """Seconds of one update, the median of `repeats`, on a copy of `state`: it compiles the step but trains nothing."""
    state = jax.tree.map(jnp.copy, state)
    times, rate = [], jax.device_put(np.float32(0))
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        state, metrics = train_step(state, batch, rate)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))
