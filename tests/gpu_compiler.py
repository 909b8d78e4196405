"""An H100 to compile for, on a machine without one. Import this before jax.

`make test` installs the compiler outside the environment, in its folder `gpu-compiler`. It is not on the path of test
processes: JAX loads every plug-in that it finds there, and this one complains of missing CUDA libraries unless
JAX_PLATFORMS says cpu. A process that compiles for a GPU calls `add_to_path`, and sets JAX_PLATFORMS=cpu.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

MODULE = "jax_cuda13_plugin"
KIND = "NVIDIA H100 80GB HBM3"
_FOLDER = Path(sys.prefix) / "gpu-compiler"
# What the compiler asks a device for, as an H100 answers.
_CONFIGURATION = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{KIND}"
"""


def installed() -> bool:
    return (_FOLDER / MODULE).is_dir() or importlib.util.find_spec(MODULE) is not None


def add_to_path() -> None:
    assert "jax" not in sys.modules, "jax looks for plug-ins when it is imported"
    sys.path.append(str(_FOLDER))


def h100() -> Any:
    """The device."""
    from jax.experimental import topologies

    described = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=_CONFIGURATION
    )
    return described.devices[0]
