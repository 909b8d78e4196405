"""A run is the same over any mesh and any number of processes: a hybrid with convolutions on packed documents."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import train_lm
from lineax_seq.models import Decoder, generate
from lineax_seq.tasks import TextTask, load_language_model
from lineax_seq.training import Run, parse_flags, read_metrics

ROOT = Path(__file__).parents[2]
STEPS, LAST_SAVED = 4, 2
TWO_PROCESSES = "data=2,seq=4"


def flags(folder, run, *more):
    """Two layers of width 16 on packed pieces of the licence, none of which is a whole row."""
    words, pieces = (ROOT / "LICENSE").read_text().split(), []
    while words:
        count = 2 + 7 * len(pieces) % 13
        pieces.append(json.dumps({"text": " ".join(words[:count])}))
        words = words[count:]
    (folder / "text.jsonl").write_text("\n".join(pieces))
    return [
        *("--data", str(folder / "text.jsonl"), "--data.tokenizer", "bytes", "--data.context", "32"),
        *("--data.rows", "packed", "--data.cache-dir", str(folder / "corpora"), "--run-dir", str(folder / run)),
        *("--model.vocab-size", "258", "--model.d-model", "16", "--model.num-layers", "2", "--model.pattern", "LN"),
        *("--model.num-heads", "2", "--training.batch-size", "4", "--training.steps", str(STEPS)),
        *("--training.max-seconds", "None", "--training.seed", "0", "--training.eval-rows", "4"),
        *("--training.eval-every", "None", "--training.checkpoint-every", str(LAST_SAVED), "--training.samples", "0"),
        *("--optimizer.learning-rate", "0.01", *more),
    ]


def curve(run):
    """Losses and gradient norms of the steps, then the evaluation at the end."""
    records = read_metrics(run)
    steps = [(r["loss"], r["grad_norm"]) for r in records if "loss" in r]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    return np.array([*steps, (records[-1]["eval_loss"], records[-1]["eval_bits_per_byte"])])


def assert_same_curve(run, want):
    """Within what float32 sums in another order may differ. Without the halo the curves are 1e-3 to 5e-2 apart."""
    np.testing.assert_allclose(curve(run), want, rtol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """A few steps of a small model: compiling is nearly all of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of the processes that are started here
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()  # other tests compare bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_device(folder):
    assert train_lm.main(flags(folder, "one")) == 0
    losses = curve(folder / "one")
    assert losses[STEPS - 1, 0] < losses[0, 0] - 0.2
    return losses


def test_rows_and_time_over_eight_devices(folder, one_device):
    assert train_lm.main(flags(folder, "mesh", "--mesh", TWO_PROCESSES)) == 0
    assert_same_curve(folder / "mesh", one_device)


# A run that calls `before(n)` in process 1 before it reads its n-th batch, n = 1, 2, ...
HOOKED = """
import sys
import jax
from experiments import train_lm
from lineax_seq.data import train_iterator
from lineax_seq.tasks import text

class Batches:
    def __init__(self, *args, **options):
        self.asked, self.iterator = 0, train_iterator(*args, **options)
        self.get_state, self.set_state = self.iterator.get_state, self.iterator.set_state

    def __next__(self):
        self.asked += 1
        if jax.process_index() == 1:
            before(self.asked)
        return next(self.iterator)

text.train_iterator = Batches
sys.exit(train_lm.main(sys.argv[2:]))
"""
# Process 0 is in step 4 already, and waits for process 1; step 2 was saved while step 3 ran.
DIE = """
def before(n):
    if n == 4:
        import os, signal, sys, time
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
"""
STOP = """
def before(n):
    if n == 2:
        import signal
        signal.raise_signal(signal.SIGTERM)
"""


def launched(*command):
    """The command as two processes of four devices: exit status and what they wrote."""
    launch = [sys.executable, "-m", "experiments.launch_local", "--processes", "2", "--devices", "4", "--"]
    here = dict(cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    done = subprocess.run([*launch, sys.executable, *command], **here, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def killed(folder, one_device):
    """A run of two processes, one of which was killed: its directory, which the checkpoint of step 2 is in."""
    run = folder / "killed"
    saved = run / "checkpoints" / str(LAST_SAVED)
    status, output = launched("-c", DIE + HOOKED, str(saved), *flags(folder, "killed", "--mesh", TWO_PROCESSES))
    assert status == 128 + signal.SIGKILL, output
    assert saved.is_dir() and not (run / "results.json").exists()
    assert output.count("step 1/") == 1, output  # one of them speaks
    return run


def test_two_processes_and_a_kill(folder, killed, one_device):
    """Two processes of four devices, before and after one was killed in a step, give the curve of one device."""
    shutil.copytree(killed, folder / "resumed")
    status, output = launched("-m", "experiments.train_lm", *flags(folder, "resumed", "--mesh", TWO_PROCESSES))
    assert status == 0, output
    assert f"continuing after step {LAST_SAVED} of {STEPS}" in output
    assert_same_curve(folder / "resumed", one_device)


def test_a_checkpoint_moves_to_another_mesh(folder, killed, one_device):
    """From two processes and time over four devices to one process, split parameters and time over two."""
    shutil.copytree(killed, folder / "moved")
    assert train_lm.main(flags(folder, "moved", "--mesh", "fsdp=2,tensor=2,seq=2")) == 0
    assert_same_curve(folder / "moved", one_device)


@pytest.mark.slow
def test_a_checkpoint_moves_to_one_device_and_generates(folder, killed, one_device):
    shutil.copytree(killed, folder / "alone")
    assert train_lm.main(flags(folder, "alone")) == 0
    assert_same_curve(folder / "alone", one_device)
    model, tokenizer, step = load_language_model(folder / "alone")
    assert step == STEPS and len(generate(model, [[tokenizer.bos_id]], max_new_tokens=2)[0]) <= 2


def run_of(folder, *more):
    config = parse_flags(train_lm.DEFAULT, flags(folder, "unused", *more), program="", description="")
    return Run(config, TextTask(config))


def test_state_is_split_and_generation_runs_over_the_mesh(folder, tmp_path):
    job = run_of(folder, "--mesh", "data=2,fsdp=2,tensor=2", "--run-dir", str(tmp_path / "split"))
    state = job.new_state(0)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    held = sum(x.addressable_shards[0].data.size for x in leaves)
    assert held < 1.1 * sum(x.size for x in leaves) / 4  # over fsdp and tensor; data holds copies

    alone = run_of(folder, "--run-dir", str(tmp_path / "whole"))
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(job.config.model, rngs=nnx.Rngs(0))))
    texts = [
        generate(nnx.merge(graphdef, params), [[257, 84, 104], [257]], max_new_tokens=4, temperature=0.0)
        for params in (state.params, alone.new_state(0).params)
    ]
    assert texts[0] == texts[1]


def test_what_does_not_fit_is_refused(folder, capsys):
    assert train_lm.main(flags(folder, "refused", "--mesh", "seq=4")) == 2
    assert "asks for 4 devices, and there are 8; set data=2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        train_lm.main(flags(folder, "refused", "--mesh", "data=8"))
    assert stop.value.code == 2 and "the next one that fits is 8" in " ".join(capsys.readouterr().err.split())
    assert train_lm.main(flags(folder, "refused", "--distributed.processes", "2")) == 2
    assert "missing JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID" in capsys.readouterr().err
    assert not (folder / "refused").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(folder, one_device):
    command = flags(folder, "stopped", "--mesh", TWO_PROCESSES)
    status, output = launched("-c", STOP + HOOKED, "", *command)
    assert status == 0 and output.count("stopped by SIGTERM, saved") == 1, output
    assert len([r for r in read_metrics(folder / "stopped") if "loss" in r]) == 3  # the step after the signal's
    assert train_lm.main(command) == 0
    assert_same_curve(folder / "stopped", one_device)


MORE = {
    "microbatches": ["--mesh", "data=2,seq=4", "--training.microbatches", "2"],
    "windows": ["--mesh", "seq=8", "--data.rows", "windows"],
    "zigzag": ["--mesh", "data=2,seq=4", "--model.attention-options", 'strategy="zigzag"'],
    "ring": ["--mesh", "data=2,seq=4", "--model.attention-options", 'strategy="ring"'],
    "muon": ["--mesh", "fsdp=4,seq=2", "--model.d-model", "32"],
    "rematerialised": ["--mesh", "fsdp=2,seq=4", "--model.remat", "dots"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_ways(name, folder):
    more = MORE[name]
    assert train_lm.main(flags(folder, f"{name}-one", *more[2:])) == 0
    assert train_lm.main(flags(folder, f"{name}-mesh", *more)) == 0
    assert_same_curve(folder / f"{name}-mesh", curve(folder / f"{name}-one"))
