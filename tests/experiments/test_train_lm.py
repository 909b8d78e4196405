"""The main job end to end on a small text: files, exit codes, exact resume, generation."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from experiments import generate, train_lm
from lineax_seq.data import ByteTokenizer
from lineax_seq.models import Decoder
from lineax_seq.tasks import TextTask, load_language_model
from lineax_seq.training import Run, parse_flags, read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 300


def flags(folder, *more, steps=STEPS):
    """One layer of width 16 on bytes; the text is the licence of this repository."""
    (folder / "text.txt").write_bytes((ROOT / "LICENSE").read_bytes())
    return [
        *("--data", str(folder / "text.txt"), "--data.tokenizer", "bytes", "--data.context", "32"),
        *("--data.cache-dir", str(folder / "corpora"), "--run-dir", str(folder / "run")),
        *("--model.vocab-size", "258", "--model.d-model", "16", "--model.num-layers", "1", "--model.pattern", "L"),
        *("--model.num-heads", "1", "--training.batch-size", "2", "--training.steps", str(steps)),
        *("--training.max-seconds", "None", "--training.eval-rows", "4", "--training.checkpoint-every", "50"),
        *("--training.eval-every", "100", "--training.samples", "1", "--training.sample-tokens", "8"),
        *("--optimizer.name", "adamw", "--optimizer.learning-rate", "0.01", *more),
    ]


def losses(folder):
    return [(r["step"], r["loss"]) for r in read_metrics(folder / "run") if "loss" in r]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train_lm.main(flags(folder)) == 0
    return folder


def test_a_run_leaves_everything_and_learns(whole):
    run = whole / "run"
    results = json.loads((run / "results.json").read_text())
    evaluations = [r["eval_bits_per_byte"] for r in read_metrics(run) if "eval_bits_per_byte" in r]
    assert len(evaluations) == 3 and evaluations[-1] == results["bits_per_byte"] < 5.0 < losses(whole)[0][1] / 0.6931
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "samples.txt").read_text().count(">>>") == 1
    assert {"gzip -9", "bzip2 -9", "xz -9e"} == set(results["compressors"])
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_a_finished_run_reports_again_without_training(whole, capsys):
    assert train_lm.main(flags(whole)) == 0
    output = capsys.readouterr()
    assert "held-out text" in output.out and "xz -9e" in output.out and "step 1/" not in output.err


def test_sigterm_saves_exits_0_and_the_same_command_ends_bit_identical(whole, tmp_path):
    command = [sys.executable, "-m", "experiments.train_lm", *flags(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, "".join(lines)
    assert "stopped by SIGTERM, saved" in lines[-1]
    saved = len(losses(tmp_path))
    assert 1 <= saved < STEPS and load_language_model(tmp_path / "run")[2] == saved
    assert not (tmp_path / "run" / "results.json").exists()
    assert train_lm.main(flags(tmp_path)) == 0
    assert losses(tmp_path) == losses(whole)
    read = [(f / "run" / "results.json").read_text() for f in (whole, tmp_path)]
    assert json.loads(read[0])["bits_per_byte"] == json.loads(read[1])["bits_per_byte"]


def test_non_finite_loss_exits_1_and_names_step_and_leaf(tmp_path, capsys):
    assert train_lm.main(flags(tmp_path, "--optimizer.learning-rate", "1e15")) == 1
    error = capsys.readouterr().err
    leaf = "(parameter|gradient of|updated parameter) [a-z]"
    assert re.search(rf"training stopped at step \d+: .*(nan|inf).*; the first bad leaf is {leaf}", error)
    assert "no checkpoint was saved" in error


@pytest.mark.slow
def test_bfloat16_compute_trains_float32_parameters(tmp_path):
    more = ["--model.dtype", "bfloat16", "--training.loss-chunk", "16", "--training.samples", "0"]
    assert train_lm.main(flags(tmp_path, *more, steps=100)) == 0
    model, _, step = load_language_model(tmp_path / "run")
    assert step == 100 and {str(x.dtype) for x in jax.tree.leaves(nnx.state(model))} == {"float32"}
    assert losses(tmp_path)[-1][1] < losses(tmp_path)[0][1] - 1.0


def test_other_flags_for_the_same_run_are_refused(whole, capsys):
    before = (whole / "run" / "config.json").read_text()
    assert train_lm.main(flags(whole, "--optimizer.weight-decay", "0.5", "--data.context", "64")) == 2
    error = capsys.readouterr().err
    assert "data.context: 32 there, 64 here" in error and "optimizer.weight_decay: 0.1 there, 0.5 here" in error
    assert (whole / "run" / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optimizer.learning-rat", "1"], "--optimizer.learning-rate"),
        (["--trainig.steps", "1"], "--training.steps"),
        (["--model.linear-options", "expand_vv=1"], "expand_v"),
        (["--training.batch-size", "5", "--training.microbatches", "2"], "microbatches"),
        (["--training.steps", "many"], "--training.steps"),
        (["--training.max-seconds", "inf"], "max_seconds is inf"),
        (["--optimizer.beta1", "1.5", "--optimizer.eps", "-1"], "beta1 is 1.5"),
        (["--optimizer.weight-decay", "nan"], "weight_decay is nan"),
        (["--optimizer.beta2", "1.0"], "beta2 is 1.0"),
        (["--model.rope-theta", "nan"], "rope_theta=nan, wants a finite number above 0"),
        (["--model.linear-options", "expand_v=NaN"], "expand_v=nan, wants a finite number above 0"),
        (["--model.linear-options", "form=foo"], "form='foo', wants one of"),
        (["--model.linear-options", "chunk_size=3"], "chunk_size=3, wants a power of two"),
        (["--model.linear-options", "expand_v=wide"], "expand_v='wide', wants a finite number above 0"),
    ],
)
def test_bad_flags_exit_2_and_say_what_to_do(more, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_lm.main(flags(tmp_path, *more))
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert message in re.sub(r"[\s│]+", " ", output.err + output.out)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (["--model.vocab-size", "4096"], "set --model.vocab-size 258"),
        (["--data.context", "100000"], "shorter length"),
        (["--training.max-seconds", "0.1"], "max_seconds is 0.1, too few for a step"),
        (["--training.profile-steps", "1:999"], "profile_steps: 1:999 is not within the steps"),
        (["--model.linear-options", "implementation=mosaic_gpu"], "mosaic_gpu: "),
        (["--model.pattern", "N", "--model.attention-options", "implementation=cudnn"], "cuDNN is not detected"),
        (["--data.context", "16", "--mesh", "seq=8"], "shards of 2 tokens are shorter than"),
        (["--freeze", "nothing*"], "no parameter matches 'nothing*'; there are embed.embedding, "),
        (["--freeze", "*"], "none of the 20 parameters is trainable"),
        (["--run-dir", "{folder}/text.txt/run"], "text.txt is no folder; choose another place"),
        (["--data.cache-dir", "{folder}/text.txt/cache"], "text.txt is no folder; choose another place"),
    ],
)
def test_what_does_not_fit_exits_2_and_leaves_no_run(more, message, tmp_path, capsys):
    more = [part.format(folder=tmp_path) for part in more]
    assert train_lm.main(flags(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def program(folder, name, *args, **environment):
    """A finished process of an experiment with its output as bytes."""
    command = [sys.executable, "-m", f"experiments.{name}", *args]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, env=surroundings, timeout=300)


def test_implicit_transfers_may_be_forbidden(tmp_path):
    more = ["--training.eval-every", "2", "--training.max-seconds", "300"]
    done = program(tmp_path, "train_lm", *flags(tmp_path, *more, steps=4), JAX_TRANSFER_GUARD="disallow")
    assert done.returncode == 0, done.stderr.decode()
    assert len(losses(tmp_path)) == 4


def test_a_terminal_that_knows_ascii_only(whole, tmp_path):
    prompt = "Ünïcode 😀"
    done = program(tmp_path, "generate", str(whole / "run"), "--prompt", prompt, "-n", "2", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"?n?code ?")


def test_a_reader_that_stops_reading_ends_generation(whole):
    command = f"{sys.executable} -m experiments.generate {whole / 'run'} -n 2000 | head -c 5; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.endswith("\n141\n") or done.stdout[5:] == "141\n", done.stdout
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr


def test_a_run_directory_of_an_earlier_version_goes_on(whole, tmp_path, capsys):
    """Without the fields that came later; one whose fields are unknown is told so."""
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.copytree(whole / "corpora", tmp_path / "corpora")
    file = tmp_path / "run" / "config.json"
    record = json.loads(file.read_text())
    for name in ("path", "cache_dir"):
        record["config"]["data"][name] = flags(tmp_path)[1 if name == "path" else 7]
    del record["config"]["freeze"]
    file.write_text(json.dumps(record))
    assert train_lm.main(flags(tmp_path)) == 0
    assert "held-out text" in capsys.readouterr().out
    record["config"]["model"]["layers"] = 3
    file.write_text(json.dumps(record))
    assert train_lm.main(flags(tmp_path)) == 2
    assert "has no field 'layers'" in capsys.readouterr().err


def test_a_token_file_that_was_cut_short_is_made_anew(tmp_path):
    assert train_lm.main(flags(tmp_path, "--training.samples", "0", steps=1)) == 0
    (tokens,) = (tmp_path / "corpora").glob("*/train/tokens.bin")
    os.truncate(tokens, tokens.stat().st_size // 2)
    other = flags(tmp_path, "--training.samples", "0", "--run-dir", str(tmp_path / "other"), steps=1)
    with pytest.warns(UserWarning, match="is damaged .* and is made anew"):
        assert train_lm.main(other) == 0
    losses = [[r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("run", "other")]
    assert losses[0] == losses[1]


FULL = """
mount -t tmpfs -o size={size} none {disk} || exit 99
{python} -m experiments.train_lm "$@"
status=$?
mount -o remount,size=100m {disk} && {python} -m experiments.train_lm "$@" && cp -r {disk}/run {kept}
exit $status
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["200k", "700k", "1100k"])
def test_a_full_disk_ends_in_a_sentence_and_the_same_command_goes_on(whole, tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("a small disk needs the command unshare")
    script = FULL.format(size=size, disk=disk, python=sys.executable, kept=tmp_path / "kept")
    more = ["--run-dir", str(disk / "run"), "--training.keep-checkpoints", "9", "--training.checkpoint-every", "20"]
    command = ["unshare", "--mount", "bash", "-c", script, "train", *flags(tmp_path, *more)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=900)
    if done.returncode in (1, 99) and "unshare" in done.stderr or done.returncode == 99:
        pytest.skip("a small disk needs the right to mount one")
    assert done.returncode in (1, 2), done.stderr
    assert "No space left on device; make room, then the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    kept = [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "kept") if "loss" in r]
    assert kept == losses(whole)


def test_frozen_parameters_of_a_model(tmp_path):
    assert train_lm.main(flags(tmp_path, "--freeze", "embed*", steps=3)) == 0
    model, _, _ = load_language_model(tmp_path / "run")
    fresh = Decoder(model.config, rngs=nnx.Rngs(0))
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(fresh))
    )
    embedding = changed.pop("embed")
    assert not any(jax.tree.leaves(embedding)) and all(jax.tree.leaves(changed))


def test_profile_range_behind_the_run_is_refused(whole, capsys):
    assert train_lm.main(flags(whole, "--training.profile-steps", "3:5")) == 2
    assert "profile_steps: 3:5 is not within the steps" in capsys.readouterr().err


def test_changed_text_is_refused(whole, capsys):
    command = flags(whole)
    text = (whole / "text.txt").read_text()
    (whole / "text.txt").write_text(text + "more")
    try:
        assert train_lm.main(command) == 2
        assert "has changed since this run began" in capsys.readouterr().err
    finally:
        (whole / "text.txt").write_text(text)


def test_a_drawn_seed_is_kept(tmp_path):
    config = parse_flags(train_lm.DEFAULT, flags(tmp_path, "--training.seed", "None"), program="", description="")
    seed = Run(config, TextTask(config)).resolved["seed"]
    assert Run(config, TextTask(config)).resolved["seed"] == seed
    assert json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]["seed"] == seed


def test_help_shows_defaults_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        train_lm.main(["--help"])
    assert stop.value.code == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for part in ("--data", "--model.pattern", "Peak learning rate. (default:", "Tokens in a row. (default: 2048)"):
        assert part in text


def test_generate_streams_what_the_model_draws(whole, capsys):
    command = [str(whole / "run"), "--prompt", "The Work", "--max-new-tokens", "12", "--seed", "4"]
    assert generate.main(command) == 0
    first = capsys.readouterr()
    assert first.out.startswith("The Work") and len(first.out) > len("The Work\n")
    assert f"step {STEPS} of" in first.err
    assert generate.main(command) == 0
    assert capsys.readouterr().out == first.out


def test_stream_never_shows_a_part_of_a_character():
    shown = []
    take = generate.stream(ByteTokenizer(), shown.append)
    for token in "né😀".encode()[:-1]:
        take(token)
    assert shown == ["n", "é"]
    take(None, last=True)
    assert "".join(shown) == "né\ufffd"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["{run}", "--step", "7"], "no checkpoint of step 7"),
        (["{run}", "--top-p", "2"], "top_p"),
        (["{empty}"], "no finished checkpoint"),
    ],
)
def test_generate_refuses_with_exit_2(whole, tmp_path, capsys, command, message):
    (tmp_path / "config.json").write_text((whole / "run" / "config.json").read_text())
    (tmp_path / "checkpoints").mkdir()
    command = [part.format(run=whole / "run", empty=tmp_path) for part in command]
    assert generate.main(command) == 2
    assert message in capsys.readouterr().err
