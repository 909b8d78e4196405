"""The two kernels of a family, from its formulas for one head.

All heads of a block are worked on in one grid step, so that the matrix units have independent products to overlap. The
state is an output block, which stays in vector memory over a head's chunks. The backward pass walks the chunks from
right to left and starts each from the state that entered it, which the forward pass saves in the dtype that products
read it in. Nothing else goes through HBM.
"""

import functools
from collections.abc import Generator, Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ._chunk import Chunk, Gate
from ._heads import Reader, Writer
from ._pallas_call import pallas_call
from ._tiling import Tiling

_COMPILER = dict(
    dimension_semantics=("parallel", "parallel", "arbitrary"),
    # of the smallest vector memory among the targets (64 MiB), what leaves room for XLA's own buffers
    vmem_limit_bytes=56 << 20,
)


class _GridStep:
    """What a grid step of either kernel works on: the chunk's masks and gates, the heads of its blocks."""

    def __init__(self, tiling: Tiling, refs: Mapping, chunk_index):
        family, size = tiling.family, tiling.block_sizes.chunk
        self.tiling, self._refs = tiling, {name: refs[f"{name}_ref"] for name in family.fields}
        gates = {name: self._refs[name][0, 0].astype(jnp.float32) for name in family.numbers}
        gates = family.gates(Chunk(size, tiling.operands, tiling.scale, None), gates)
        rows = [*gates.values(), *([refs["count_ref"][0, 0]] if tiling.resets else [])]
        pairs = list(zip(rows, _transposed(rows) if rows else [], strict=True))
        count = Gate(*pairs.pop()) if tiling.resets else None
        self.gates = dict(zip(gates, pairs, strict=True))
        self.chunk = Chunk(size, tiling.operands, tiling.scale, count)
        self.valid = None
        if tiling["T"] % size:
            left = tiling["T"] - chunk_index * size
            self.valid = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) < left
        self.forget()

    def forget(self) -> None:
        """Reads inputs anew from here on: values that wait for their second use would fill the registers."""
        self._readers = {name: self.reader(name, self._refs[name]) for name in self.tiling.family.rows}

    def reader(self, name: str, ref) -> Reader:
        """Of the block of a field, or of an array that is laid out as this field is."""
        return Reader(ref, self.tiling.width(name), self.valid, self.tiling.interpret)

    def writer(self, name: str, ref) -> Writer:
        return Writer(ref, self.tiling.width(name), self.tiling.interpret)

    def inputs(self, head: int) -> dict:
        """By field, of a value head."""
        x = {name: reader[self.of(name, head)] for name, reader in self._readers.items()}
        x |= {name: Gate(row[head : head + 1], col[:, head : head + 1]) for name, (row, col) in self.gates.items()}
        return x

    def of(self, name: str, head: int) -> int:
        """The head of the field that a value head uses."""
        return head if self.tiling.family.fields[name].startswith("HV") else head // self.tiling.shared


def _transposed(rows: list[jax.Array]) -> list[jax.Array]:
    """`[R, C]` arrays -> `[C, R]`, all in one transposition of whole tiles."""
    sizes = [x.shape[0] for x in rows]
    stack = jnp.concatenate(rows, axis=0) if len(rows) > 1 else rows[0]
    padding = -stack.shape[0] % 8
    if padding:
        stack = jnp.concatenate([stack, jnp.zeros((padding, stack.shape[1]), stack.dtype)], axis=0)
    columns, out, start = stack.T, [], 0
    for size in sizes:
        out.append(columns[:, start : start + size])
        start += size
    return out


def _side_by_side(tiling: Tiling) -> list[range]:
    """The heads that take turns with one another.

    They are fewer where heads are wide and operands float32: what waits, states `[V, K]` among it, fills the vector
    memory.
    """
    widths = max(tiling["K"], tiling["V"]) * tiling.operands.itemsize // 512  # in rows of 128 float32
    heads, turns = tiling.block_sizes.heads, max(tiling.family.turns // max(widths, 1) ** 2, 1)
    return [range(first, min(first + turns, heads)) for first in range(0, heads, turns)]


def _in_turns(heads: Iterable) -> list:
    """The results of several heads. A head that is a generator yields where another may take its turn: the compiler
    overlaps what stands near."""
    heads = list(heads)
    results = [None if isinstance(head, Generator) else head for head in heads]
    waiting = {n: head for n, head in enumerate(heads) if isinstance(head, Generator)}
    while waiting:
        for n, head in list(waiting.items()):
            try:
                next(head)
            except StopIteration as end:
                results[n] = end.value
                del waiting[n]
    return results


def _forward_kernel(tiling: Tiling, keep: bool, **refs):
    family, final_state_ref = tiling.family, refs["final_state_ref"]
    scratch = {name: refs[f"scratch_{name}_ref"] for name in family.scratch}

    @pl.when(pl.program_id(2) == 0)
    def _():
        final_state_ref[...] = refs["initial_state_ref"][...]

    step = _GridStep(tiling, refs, pl.program_id(2))
    if family.prepare is not None:
        family.prepare(step.chunk, step.inputs, tiling.block_sizes.heads, scratch)
        step.forget()
    o_heads = step.writer(family.output_field, refs["o_ref"])
    for heads in _side_by_side(tiling):
        scratch_of = [{name: ref.at[head] for name, ref in scratch.items()} for head in heads]
        states = [final_state_ref[0, head] for head in heads]
        results = _in_turns(
            family.forward(step.chunk, step.inputs(head), state, own)
            for head, state, own in zip(heads, states, scratch_of, strict=True)
        )
        for head, state, (o, new, saved) in zip(heads, states, results, strict=True):
            for name, x in {"entry": state, **saved}.items() if keep else ():
                ref = refs[f"saved_{name}_ref"]
                ref[0, 0, head] = x.astype(ref.dtype)
            o_heads[head] = o
            final_state_ref[0, head] = new
    o_heads.close()


def _backward_kernel(tiling: Tiling, **refs):
    family, block_heads, d_state_ref = tiling.family, tiling.block_sizes.heads, refs["d_initial_state_ref"]

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state_ref[...] = refs["d_final_state_ref"][...]

    step = _GridStep(tiling, refs, tiling["N"] - 1 - pl.program_id(2))
    d_o_heads = step.reader(family.output_field, refs["d_o_ref"])
    writers = {name: step.writer(name, refs[f"d_{name}_ref"]) for name in family.rows}
    saved_refs = {name: refs[f"saved_{name}_ref"] for name in family.saved}
    sums: dict = {}
    gate_rows: dict = {name: [] for name in step.gates}
    gate_columns: dict = {name: [] for name in step.gates}

    def write(head: int, grads: dict) -> None:
        for name, writer in writers.items():
            own = step.of(name, head)
            sums[name] = grads[name] if name not in sums else sums[name] + grads[name]
            if head + 1 == block_heads or step.of(name, head + 1) != own:
                writer[own] = sums.pop(name)
        for name in [name for name in gate_rows if name in grads]:
            gate_rows[name].append(grads[name].row)
            gate_columns[name].append(grads[name].col)

    for heads in _side_by_side(tiling):
        results = _in_turns(
            family.backward(
                step.chunk,
                step.inputs(head),
                saved_refs["entry"][0, 0, head],
                {name: saved_refs[name][0, 0, head] for name in family.saves},
                d_o_heads[head],
                d_state_ref[0, head],
            )
            for head in heads
        )
        for head, (grads, d_state) in zip(heads, results, strict=True):
            d_state_ref[0, head] = d_state
            write(head, grads)
    for writer in writers.values():
        writer.close()
    if family.numbers:
        d_gates = {name: _gate_gradient(gate_rows[name], gate_columns[name]) for name in gate_rows if gate_rows[name]}
        d_gates = family.gates_back(Chunk(tiling.block_sizes.chunk, tiling.operands, tiling.scale, None), d_gates)
        for name in family.numbers:
            refs[f"d_{name}_ref"][0, 0] = d_gates[name]


def _gate_gradient(rows: list, columns: list) -> jax.Array | None:
    """`[heads, C]` from the heads' `[1, C]` and `[C, 1]` parts."""
    total = None
    if rows[0] is not None:
        total = jnp.concatenate(rows, axis=0)
    if columns[0] is not None:
        n, size = len(columns), columns[0].shape[0]
        lane = jax.lax.broadcasted_iota(jnp.int32, (size, -(-n // 8) * 8), 1)
        stack = jnp.zeros(lane.shape, jnp.float32)
        for head, column in enumerate(columns):
            stack = jnp.where(lane == head, column, stack)
        turned = stack.T[:n]
        total = turned if total is None else total + turned
    return total


def _fields(tiling: Tiling, xs: Mapping, count, at) -> dict:
    """The inputs that both kernels have."""
    inputs = {name: (xs[name], tiling.spec(name, at)) for name in tiling.family.fields}
    return inputs | ({"count": (count, tiling.count_spec(at))} if tiling.resets else {})


def forward(tiling: Tiling, keep: bool, xs: Mapping, count, initial_state) -> dict[str, jax.Array]:
    """`o`, `final_state` and, with `keep`, what is saved, each as `saved_NAME`.

    Args:
        xs: the fields, laid out as `Tiling.spec` cuts them.
        count: None, or how many documents have started up to each token of a chunk, `[B, N, 1, C]`.
        initial_state: `[B, HV, V, K]`, and so the final one.
    """
    family, at = tiling.family, lambda t: t
    state, saved = (tiling.state_shape, tiling.state_spec), family.saved if keep else ()
    return pallas_call(
        functools.partial(_forward_kernel, tiling, keep),
        f"{family.name}_forward",
        grid=tiling.grid,
        inputs=_fields(tiling, xs, count, at) | {"initial_state": (initial_state, tiling.state_spec)},
        outputs={
            "o": (tiling.shape(family.output_field), tiling.spec(family.output_field, at)),
            "final_state": state,
            **{f"saved_{name}": (tiling.saved_shape(name), tiling.saved_spec(name, at)) for name in saved},
        },
        scratch={f"scratch_{name}": memory for name, memory in tiling.scratch.items()},
        **_COMPILER,
    )


def backward(tiling: Tiling, xs: Mapping, count, saved: Mapping, d_o, d_final_state) -> dict[str, jax.Array]:
    """The gradient of every field, as `d_NAME`, and `d_initial_state`; arguments as `forward` takes and gives them."""
    family, at = tiling.family, lambda t: tiling["N"] - 1 - t
    numbers = {name: jax.ShapeDtypeStruct(xs[name].shape, jnp.float32) for name in family.numbers}
    shapes = {name: numbers[name] if name in numbers else tiling.shape(name) for name in family.fields}
    return pallas_call(
        functools.partial(_backward_kernel, tiling),
        f"{family.name}_backward",
        grid=tiling.grid,
        inputs={
            **_fields(tiling, xs, count, at),
            **{f"saved_{name}": (saved[name], tiling.saved_spec(name, at)) for name in family.saved},
            "d_o": (d_o, tiling.spec(family.output_field, at)),
            "d_final_state": (d_final_state, tiling.state_spec),
        },
        outputs={
            **{f"d_{name}": (shape, tiling.spec(name, at)) for name, shape in shapes.items()},
            "d_initial_state": (tiling.state_shape, tiling.state_spec),
        },
        **_COMPILER,
    )
