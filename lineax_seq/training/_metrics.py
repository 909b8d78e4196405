"""What a run shows and keeps: a progress bar, metrics.jsonl and TensorBoard, all from one call per step."""

import json
import sys
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from ._run_directory import write_atomically

PLAIN_LINE_SECONDS = 10.0


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def read_metrics(directory: str | Path) -> list[dict[str, float]]:
    """The records of a run's metrics.jsonl in order.

    Lines that a kill or a power cut damaged (cut short, full of zero bytes) are left out.
    """
    file = Path(directory) / "metrics.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, float] | None:
    # A file system may have given the file its length before its content: zero bytes stand before what came later.
    try:
        record = json.loads(line.strip(b"\0"))
    except ValueError:  # no JSON, or no UTF-8
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class _TensorBoard:
    """Writes scalars as TensorBoard events at the call. The library's own writer does so in a thread: when the disk is
    full that thread ends, and the next calls wait for it for ever."""

    def __init__(self, directory: Path, start: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        # Readers drop what a killed run wrote of steps that now come again.
        self._write(start + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        self._write(step, summary=scalar(name, value))

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))  # a date, not a duration


class RunLog:
    """Metrics of a run of `steps` updates that has `start` of them behind it. A context manager.

    Records of steps after `start` (a killed run got further than its last checkpoint) are dropped from metrics.jsonl,
    so every step is there once. `enabled=False` (all processes but the first) shows and writes nothing.
    """

    def __init__(self, directory: str | Path, *, steps: int, start: int = 0, log_every: int = 1, enabled: bool = True):
        self._steps, self._start, self._log_every, self._enabled = steps, start, log_every, enabled
        self._last: float | None = time.perf_counter()
        self._last_line = time.perf_counter()
        self._timed_steps, self._timed_seconds, self._timed_tokens = 0, 0.0, 0.0
        if not enabled:
            return
        directory = Path(directory)
        kept = [json.dumps(r) + "\n" for r in read_metrics(directory) if r["step"] <= start]
        write_atomically(directory / "metrics.jsonl", "".join(kept))
        self._file = open(directory / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
        self._board = _TensorBoard(directory / "tensorboard", start)
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        if self._enabled:
            if self._bar is not None:
                self._bar.close()
            try:
                self._file.close()
            finally:
                self._board.close()

    @property
    def tokens_per_second(self) -> float:
        """Mean over the timed steps so far; 0 before the first."""
        return self._timed_tokens / self._timed_seconds if self._timed_seconds else 0.0

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the throughput (compilation, evaluation, a checkpoint)."""
        self._last = None

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """A finished update: its metrics, to which seconds and tokens per second are added where they are known."""
        now = time.perf_counter()
        if self._last is not None and step > self._start + 1:  # the first step includes compilation
            seconds = now - self._last
            self._timed_steps += 1
            self._timed_seconds += seconds
            self._timed_tokens += metrics["tokens"]
            metrics = metrics | {"seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
        self._last = now
        if not self._enabled:
            return
        if step % self._log_every == 0 or step == self._steps:
            self.record(step, metrics)
        rate = f"{self.tokens_per_second:,.0f}" if self._timed_seconds else "?"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {rate} tokens/s")
        elif now - self._last_line >= PLAIN_LINE_SECONDS or step in (self._start + 1, self._steps):
            self._last_line = now
            left = clock(self._timed_seconds / self._timed_steps * (self._steps - step)) if self._timed_steps else "?"
            print(
                f"step {step}/{self._steps}  loss {metrics['loss']:.4f}  {rate} tokens/s  {left} left",
                file=sys.stderr,
                flush=True,
            )

    def record(self, step: int, values: dict[str, float]) -> None:
        """Keep `values` of `step` in metrics.jsonl and TensorBoard without showing them."""
        if self._enabled:
            self._file.write(json.dumps({"step": step} | values) + "\n")
            for name, value in values.items():
                self._board.add(name, value, step)

    def note(self, text: str) -> None:
        """Show a line, above the bar if there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
