"""Compile recurrences for four TPUs over batch and heads or channels; prints the collectives of each program as JSON.

A process of its own, as the compiler takes its flags when it is loaded: `python -m sharded NAME ...`.
"""

import json
import sys

import hlo
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import KERNELS, machine_here
from pallas_kernels.profiler import _programs

SIZES = dict(B=4, T=256, H=4, HV=4, K=64, V=64, D=512, N=16)
# Which axis of the mesh owns a dimension.
OWNERS = {"B": "data", "H": "model", "HV": "model", "D": "model"}


def four_devices() -> jax.sharding.Mesh:
    """A mesh of devices that aren't there, data x model.

    Explicit axes: what partitions a kernel over automatic ones needs a process that has the devices.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def counts(text: str) -> dict[str, int]:
    """Collectives in a program that must have a kernel."""
    assert "tpu_custom_call" in text, "no kernel in the program"
    return hlo.counts(text)


def collectives(name: str, owners: dict[str, str]) -> dict[str, int]:
    """How many of each kind the program of a recurrence's outputs and gradients holds."""
    operator = _programs.operators()[name]
    fn, (arguments, d_o, d_state) = _programs.recurrence(name, "mosaic_tpu", SIZES, backward=True)
    mesh = four_devices()
    place = lambda x, letters: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*(owners.get(letter) for letter in letters)))
    )
    arguments = {argument: place(x, operator.arguments[argument].letters) for argument, x in arguments.items()}
    d_o = place(d_o, ["B", "T", *operator.recurrence.fields[operator.recurrence.output_field].split()])
    heads = "D" if operator.recurrence.fields[operator.recurrence.output_field] == "D" else "H"
    d_state = jax.tree.map(lambda x: place(x, ["B", heads]), d_state)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(fn).lower(arguments, d_o, d_state).compile().as_text()
    return counts(text)


def decoding() -> dict[str, int]:
    mesh = four_devices()
    place = lambda dims, *owners: jax.ShapeDtypeStruct(  # noqa: E731
        dims, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*owners))
    )
    token = lambda *dims: place((4, 1, 16, *dims), "data", None, "model")  # noqa: E731
    fields = {**dict.fromkeys(("q", "k", "v", "g"), token(128)), "beta": token()}
    step = KERNELS["tpu", "step", "delta_diagonal_decay"]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(lambda fields, state: step(machine_here(), 1.0, None, fields, None, state))
        text = run.lower(fields, place((4, 16, 128, 128), "data", "model")).compile().as_text()
    return counts(text)


if __name__ == "__main__":
    found = {}
    for name in sys.argv[1:]:
        owners = {"B": "data"} if name == "mamba" else OWNERS
        found[name] = decoding() if name == "decode" else collectives(name, owners)
    print(json.dumps(found))
