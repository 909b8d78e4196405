"""Selective state space: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = h_t C_t, N states for each of D channels.

States lie on sublanes and channels on lanes, `[N, D]`, and the tokens are taken one by one: one token's work already
fills the registers. B, C and the resets of a token are packed into one row of numbers. The matrix unit, otherwise idle,
turns such rows into columns that repeat along the lanes, `B_t 1^T`, for many tokens at once, and adds up gradients over
the lanes.

The states that enter each chunk are kept. Backward recomputes a chunk's states and walks it from right to left, with
z_t = exp(dt_t A) dh_t handed from token to token:

    dh_t = dy_t C_t + z_{t+1},  d(dt A)_t = z_t h_{t-1},  d(dt u)_t = dh_t B_t,  dB_t = dh_t (dt u)_t,  dC_t = dy_t h_t
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._shared.kernel import Kernel, dtype_reasons
from .._shared.machine import Machine
from .._shared.passes import Arrays, differentiable
from ._pallas_call import pallas_call
from .vector import no_scale

TURN = 16  # tokens of a turn of the loop, and of a register of bfloat16
CHANNEL_BLOCK = 1024
CHUNK = 64  # tokens between kept states where the caller does not say
KEPT_BYTES = 8 << 20  # of a chunk's recomputed states
VMEM_LIMIT = 48 << 20
LANES = 128
MOST_STATES = 128


def _parts(x: jax.Array) -> list[jax.Array]:
    """bfloat16 arrays that add up to a float32 one exactly; sums on the matrix unit then lose nothing."""
    out = []
    for _ in range(3):
        out.append(x.astype(jnp.bfloat16))
        x = x - out[-1].astype(jnp.float32)
    return out


def _sum(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product over these axes of bfloat16 matrices, one of which is all ones: only float32 sums are rounded."""
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=lax.Precision.DEFAULT,  # whatever the caller's default: one pass holds bfloat16
        preferred_element_type=jnp.float32,
    )


def _columns(rows: jax.Array, exact: bool) -> jax.Array:
    """`[tokens, M]` -> `[tokens * M, 128]`: each number fills a row of its own. `exact`: all are bfloat16 numbers."""
    tokens, numbers = rows.shape
    parts = [rows] if exact else [part.astype(jnp.float32) for part in _parts(rows)]
    wide = jnp.concatenate(parts, axis=1)[:, None, :]
    shape = (tokens, numbers, len(parts) * numbers)
    own = lax.broadcasted_iota(jnp.int32, shape, 2) % numbers == lax.broadcasted_iota(jnp.int32, shape, 1)
    wide = jnp.where(own, wide, 0).reshape(tokens * numbers, shape[2]).astype(jnp.bfloat16)
    return _sum(wide, jnp.ones((shape[2], LANES), jnp.bfloat16), (1, 0))


def _row_sums(x: jax.Array) -> jax.Array:
    """`[M, 128]` -> `[1, M]`."""
    ones = jnp.ones((8, LANES), jnp.bfloat16)
    sums = [_sum(ones, part, (1, 1)) for part in _parts(x)]
    return (sums[0] + sums[1] + sums[2])[:1]


def _over_groups(x: jax.Array) -> jax.Array:
    """`[N, D]` -> `[N, 128]`: the sum of groups of lanes, padded with zeros where there are fewer."""
    if x.shape[1] < LANES:
        return jnp.pad(x, ((0, 0), (0, LANES - x.shape[1])))
    return functools.reduce(jnp.add, (x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)))


class _Tokens:
    """The tokens of one turn of the loop; those after the last one have dt = 0, which leaves the state alone."""

    def __init__(self, u_ref, dt_ref, rows_ref, columns_ref, states: int, start, first, length: int):
        at = pl.ds(start, TURN)
        self.u, self.dt = u_ref[at, :].astype(jnp.float32), dt_ref[at, :].astype(jnp.float32)
        self.n, self.width, self.start, self.columns_ref = states, u_ref.shape[1], start, columns_ref
        self.resets = rows_ref[at, 2 * states :].astype(jnp.float32) if rows_ref.shape[1] > 2 * states else None
        self.valid = _valid(u_ref.shape[0], first, length)
        self.u, self.dt = self.masked(self.u), self.masked(self.dt)
        self.resets = None if self.resets is None else self.masked(self.resets)

    def masked(self, x: jax.Array) -> jax.Array:
        return x if self.valid is None else jnp.where(self.valid, x, 0)

    def written(self, i: int) -> jax.Array:
        """dt u of a token, `[1, D]`."""
        return self.dt[i : i + 1] * self.u[i : i + 1]

    def _column(self, i: int, offset: int) -> jax.Array:
        rows = pl.multiple_of((self.start + i) * 2 * self.n + offset, 8)
        column = self.columns_ref[pl.ds(rows, self.n), :]
        return jnp.tile(column, (1, self.width // LANES)) if self.width > LANES else column[:, : self.width]

    def B(self, i: int) -> jax.Array:
        return self._column(i, 0)

    def C(self, i: int) -> jax.Array:
        return self._column(i, self.n)

    def decay(self, i: int, A: jax.Array) -> jax.Array:
        """exp(dt A) `[N, D]`; zero where a document starts."""
        a = jnp.exp(self.dt[i : i + 1] * A)
        return a if self.resets is None else jnp.where(self.resets[i : i + 1] > 0, 0, a)


def _valid(block: int, first, length: int) -> jax.Array | None:
    """Which of a turn's rows are tokens `[TURN, 1]`; None where all are."""
    return None if length % block == 0 else first + lax.broadcasted_iota(jnp.int32, (TURN, 1), 0) < length


def _write_columns(rows_ref, columns_ref, states: int, first, length: int) -> None:
    """The block's B and C as columns."""

    def turn(k, _):
        start = pl.multiple_of(k * TURN, TURN)
        rows, valid = (
            rows_ref[pl.ds(start, TURN), :].astype(jnp.float32),
            _valid(rows_ref.shape[0], first + start, length),
        )
        rows = rows if valid is None else jnp.where(valid, rows, 0)
        size = TURN * 2 * states
        columns = _columns(rows[:, : 2 * states], rows_ref.dtype == jnp.bfloat16)
        columns_ref[pl.ds(pl.multiple_of(k * size, size), size), :] = columns

    lax.fori_loop(0, rows_ref.shape[0] // TURN, turn, None)


def _advance(tokens: _Tokens, i: int, A: jax.Array, h: jax.Array) -> jax.Array:
    return tokens.decay(i, A) * h + tokens.written(i) * tokens.B(i)


def _forward_kernel(
    *, length: int, u_ref, dt_ref, rows_ref, A_ref, state_ref, y_ref, final_ref, entries_ref, h_ref, columns_ref
):
    time, A = pl.program_id(2), A_ref[...]
    first = time * u_ref.shape[0]

    @pl.when(time == 0)
    def _():
        h_ref[...] = state_ref[...]

    entries_ref[...] = h_ref[...]
    _write_columns(rows_ref, columns_ref, A.shape[0], first, length)

    def turn(k, h):
        start = pl.multiple_of(k * TURN, TURN)
        tokens = _Tokens(u_ref, dt_ref, rows_ref, columns_ref, A.shape[0], start, first + start, length)
        out = []
        for i in range(TURN):
            h = _advance(tokens, i, A, h)
            out.append(jnp.sum(h * tokens.C(i), axis=0, keepdims=True))
        y_ref[pl.ds(start, TURN), :] = jnp.concatenate(out).astype(y_ref.dtype)
        return h

    h_ref[...] = lax.fori_loop(0, u_ref.shape[0] // TURN, turn, h_ref[...])
    final_ref[...] = h_ref[...]


def _backward_kernel(
    *, length: int,
    u_ref, dt_ref, rows_ref, A_ref, entries_ref, d_y_ref, d_final_ref,
    d_u_ref, d_dt_ref, d_rows_ref, d_A_ref, d_state_ref,
    before_ref, z_ref, columns_ref, sums_ref,
):  # fmt: skip
    turns, A = u_ref.shape[0] // TURN, A_ref[...]
    first, size = (pl.num_programs(2) - 1 - pl.program_id(2)) * u_ref.shape[0], TURN * 2 * A.shape[0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        z_ref[...] = d_final_ref[...]
        d_A_ref[...] = jnp.zeros_like(d_A_ref)

    _write_columns(rows_ref, columns_ref, A.shape[0], first, length)

    def load(k):
        start = pl.multiple_of(k * TURN, TURN)
        tokens = _Tokens(u_ref, dt_ref, rows_ref, columns_ref, A.shape[0], start, first + start, length)
        return pl.ds(start, TURN), tokens

    def again(k, h):  # keeps the state before each token
        _, tokens = load(k)
        for i in range(TURN):
            before_ref[k * TURN + i] = h
            h = _advance(tokens, i, A, h)
        return h

    lax.fori_loop(0, turns, again, entries_ref[...])

    def turn(k, carry):
        z, d_A = carry
        k = turns - 1 - k
        at, tokens = load(k)
        d_y = tokens.masked(d_y_ref[at, :].astype(jnp.float32))
        d_u, d_dt = [], []
        for i in range(TURN - 1, -1, -1):
            before, row, B = before_ref[k * TURN + i], slice(i, i + 1), tokens.B(i)
            decay, written = tokens.decay(i, A), tokens.written(i)
            d_h = d_y[row] * tokens.C(i) + z
            z = decay * d_h
            d_exponent = z * before
            d_A += tokens.dt[row] * d_exponent
            d_written = jnp.sum(d_h * B, axis=0, keepdims=True)
            d_u.append(d_written * tokens.dt[row])
            d_dt.append(d_written * tokens.u[row] + jnp.sum(d_exponent * A, axis=0, keepdims=True))
            h, n = decay * before + written * B, A.shape[0]
            sums_ref[pl.ds(2 * n * i, n), :] = _over_groups(d_h * written)
            sums_ref[pl.ds(2 * n * i + n, n), :] = _over_groups(h * d_y[row])
        d_u_ref[at, :] = jnp.concatenate(d_u[::-1]).astype(d_u_ref.dtype)
        d_dt_ref[at, :] = jnp.concatenate(d_dt[::-1]).astype(d_dt_ref.dtype)
        d_rows_ref[:, pl.ds(pl.multiple_of(k * size, size), size)] = _row_sums(sums_ref[...])
        return z, d_A

    z_ref[...], d_A_ref[...] = lax.fori_loop(0, turns, turn, (z_ref[...], d_A_ref[...]))
    d_state_ref[...] = z_ref[...]


class _Tiling:
    """The blocks: batch and channels in parallel, chunks of time in sequence."""

    def __init__(self, u: jax.Array, rows: jax.Array, states: int, chunk: int, channels: int, reverse: bool):
        self.batch, self.length, self.D = u.shape
        self.N, self.numbers = states, rows.shape[2]
        self.chunk = min(-(-chunk // TURN), -(-self.length // TURN)) * TURN
        channels = min(channels, KEPT_BYTES // (4 * self.chunk * states))
        # sums over the channels may meet none that do not exist
        self.width = max((w for w in range(128, channels + 1, 128) if self.D % w == 0), default=min(LANES, self.D))
        self.splits, self.chunks = -(-self.D // self.width), -(-self.length // self.chunk)
        self.at = (lambda t: self.chunks - 1 - t) if reverse else (lambda t: t)
        self.tokens = pl.BlockSpec((None, self.chunk, self.width), lambda b, d, t: (b, self.at(t), d))
        self.rows = pl.BlockSpec((None, self.chunk, self.numbers), lambda b, d, t: (b, self.at(t), 0))
        self.A = pl.BlockSpec((states, self.width), lambda b, d, t: (0, d))
        self.state = pl.BlockSpec((None, states, self.width), lambda b, d, t: (b, 0, d))
        self.entries = pl.BlockSpec((None, None, states, self.width), lambda b, d, t: (b, self.at(t), 0, d))
        # the chunk's numbers in one row
        self.row = 2 * states * self.chunk
        self.d_rows = pl.BlockSpec((None, None, None, 1, self.row), lambda b, d, t: (d, b, self.at(t), 0, 0))
        self.columns = (self.row, LANES)

    def inputs(self, arrays: Arrays) -> dict:
        """Those that both passes have."""
        specs = {"u": self.tokens, "dt": self.tokens, "rows": self.rows, "A": self.A}
        return {name: (arrays[name], spec) for name, spec in specs.items()}

    def call(self, kernel, name: str, inputs: dict, outputs: dict, scratch: dict) -> dict[str, jax.Array]:
        return pallas_call(
            functools.partial(kernel, length=self.length),
            name,
            grid=(self.batch, self.splits, self.chunks),
            inputs=inputs,
            outputs={name: (jax.ShapeDtypeStruct(*shape), spec) for name, (shape, spec) in outputs.items()},
            scratch={name: pltpu.VMEM(shape, jnp.float32) for name, shape in scratch.items()},
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        )


@dataclasses.dataclass(frozen=True)
class _SelectivePasses:
    """The two passes, as `_shared.passes` wants them. Channels stay together: B and C add up gradients over them."""

    machine: Machine
    chunk: int
    channels: int

    heads = (1, 1)
    inputs = {"u": "B T D", "dt": "B T D", "rows": "B T R", "A": "N D", "state": "B N D"}
    outputs = {"y": "B T D", "final": "B N D"}
    kept = ("u", "dt", "rows", "A")
    saved = {"entries": "B C N D"}

    def forward(self, arrays: Arrays, keep: bool) -> Arrays:
        u, rows, state = arrays["u"], arrays["rows"], arrays["state"]
        tiling = _Tiling(u, rows, state.shape[1], self.chunk, self.channels, reverse=False)
        entries = (tiling.batch, tiling.chunks, tiling.N, tiling.D)
        return tiling.call(
            _forward_kernel,
            "selective_forward",
            tiling.inputs(arrays) | {"state": (state, tiling.state)},
            {
                "y": ((u.shape, u.dtype), tiling.tokens),
                "final": ((state.shape, jnp.float32), tiling.state),
                "entries": ((entries, jnp.float32), tiling.entries),
            },
            {"h": (tiling.N, tiling.width), "columns": tiling.columns},
        )

    def backward(self, arrays: Arrays) -> Arrays:
        """The gradient of A is still one array for each sequence, `[B, N, D]`."""
        u, dt, rows, d_final = arrays["u"], arrays["dt"], arrays["rows"], arrays["d_final"]
        tiling = _Tiling(u, rows, d_final.shape[1], self.chunk, self.channels, reverse=True)
        N, state = tiling.N, ((d_final.shape, jnp.float32), tiling.state)
        results = tiling.call(
            _backward_kernel,
            "selective_backward",
            tiling.inputs(arrays)
            | {
                "entries": (arrays["entries"], tiling.entries),
                "d_y": (arrays["d_y"], tiling.tokens),
                "d_final": (d_final, tiling.state),
            },
            {
                "d_u": ((u.shape, u.dtype), tiling.tokens),
                "d_dt": ((dt.shape, dt.dtype), tiling.tokens),
                "d_rows": (((tiling.splits, tiling.batch, tiling.chunks, 1, tiling.row), jnp.float32), tiling.d_rows),
                "d_A": state,
                "d_state": state,
            },
            {
                "before": (tiling.chunk, N, tiling.width),
                "z": (N, tiling.width),
                "columns": tiling.columns,
                "sums": (TURN * 2 * N, LANES),
            },
        )
        d_rows = results["d_rows"].sum(0).reshape(tiling.batch, -1, 2 * N)[:, : rows.shape[1]]
        d_rows = jnp.pad(d_rows, ((0, 0), (0, 0), (0, rows.shape[2] - 2 * N)))  # resets have no gradient
        return results | {"d_rows": d_rows.astype(rows.dtype)}


def selective_scan(
    machine: Machine,
    u: jax.Array,
    dt: jax.Array,
    rows: jax.Array,
    A: jax.Array,
    state: jax.Array,
    chunk: int,
    channels: int = CHANNEL_BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """(final state `[B, N, D]`, y `[B, T, D]` in the dtype of u).

    Args:
        u, dt: `[B, T, D]`, float32 or bfloat16.
        rows: `[B, T, 2 N]` with B and C of each token, or `[B, T, 2 N + 1]` with a positive number where a document
            starts.
        A: `[N, D]` float32.
        state: `[B, N, D]` float32.
        chunk: tokens between states that are kept for the backward pass.
        channels: at most so many in a grid step.
    """
    arrays = {"u": u, "dt": dt, "rows": rows, "A": A, "state": state}
    results = differentiable(_SelectivePasses(machine, chunk, channels), arrays)
    return results["final"], results["y"]


def refuses(machine: Machine, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> list[str]:
    """Reasons against a call."""
    reasons, N, D = dtype_reasons(dtypes), sizes["N"], sizes["D"]
    if N % 8 or N > MOST_STATES:
        reasons.append(f"N={N} states a channel, wants a multiple of 8 up to {MOST_STATES}")
    if D > LANES and D % LANES:
        reasons.append(f"D={D} channels, wants at most {LANES} or a multiple of {LANES}, as it adds up over them")
    return reasons


def _run(
    machine: Machine,
    scale: float | None,
    chunk_size: int | None,
    fields: dict,
    reset: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(final state, y): u, dt `[B, T, D]`, B, C `[B, T, N]`, A `[D, N]`, states `[B, D, N]`."""
    no_scale("selective", scale)
    starts = [] if reset is None else [reset[..., None].astype(fields["B"].dtype)]
    rows = jnp.concatenate([fields["B"], fields["C"], *starts], axis=-1)
    A, state = fields["A"].T.astype(jnp.float32), jnp.swapaxes(state, 1, 2)
    final, y = selective_scan(machine, fields["u"], fields["dt"], rows, A, state, chunk_size or CHUNK)
    return jnp.swapaxes(final, 1, 2), y


SELECTIVE = Kernel(
    "selective",
    "tpu",
    "chunk",
    {"u": "D", "dt": "D", "B": "N", "C": "N"},
    _run,
    refuses,
    parameters={"A": "D N"},
)
