"""Over a mesh, by the real compiler: each device runs the kernels on its own part and gathers nothing."""

import importlib.util
import json
import subprocess
import sys

import pytest

from pallas_kernels.profiler._aot import environment

# Gradients of what all tokens share add up over the batch; nothing else may travel.
NOTHING = dict.fromkeys(("hgrn", "decode", "lightnet", "rwkv7"), set())
ALLOWED = NOTHING | {"mamba": {"all-reduce"}, "rg_lru": {"all-reduce"}}


def compiled(tmp_path, *names: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "sharded", *names]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(tmp_path, *names: str):
    for name, found in compiled(tmp_path, *names).items():
        assert set(found) <= ALLOWED[name], f"{name}: {found}"


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install libtpu"
)


def test_nothing_is_gathered(tmp_path):
    check(tmp_path, "hgrn")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "mamba", "rg_lru", "lightnet", "rwkv7"])
def test_nothing_is_gathered_everywhere(tmp_path, name):
    check(tmp_path, name)
