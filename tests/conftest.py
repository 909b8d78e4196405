"""The environment of every test: simulated devices, full float32 precision, a compilation cache that persists.

It goes through environment variables, so that the processes that tests start have it too.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DEVICES = 8
UNOPTIMISED = "--xla_backend_optimization_level=0"
MAPS = 30_000  # that a process may hold before it forgets what it compiled

if "jax" in sys.modules:
    raise pytest.UsageError("tests/conftest.py: jax was imported before it; run pytest without the plugin that does so")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}".strip()
# Tests that compare float32 must not measure what a matrix unit rounds off.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Small programs are most of the compile time here: no program is too small or too quick to keep.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402  (reads the variables when it is imported)


def pytest_configure(config: pytest.Config) -> None:
    """Quick tests compile much and compute little: machine code that nobody optimised halves their time. All of XLA's
    own passes run. With the slow ones, everything is compiled as users' programs are."""
    if "not slow" in config.option.markexpr and UNOPTIMISED not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" {UNOPTIMISED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """When several processes share the work, a recurrence's tests go to one of them, and else a file's: what is
    compiled once stays with those that use it."""
    for item in items:
        operator = getattr(item, "callspec", None) and item.callspec.params.get("operator")
        group = getattr(operator, "name", None) or item.location[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Every compiled program maps some memory, and Linux gives a process 65,530 maps and then a segmentation fault."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 and int64 exist while the test runs: Python floats and `jnp.ones` become float64.

    Only the test's own thread has them. Arrays made in it keep their dtype, and what is jitted in it is compiled anew.
    Inside one test that needs both, use `with jax.enable_x64(True):` instead.
    """
    with jax.enable_x64(True):
        yield
