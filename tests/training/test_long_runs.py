"""Faults of long runs: kills at any moment, a rank that hangs, clocks. LONG_RUN_KILLS sets the number of kills."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import stand_in

from lineax_seq.training import read_metrics
from lineax_seq.training._watchdog import STALLED, Watchdog

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LONG_RUN_KILLS", "3"))
STEPS = 60

RUN = """
import sys, time
from pathlib import Path
from training import stand_in

def slowly(n):
    time.sleep(0.02)

print("ready", flush=True)
stand_in.run(Path(sys.argv[1]), steps=int(sys.argv[2]), every=3, batches=stand_in.Hooked(slowly))
"""


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}


def losses(directory):
    return [(record["step"], record["loss"]) for record in read_metrics(directory) if "loss" in record]


@pytest.mark.slow
def test_kills_at_random_moments_do_not_change_a_run(tmp_path, record_property):
    stand_in.run(tmp_path / "whole", steps=STEPS, every=3)
    command, drawn, kills = [sys.executable, "-c", RUN, str(tmp_path / "run"), str(STEPS)], random.Random(5), 0
    while kills < KILLS:
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.readline()
            time.sleep(drawn.uniform(0, 8))
            if process.poll() is not None:
                break  # it got to its end: nothing is left to kill
            process.kill()
        assert process.returncode == -signal.SIGKILL
        kills += 1
    record_property("kills", kills)
    print(f"{kills} kills")
    assert kills
    stand_in.run(tmp_path / "run", steps=STEPS, every=3)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_process_that_stands_still_says_what_it_was_doing():
    said = []
    with Watchdog(0.1, "process 1 of 2", said.append) as watchdog:
        watchdog.at(4, "reading the batch of")
        time.sleep(0.5)
    (text,) = said
    assert text.startswith("error: process 1 of 2 has been reading the batch of step 4 for 0 seconds")


def test_a_process_that_goes_on_is_left_alone():
    said = []
    with Watchdog(2.0, "process 0 of 2", said.append) as watchdog:
        for step in range(10):
            watchdog.at(step, "waiting for")
            time.sleep(0.01)
    assert said == []


HANG = """
import sys, time
import jax
from experiments import train_recall
from lineax_seq.tasks import recall

class Hanging(recall.RecallTask):
    def batches(self, seed, reading):
        inner, asked = super().batches(seed, reading), 0
        class Batches:
            get_state, set_state, close = inner.get_state, inner.set_state, inner.close
            def __next__(self):
                nonlocal asked
                asked += 1
                if asked == 3 and jax.process_index() == 1:
                    time.sleep(10_000)
                return next(inner)
        return Batches()

train_recall.RecallTask = Hanging
sys.exit(train_recall.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_ends_the_job(tmp_path):
    launch = [sys.executable, "-m", "experiments.launch_local", "--processes", "2", "--devices", "1", "--"]
    flags = [
        *("--mesh", "data=2", "--run-dir", str(tmp_path / "run"), "--model.d-model", "16", "--model.num-layers", "1"),
        *("--training.batch-size", "2", "--training.steps", "6", "--training.stall-seconds", "60"),
    ]
    done = subprocess.run(
        [*launch, sys.executable, "-c", HANG, *flags],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == STALLED, done.stderr
    assert "[1] error: process 1 of 2 has been reading the batch of step 3 for" in done.stderr + done.stdout


def test_durations_are_of_clocks_that_never_jump():
    """time.time() may step back; it may only date things."""
    found = []
    for folder in ("lineax_seq", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                if re.search(r"\btime\.time\(|datetime\.(now|utcnow)\(", line) and "a date" not in line:
                    found.append(f"{path.name}:{number}")
    assert found == []
