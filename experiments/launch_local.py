"""Does a job that runs in one process also run in several, as it will on a cluster?

Question   A command, started as N processes on this machine that form one job over Gloo, each with simulated devices.
Command    python -m experiments.launch_local --processes 2 --devices 4 -- \\
               python -m experiments.train_lm --mesh data=2,seq=4
Hardware   CPU cores; the processes share them.
Expected   What one process with as many devices gives; SIGTERM and Ctrl-C reach all; when one dies, all end.
Measured   Not a measurement; tests/parallel/test_multihost.py and test_training.py hold it to that.

Exit status: that of the first process that failed (128 + the signal that ended it), else 0.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

GRACE_SECONDS = 10.0  # between asking the others to end and ending them


@dataclass(frozen=True)
class Flags:
    """Start a command as several processes of one job on this machine."""

    command: tyro.conf.Positional[tuple[str, ...]]
    """The command, after --."""
    processes: int = 2
    """How many."""
    devices: int = 1
    """Simulated devices of each."""


def environment(number: int, flags: Flags, port: int) -> dict[str, str]:
    """What process `number` is told: where the first one is, and its devices in place of any it would simulate."""
    xla = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(flags.processes),
        "JAX_PROCESS_ID": str(number),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_NUM_CPU_DEVICES": str(flags.devices),
        "XLA_FLAGS": xla.strip(),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def copy_lines(source, target, prefix: str) -> threading.Thread:
    """Copy what a process writes, each line behind its number."""

    def run():
        for line in source:
            target.write(f"{prefix}{line if line.endswith(chr(10)) else line + chr(10)}")
            target.flush()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def launch(flags: Flags) -> int:
    """Run the processes to their end; the exit status as in the module's docstring."""
    port, children, copies, received = free_port(), [], [], []

    def forward(number, frame):
        received.append(number)
        for child in children:
            child.send_signal(number)  # nothing to one that has ended

    previous = {each: signal.signal(each, forward) for each in (signal.SIGTERM, signal.SIGINT)}
    failed, asked = None, None
    try:
        for number in range(flags.processes):
            child = subprocess.Popen(
                flags.command,
                env=environment(number, flags, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C comes once, through us
            )
            children.append(child)
            copies.append(copy_lines(child.stdout, sys.stdout, f"[{number}] "))
            copies.append(copy_lines(child.stderr, sys.stderr, f"[{number}] "))
        for number in received:  # while the children were being started
            forward(number, None)
        while any(child.poll() is None for child in children):
            ended = [child.returncode for child in children if child.poll()]
            if ended and failed is None:
                failed, asked = ended[0], time.monotonic()
                for child in children:
                    child.terminate()
            if asked is not None and time.monotonic() - asked > GRACE_SECONDS:
                for child in children:
                    child.kill()
            time.sleep(0.05)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for copy in copies:
            copy.join()
        for each, handler in previous.items():
            signal.signal(each, handler)
    if failed is None:
        failed = next((child.returncode for child in children if child.returncode), 0)
    return 128 - failed if failed < 0 else failed


def main(args: Sequence[str] | None = None) -> int:
    flags = tyro.cli(Flags, args=args, prog="python -m experiments.launch_local", description=__doc__.splitlines()[0])
    if not flags.command or flags.processes < 1 or flags.devices < 1:
        print(
            f"error: launch_local: {flags.processes} processes of {flags.devices} devices, command "
            f"{' '.join(flags.command)!r}; wants at least one of each, and the command after --",
            file=sys.stderr,
        )
        return 2
    try:
        return launch(flags)
    except OSError as error:
        print(f"error: launch_local: cannot start {flags.command[0]!r}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
