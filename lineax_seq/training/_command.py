"""A command line that does what a configuration asks, and ends in one sentence where it cannot: never in a traceback.

Exit status: 0 finished, or saved on SIGTERM; 1 it ran and could not go on; 2 refused; 130 saved on Ctrl-C; 141 nobody
reads its output any more.
"""

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from .. import parallel
from ._config import RunConfig
from ._flags import parse_flags
from ._loop import NonFiniteError
from ._run import Result, Run
from ._task import Task

Config = TypeVar("Config", bound=RunConfig)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (ValueError, NotImplementedError, OSError, ExceptionGroup)


def sentence(error: BaseException) -> str:
    """What an error says, on as few lines as it takes."""
    if isinstance(error, ExceptionGroup):
        return f"{error.message}: " + "; ".join(sentence(one) for one in error.exceptions)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = "; make room, then the same command goes on" if error.errno in FULL else ""
        return f"{where}{error.strerror}{full}"
    return str(error).split("\n-----")[0]  # what JAX adds about its traceback


@contextlib.contextmanager
def plain_output() -> Iterator[None]:
    """Print what the terminal's encoding lacks as `?`, and end with status 141 when nobody reads on (`| head`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would be written, and fail again, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def run_command(
    default: Config,
    make_task: Callable[[Config], Task],
    show: Callable[[Run, Result], None],
    args: Sequence[str] | None = None,
    *,
    program: str,
    description: str,
) -> int:
    """Parse flags over `default`, run the task and `show` its result; the exit status as in the module's docstring."""
    begin = time.monotonic()
    # Orbax logs a failure on each level that it passes, with tracebacks; it reaches us too, and is said once.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with plain_output():
        config = parse_flags(default, args, program=program, description=description)
        job = config.distributed
        try:
            parallel.initialize(job.coordinator, job.processes, job.process_id, detect=job.detect)
            run = Run(config, make_task(config), begin=begin)
        except REFUSED as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            return 2
        try:
            result = run.train()
        except (NonFiniteError, ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            print(f"error: {sentence(error)}", file=sys.stderr)
            return 1
        shown = parallel.is_main()
        if run.stopped_by is not None:
            if shown:
                print(f"stopped by {run.stopped_by.name}, saved; the same command goes on from there", file=sys.stderr)
            return 130 if run.stopped_by is signal.SIGINT else 0
        assert result is not None
        if shown:
            show(run, result)
        return 0
