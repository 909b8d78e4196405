"""What compilers make of a chunk form's gradient: memory on accelerators that are not here, size of a CPU's program."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_compiler
import jax
import pytest

import lineax_seq as ls

SCRIPT = Path(__file__).with_name("aot_memory.py")
ROOT = SCRIPT.parents[2]
TPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling opens no TPU that another process could hold
}


def memory(platform: str, name: str, batch: int) -> dict:
    """Bytes of inputs and of temporary memory of a gradient in bfloat16, T = 4096, 8 heads of 128."""
    if platform == "gpu" and not gpu_compiler.installed():
        pytest.skip("the GPU compiler is not installed: see gpu-compiler in the Makefile")
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install libtpu")
    changed = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")  # by the tests' environment, for the tests' CPU devices
    env = {name: value for name, value in os.environ.items() if name not in changed}
    # Such programs are not read back from the compilation cache: jax asks a device for that.
    env |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0", **TPU_VARIABLES}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, SCRIPT, platform, name, str(batch)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


# A quick one for each platform: others take the TPU's compiler half a minute and more.
QUICK = [("gpu", "gla", 1), ("tpu", "simple_gla", 1)]
# Bounds of eight sequences' temporary memory over their inputs: a quarter to a third more than the larger of both
# platforms' when they were set. Mamba's inputs are small beside its outputs, log-linear attention's beside its states.
EIGHT = {"gla": 6, "gated_delta_rule": 6, "kda": 6.5, "rwkv7": 6, "mamba": 9, "log_linear_attention": 13.5}
SLOW = [case for case in itertools.product(("gpu", "tpu"), EIGHT, (1, 8)) if case not in QUICK]


@pytest.mark.parametrize(
    ("platform", "name", "batch"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_memory_where_there_is_no_kernel(platform, name, batch):
    """Bounded by the inputs. A group holds as many tokens whatever the batch: eight sequences take the memory of one's
    groups, and beside it only what exists once for every token."""
    facts = memory(platform, name, batch)
    assert facts["temporary"] <= (20 if batch == 1 else EIGHT[name]) * facts["inputs"], facts


# Each about a quarter more than was counted when the bound was set.
@pytest.mark.parametrize(("name", "lines", "fusions"), [("gla", 1550, 180), ("kda", 3300, 520)])
def test_a_gradient_s_program_stays_small(name, lines, fusions):
    """Compile time follows the size of the program, before XLA and after it, which no noisy machine disturbs."""
    operator = ls.RECURRENCES[name]
    args = jax.eval_shape(lambda: operator.example(jax.random.key(0), B=1, T=2048, H=4, HV=4, K=128, V=128))
    lowered = jax.jit(jax.grad(lambda args: operator(**args)[0].sum())).lower(args)
    assert lowered.as_text().count("\n") <= lines
    assert lowered.compile().as_text().count(" fusion(") <= fusions
