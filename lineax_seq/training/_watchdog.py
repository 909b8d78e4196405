"""Ends a process that stands still, and says what it was doing: of several, one that hangs makes all others wait.

Those that wait say that they wait for a step; the one that hangs says at what. One that cannot even say that (it was
stopped, or its machine is gone) is the one that says nothing, and JAX names it too.
"""

import os
import sys
import threading
import time
from collections.abc import Callable

STALLED = 75  # exit status: a temporary failure, the same command goes on


def _leave(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    os._exit(STALLED)  # the main thread hangs in code that no exception reaches


class Watchdog:
    """`watchdog.at(step, doing)` says what begins now; `seconds` without a word end the process. A context manager.

    `seconds` None: nothing is watched.
    """

    def __init__(self, seconds: float | None, who: str, leave: Callable[[str], None] = _leave):
        self._seconds, self._who, self._leave = seconds, who, leave
        self._last, self._doing, self._over = time.monotonic(), "starting", threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if seconds is not None else None

    def __enter__(self) -> "Watchdog":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def at(self, step: int, doing: str) -> None:
        self._last, self._doing = time.monotonic(), f"{doing} step {step}"

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._over.wait(min(1.0, self._seconds / 4)):
            still = time.monotonic() - self._last
            if still > self._seconds:
                self._leave(
                    f"error: {self._who} has been {self._doing} for {still:.0f} seconds, more than "
                    f"training.stall_seconds; the same command goes on from the last checkpoint"
                )
                return
