"""Compiles a recurrence over sharded time for TPU v5e:4x4 and prints what the program holds, as one line of JSON.

`python aot_tpu.py NAME forward|both`: a process of its own, as the TPU compiler wants other settings than the tests'
devices.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import lineax_seq as ls
from tests import hlo

SHARD = 1024


def scheduled(name: str, program: str, mesh: Mesh) -> str:
    """The HLO of one layer's outputs, `forward`, or of its gradients, `both`."""
    operator = ls.RECURRENCES[name]
    sizes = dict(B=1, T=16 * SHARD, H=2, K=128, V=128)
    args = jax.eval_shape(lambda: operator.example(jax.random.key(0), dtype=jnp.bfloat16, **sizes))
    place = NamedSharding(mesh, P(None, "seq"))
    args = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for k, x in args.items()}
    call = ls.parallel.sequence_parallel(operator, mesh, strategy="all_gather")
    outputs = lambda args: call(**args, implementation="xla")[0]  # noqa: E731
    loss = lambda args: (outputs(args).astype(jnp.float32) ** 2).sum()  # noqa: E731
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit({"forward": outputs, "both": jax.grad(loss)}[program]).lower(args).compile().as_text()


def facts(text: str) -> dict:
    """Counts of collectives, and for each asynchronous one how many matrix products stand between start and done."""
    computations, name = {}, None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "entry" if line.startswith("ENTRY") else head.group(1)
            computations[name] = []
        elif name:
            computations[name].append(line)

    def called(line: str) -> list[str]:
        """Fusions and the branches of conditionals."""
        several = re.findall(r"branch_computations=\{([^}]*)\}", line)
        return re.findall(r"calls=%([\w.\-]+)", line) + [
            name for names in several for name in re.findall(r"%([\w.\-]+)", names)
        ]

    def multiplies(name: str) -> bool:
        lines = computations.get(name, [])
        return any(" convolution(" in line or " dot(" in line for line in lines) or any(
            multiplies(inner) for line in lines for inner in called(line)
        )

    lines = computations["entry"]
    products = {i for i, line in enumerate(lines) if any(multiplies(inner) for inner in called(line))}
    starts = [
        i for i, line in enumerate(lines) if re.search(r"%(async-collective-start|all-gather-start)[\w.]* =", line)
    ]
    ends = [i for i, line in enumerate(lines) if re.search(r"%(async-collective-done|all-gather-done)[\w.]* =", line)]
    counts = hlo.counts(text)
    return {
        "all_gathers": counts.get("all-gather", 0),
        "others": sum(counts.get(kind, 0) for kind in ("collective-permute", "all-to-all", "reduce-scatter")),
        "products_during": [sum(i < p < j for p in products) for i, j in zip(starts, ends, strict=True)],
    }


if __name__ == "__main__":
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = Mesh(topology.devices, ("seq",), axis_types=(AxisType.Auto,))
    print(json.dumps(facts(scheduled(*sys.argv[1:3], mesh))))
