"""A script: the memory of a chunk form's gradient, compiled for an accelerator that is not there.

`python tests/core/aot_memory.py gpu|tpu RECURRENCE BATCH` prints a line of JSON: bytes of the inputs, temporary bytes,
and seconds of processor time that tracing, lowering and compiling took.
"""

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import gpu_compiler  # noqa: E402

if "gpu" in sys.argv:
    gpu_compiler.add_to_path()

import jax  # noqa: E402  (it looks for plug-ins on the path when it is imported)
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

import lineax_seq as ls  # noqa: E402
from pallas_kernels import Machine, tracing_for  # noqa: E402

SIZES = dict(T=4096, H=8, HV=8, K=128, V=128, D=1024, N=16, L=13)


def device_and_machine(platform: str):
    if platform == "gpu":
        return gpu_compiler.h100(), Machine("gpu", gpu_compiler.KIND)
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    return device, Machine("tpu", "TPU v5 lite")


def main(platform: str, name: str, batch: str) -> None:
    operator = ls.RECURRENCES[name]
    device, machine = device_and_machine(platform)
    place = jax.sharding.SingleDeviceSharding(device)
    args = jax.eval_shape(lambda: operator.example(jax.random.key(0), B=int(batch), dtype=jnp.bfloat16, **SIZES))
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)

    def loss(args):
        return jnp.square(operator(**args, implementation="xla")[0].astype(jnp.float32)).sum()

    start = time.process_time()
    with tracing_for(machine):
        memory = jax.jit(jax.grad(loss)).lower(args).compile().memory_analysis()
    assert memory is not None, "this jax has no memory analysis of a compiled program"
    inputs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args))
    print(json.dumps(dict(inputs=inputs, temporary=memory.temp_size_in_bytes, seconds=time.process_time() - start)))


if __name__ == "__main__":
    main(*sys.argv[1:])
