"""The kernels of a family from its formulas for one head: grid, blocks, saved states.

Grid: batch x groups of heads x chunks, the chunks in sequence. Every head of a group is worked on in one step, so that
the matrix units have independent products to overlap. The state is an output block that stays in VMEM over a head's
chunks; it is held transposed, `[V, K]`, so that decays of key channels lie along lanes. The backward pass walks the
chunks from right to left and starts each from the state that entered it, which the forward pass saves in the dtype that
products read it in. Nothing else goes through HBM.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..block_sizes import BlockSizes
from ._chunk import Chunk, Gate
from ._heads import Reader, Writer, parts, row_count

# of the smallest vector memory among the targets (64 MiB), what leaves room for XLA's own buffers
VMEM_LIMIT = 56 << 20


def _keep(chunk: Chunk, gates: dict) -> dict:
    return gates


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One head's formulas.

    Attributes:
        name: of the recurrence's record.
        fields: its fields, with the same dimensions: "H K", "HV V", "HV K", or "HV" for gates, one number a token.
        forward: (chunk, inputs, state^T [V, K], room) -> (o [C, V], state^T, what is saved for `backward`).
        backward: (chunk, inputs, entry state^T, saved, d_o, d_state^T) -> (gradients by name, d_state^T); a gate's
            gradient is a `GateGradient`.
        gates, gates_back: the gates `[heads, C]` of all heads -> those that the formulas take, and the way back for
            their gradients.
        floor: gate -> the value below which it counts as that value.
        saves: the shapes of what is saved, in the letters C, K, V.
        prepare: None, or (chunk, head -> inputs, heads, rooms): what is done for all heads before `forward` of each.
        rooms: name -> shape of one head's memory for what `prepare` finds, letters or numbers, and whether it is
            float32 or what products read.
        turns: how many heads work in turns, where `forward` and `backward` are generators: enough to hide a product's
            latency, few enough to keep what waits in registers.
    """

    name: str
    fields: Mapping[str, str]
    forward: Callable
    backward: Callable
    gates: Callable = _keep
    gates_back: Callable = _keep
    floor: Mapping[str, float] = dataclasses.field(default_factory=dict)
    saves: tuple[str, ...] = ()
    prepare: Callable | None = None
    rooms: Mapping[str, tuple[tuple, bool]] = dataclasses.field(default_factory=dict)
    turns: int = 1

    def of_kind(self, *kinds: str) -> list[str]:
        return [name for name, kind in self.fields.items() if kind in kinds]

    @property
    def rows(self) -> list[str]:
        """Fields that are vectors per token."""
        return [name for name, kind in self.fields.items() if kind != "HV"]

    @property
    def numbers(self) -> list[str]:
        return self.of_kind("HV")


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in one call; B T H HV K V C N as everywhere."""

    family: Family
    scale: float
    blocks: BlockSizes
    sizes: tuple[tuple[str, int], ...]
    dtypes: tuple[tuple[str, jnp.dtype], ...]
    operands: jnp.dtype  # what the matrix units read
    resets: bool

    def __getitem__(self, letter: str) -> int:
        return dict(self.sizes)[letter]

    def dtype(self, name: str) -> jnp.dtype:
        return dict(self.dtypes)[name]

    @property
    def shared(self) -> int:
        """n, how many value heads share a key head."""
        return self["HV"] // self["H"]

    @property
    def grid(self) -> tuple[int, int, int]:
        return self["B"], self["HV"] // self.blocks.heads, self["N"]

    def width(self, name: str) -> int:
        return self[self.family.fields[name].split()[1]]

    def rows(self, name: str) -> int:
        heads = self.family.fields[name].split()[0]
        return row_count(self[heads], self.width(name), self.dtype(name))

    def shape(self, name: str) -> jax.ShapeDtypeStruct:
        lanes = self.width(name) // parts(self.width(name))
        return jax.ShapeDtypeStruct((self["B"], self["T"], self.rows(name), lanes), self.dtype(name))

    # ---- blocks; `at` maps a grid step's time to the chunk it works on

    def spec(self, name: str, at: Callable) -> pl.BlockSpec:
        if name in self.family.numbers:
            return pl.BlockSpec((1, 1, self.blocks.heads, self.blocks.chunk), lambda b, h, t: (b, at(t), h, 0))
        *_, rows, lanes = self.shape(name).shape
        if self.blocks.heads < self["HV"]:
            own = self.family.fields[name].startswith("HV")
            rows = self.blocks.heads // (1 if own else self.shared) * parts(self.width(name))
        return pl.BlockSpec((1, self.blocks.chunk, rows, lanes), lambda b, h, t: (b, at(t), h, 0))

    def count_spec(self, at: Callable) -> list[pl.BlockSpec]:
        spec = pl.BlockSpec((1, 1, 1, self.blocks.chunk), lambda b, h, t: (b, at(t), 0, 0))
        return [spec] if self.resets else []

    @property
    def state_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.blocks.heads, self["V"], self["K"]), lambda b, h, t: (b, h, 0, 0))

    @property
    def state_shape(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self["B"], self["HV"], self["V"], self["K"]), jnp.float32)

    @property
    def saves(self) -> list[tuple[int, ...]]:
        """Of one chunk and head: its entry state and what the family keeps."""
        shapes = [tuple(self[x] for x in letters.split()) for letters in self.family.saves]
        return [(self["V"], self["K"]), *shapes]

    @property
    def scratch(self) -> list:
        size = lambda x: x if isinstance(x, int) else self[x]  # noqa: E731
        return [
            pltpu.VMEM((self.blocks.heads, *map(size, shape)), jnp.float32 if wide else self.operands)
            for shape, wide in self.family.rooms.values()
        ]

    def saved_spec(self, shape: tuple[int, ...], at: Callable) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.blocks.heads, *shape), lambda b, h, t: (b, at(t), h, 0, 0))

    def saved_shape(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self["B"], self["N"], self["HV"], *shape), self.operands)


def _named(names, refs) -> dict:
    return dict(zip(names, refs, strict=True))


class _Step:
    """One grid step of either kernel: the chunk's masks and gates, the heads of its blocks."""

    def __init__(self, call: Call, refs: dict, chunk_index, count_ref):
        self.call, family = call, call.family
        size = call.blocks.chunk
        gates = {name: refs[name][0, 0].astype(jnp.float32) for name in family.numbers}
        bare = Chunk(size, call.operands, call.scale, None)
        gates = family.gates(bare, gates)
        rows = [*gates.values(), *([] if count_ref is None else [count_ref[0, 0]])]
        pairs = list(zip(rows, _transposed(rows) if rows else [], strict=True))
        count = None if count_ref is None else Gate(*pairs.pop())
        self.gates = _named(gates, pairs)
        self.chunk = Chunk(size, call.operands, call.scale, count)
        valid = None
        if call["T"] % size:
            left = call["T"] - chunk_index * size
            valid = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) < left
        self.refs, self.valid = refs, valid
        self.forget()

    def forget(self) -> None:
        """Reads inputs anew from here on: values that wait for their second use would fill the registers."""
        call = self.call
        self.readers = {name: Reader(self.refs[name], call.width(name), self.valid) for name in call.family.rows}

    def inputs(self, head: int) -> dict:
        x = {name: reader[self.of(name, head)] for name, reader in self.readers.items()}
        x |= {name: Gate(row[head : head + 1], col[:, head : head + 1]) for name, (row, col) in self.gates.items()}
        return x

    def of(self, name: str, head: int) -> int:
        """The head of the field that a value head uses."""
        return head if self.call.family.fields[name].startswith("HV") else head // self.call.shared


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


def _groups(call: Call) -> list[range]:
    """Those that take turns: fewer where heads are wide and operands float32, as what waits, states `[V, K]` among it,
    fills the vector memory."""
    widths = max(call["K"], call["V"]) * call.operands.itemsize // 512  # in rows of 128 float32
    heads, turns = call.blocks.heads, max(call.family.turns // max(widths, 1) ** 2, 1)
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


def _forward_kernel(call: Call, keep: bool, *refs):
    family = call.family
    inputs, refs = _named(family.fields, refs[: len(family.fields)]), refs[len(family.fields) :]
    count_ref, refs = (refs[0], refs[1:]) if call.resets else (None, refs)
    refs, rooms = refs[: len(refs) - len(family.rooms)], refs[len(refs) - len(family.rooms) :]
    first_ref, o_ref, state_ref, *saved_refs = refs
    rooms = _named(family.rooms, rooms)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = first_ref[...]

    step = _Step(call, inputs, pl.program_id(2), count_ref)
    if family.prepare is not None:
        family.prepare(step.chunk, step.inputs, call.blocks.heads, rooms)
        step.forget()
    o_heads = Writer(o_ref, call["V"])
    for group in _groups(call):
        rooms_of = [{name: ref.at[head] for name, ref in rooms.items()} for head in group]
        states = [state_ref[0, head] for head in group]
        results = _in_turns(
            family.forward(step.chunk, step.inputs(head), state, room)
            for head, state, room in zip(group, states, rooms_of, strict=True)
        )
        for head, state, (o, new, saved) in zip(group, states, results, strict=True):
            for ref, x in zip(saved_refs, (state, *saved), strict=False):
                ref[0, 0, head] = x.astype(ref.dtype)
            o_heads[head] = o
            state_ref[0, head] = new
    o_heads.close()


def _backward_kernel(call: Call, *refs):
    family, heads = call.family, call.blocks.heads
    names = list(family.fields)
    inputs, refs = _named(names, refs[: len(names)]), refs[len(names) :]
    count_ref, refs = (refs[0], refs[1:]) if call.resets else (None, refs)
    saved_refs, refs = refs[: len(call.saves)], refs[len(call.saves) :]
    d_o_ref, d_last_ref, *refs = refs
    outputs, d_state_ref = _named(names, refs[:-1]), refs[-1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state_ref[...] = d_last_ref[...]

    step = _Step(call, inputs, call["N"] - 1 - pl.program_id(2), count_ref)
    d_o_heads = Reader(d_o_ref, call["V"], step.valid)
    writers = {name: Writer(outputs[name], call.width(name)) for name in family.rows}
    sums: dict = {}
    gate_rows: dict = {name: [] for name in step.gates}
    gate_columns: dict = {name: [] for name in step.gates}

    def gradients(head: int, grads: dict) -> None:
        for name, writer in writers.items():
            own = step.of(name, head)
            sums[name] = grads[name] if name not in sums else sums[name] + grads[name]
            if head + 1 == heads or step.of(name, head + 1) != own:
                writer[own] = sums.pop(name)
        for name in [name for name in gate_rows if name in grads]:
            gate_rows[name].append(grads[name].row)
            gate_columns[name].append(grads[name].col)

    for group in _groups(call):
        results = _in_turns(
            family.backward(
                step.chunk,
                step.inputs(head),
                saved_refs[0][0, 0, head],
                tuple(ref[0, 0, head] for ref in saved_refs[1:]),
                d_o_heads[head],
                d_state_ref[0, head],
            )
            for head in group
        )
        for head, (grads, d_state) in zip(group, results, strict=True):
            d_state_ref[0, head] = d_state
            gradients(head, grads)
    for writer in writers.values():
        writer.close()
    if family.numbers:
        d_gates = {name: _gate_gradient(gate_rows[name], gate_columns[name]) for name in gate_rows if gate_rows[name]}
        d_gates = family.gates_back(Chunk(call.blocks.chunk, call.operands, call.scale, None), d_gates)
        for name in family.numbers:
            outputs[name][0, 0] = d_gates[name]


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


def _params(call: Call) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)


def run_forward(call: Call, keep: bool, xs: dict, count, state):
    family, at = call.family, lambda t: t
    saves = call.saves if keep else []
    o = family.of_kind("HV V")[0]
    out = pl.pallas_call(
        functools.partial(_forward_kernel, call, keep),
        grid=call.grid,
        in_specs=[*(call.spec(name, at) for name in family.fields), *call.count_spec(at), call.state_spec],
        out_specs=[call.spec(o, at), call.state_spec, *(call.saved_spec(s, at) for s in saves)],
        out_shape=[call.shape(o), call.state_shape, *(call.saved_shape(s) for s in saves)],
        scratch_shapes=call.scratch,
        compiler_params=_params(call),
        name=f"{family.name}_forward",
    )(*(xs[name] for name in family.fields), *([count] if call.resets else []), state)
    return out[0], out[1], tuple(out[2:])


def run_backward(call: Call, xs: dict, count, saved, d_o, d_state):
    family, at = call.family, lambda t: call["N"] - 1 - t
    o = family.of_kind("HV V")[0]
    specs = [call.spec(name, at) for name in family.fields]
    shapes = [
        call.shape(name) if name in family.rows else jax.ShapeDtypeStruct(xs[name].shape, jnp.float32)
        for name in family.fields
    ]
    *grads, d_state = pl.pallas_call(
        functools.partial(_backward_kernel, call),
        grid=call.grid,
        in_specs=[
            *specs,
            *call.count_spec(at),
            *(call.saved_spec(s, at) for s in call.saves),
            call.spec(o, at),
            call.state_spec,
        ],
        out_specs=[*specs, call.state_spec],
        out_shape=[*shapes, call.state_shape],
        compiler_params=_params(call),
        name=f"{family.name}_backward",
    )(*(xs[name] for name in family.fields), *([count] if call.resets else []), *saved, d_o, d_state)
    return dict(zip(family.fields, grads, strict=True)), d_state
