"""Processes that find each other, agree, and end together; how a cluster is recognised."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lineax_seq import parallel
from lineax_seq.parallel import multihost

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "experiments.launch_local"]


HERE = dict(cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True)


def launched(*command):
    return subprocess.run([*LAUNCH, *command], **HERE, capture_output=True, timeout=120)


AGREE = """
import sys, time
from pathlib import Path
import jax, numpy as np
from lineax_seq import parallel
parallel.initialize()
me, first = jax.process_index(), parallel.is_main()
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
assert parallel.broadcast({"seed": 7 if first else 8, "name": "é"}) == {"seed": 7, "name": "é"}
assert parallel.broadcast([] if first else None) == []
with parallel.main_first():
    if first:
        time.sleep(0.3)
        Path(sys.argv[1]).touch()
    assert Path(sys.argv[1]).exists()
agree = parallel.Agreement()
assert [agree(0), agree(15 if not first else 0), agree(0), agree(0)] == [0, 0, 15, 0]
assert agree(3 + me, wait=True) == 4
mesh = parallel.make_mesh("data=2,seq=2")
part = parallel.local_part(mesh, 4, 6)
rows = np.arange(24, dtype=np.float32).reshape(4, 6)
batch = parallel.place_batch(mesh, part, 6, {"x": rows[2 * part.block : 2 * part.block + 2]})
assert part == (me, 2, None) and (parallel.to_host(batch)["x"] == rows).all()
mesh = parallel.make_mesh("seq=4")
part = parallel.local_part(mesh, 4, 12)
rows = np.arange(48, dtype=np.float32).reshape(4, 12)
batch = parallel.place_batch(mesh, part, 12, {"x": rows[:, part.columns]})
assert part == (0, 1, slice(6 * me, 6 * me + 6)) and (parallel.to_host(batch)["x"] == rows).all()
print("agreed", me)
"""


def test_processes_agree(tmp_path):
    command = sys.executable, "-c", AGREE, str(tmp_path / "made")
    done = launched("--processes", "2", "--devices", "2", "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"[0] agreed 0", "[1] agreed 1"} <= set(done.stdout.splitlines())


def test_one_process_agrees_with_itself():
    parallel.initialize(detect="never")
    assert jax.process_count() == 1 and parallel.is_main()
    assert parallel.broadcast({"a": 1}) == {"a": 1} and parallel.Agreement()(5) == 5
    with parallel.main_first():
        pass


def test_the_first_failure_ends_all_and_is_the_status():
    code = (
        "import os, sys, time; time.sleep(0.2); sys.exit(7) if os.environ['JAX_PROCESS_ID'] == '1' else time.sleep(60)"
    )
    done = launched("--processes", "3", "--", sys.executable, "-c", code)
    assert done.returncode == 7


def test_signals_reach_every_process():
    code = (
        "import signal, sys, os, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    command = [*LAUNCH, "--processes", "2", "--", sys.executable, "-c", code]
    with subprocess.Popen(command, **HERE, stdout=subprocess.PIPE) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        lines += process.stdout.readlines()
    assert process.returncode == 0
    assert sorted(lines) == ["[0] bye\n", "[0] ready\n", "[1] bye\n", "[1] ready\n"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("--processes", "2"), "the command after --"),
        (("--processes", "0", "--", "true"), "wants at least one of each"),
        (("--", "no-such-command-anywhere"), "cannot start 'no-such-command-anywhere'"),
    ],
)
def test_launch_refuses(command, message):
    done = launched(*command)
    assert done.returncode == 2 and message in done.stderr


SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # the shell of an allocation, outside of srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod of its own
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, "TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_clusters_are_recognised(environment, found):
    assert multihost.cluster(environment) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "missing JAX_PROCESS_ID; give coordinator, processes and process id together"),
        (("host", 2, 0), "wants HOST:PORT"),
        (("host:1", 2, 2), "process 2 of 2: wants HOST:PORT and a process id from 0 to processes - 1"),
    ],
)
def test_initialize_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        parallel.initialize(*arguments)


def test_initialize_asks_the_cluster_only_where_there_is_one(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: asked.append((args, options)))
    parallel.initialize(detect="auto")
    assert asked == []
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    parallel.initialize(detect="never")
    assert asked == []
    parallel.initialize()
    parallel.initialize("host:1", 2, 1)
    assert asked == [((), {}), (("host:1", 2, 1), {"cluster_detection_method": "deactivate"})]
    with pytest.raises(ValueError, match="detect='sometimes'"):
        parallel.initialize(detect="sometimes")
