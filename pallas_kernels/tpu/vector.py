"""Elementwise recurrences: h_t = exp(g_t) h_{t-1} + x_t for each channel, forward and backward.

A register holds eight tokens (on sublanes) of 128 channels (on lanes). It is scanned in three doublings, as if the
state before its first token were zero. What that state adds to each of the eight comes last, and only this last step
has to wait for the tokens before. Everything is read from HBM and written to it once, and that is what takes the time.

Backward is the same scan from right to left. With z_t = exp(g_t) dh_t, what token t hands to its predecessor,

    z_t = exp(g_t) z_{t+1} + exp(g_t) do_t,   dx_t = do_t + z_{t+1},   dg_t = z_t h_{t-1},   dh_0 = z_1

and h_{t-1} is the output before, so that nothing is kept but the outputs.
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
from .._shared.machine import Machine, machine_here
from .._shared.passes import Arrays, differentiable
from ._pallas_call import pallas_call

TILE = 8  # tokens of a register
ROWS = 16  # tokens of a turn of the loop: one tile of bfloat16, two registers
TIME_BLOCK = 256
CHANNEL_BLOCK = 512
TOKENS, STATE = "B T H", "B X H"  # channels are split over devices as heads are elsewhere


def scan_tile(a: jax.Array, b: jax.Array, entering: jax.Array, reverse: bool) -> jax.Array:
    """h_t = a_t h_{t-1} + b_t over the rows of a register `[8, D]`, from `entering [1, D]`; upwards if `reverse`."""
    row = lax.broadcasted_iota(jnp.int32, a.shape, 0)
    for distance in (1, 2, 4):
        shift, reached = (TILE - distance, row < TILE - distance) if reverse else (distance, row >= distance)
        b = b + jnp.where(reached, a * pltpu.roll(b, shift, 0), 0)
        a = a * jnp.where(reached, pltpu.roll(a, shift, 0), 1)
    return a * entering + b


def _decay_and_valid(g_ref, at, first: jax.Array, length: int):
    """(exp g of a turn's rows, which of them are tokens or None where all are); what is no token keeps the state."""
    a = jnp.exp(g_ref[at, :].astype(jnp.float32))
    if length % g_ref.shape[0] == 0:
        return a, None
    valid = first + lax.broadcasted_iota(jnp.int32, a.shape, 0) < length
    return jnp.where(valid, a, 1), valid


def _masked(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    return x.astype(jnp.float32) if valid is None else jnp.where(valid, x.astype(jnp.float32), 0)


def _forward_kernel(*, length: int, g_ref, x_ref, state_ref, o_ref, final_ref, carry_ref):
    time = pl.program_id(2)

    @pl.when(time == 0)
    def _():
        carry_ref[...] = state_ref[...]

    def turn(i, carry):
        at = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
        a, valid = _decay_and_valid(g_ref, at, time * g_ref.shape[0] + i * ROWS, length)
        b, out = _masked(x_ref[at, :], valid), []
        for tile in range(0, ROWS, TILE):
            h = scan_tile(a[tile : tile + TILE], b[tile : tile + TILE], carry, reverse=False)
            carry = h[TILE - 1 :]
            out.append(h)
        o_ref[at, :] = jnp.concatenate(out).astype(o_ref.dtype)
        return carry

    carry_ref[...] = lax.fori_loop(0, g_ref.shape[0] // ROWS, turn, carry_ref[...], unroll=2)
    final_ref[...] = carry_ref[...]


def _backward_kernel(
    *, length: int, g_ref, o_ref, before_ref, d_o_ref, state_ref, d_final_ref, d_g_ref, d_x_ref, d_state_ref, carry_ref
):
    time_blocks, turns = pl.num_programs(2), g_ref.shape[0] // ROWS
    time = time_blocks - 1 - pl.program_id(2)

    @pl.when(time == time_blocks - 1)
    def _():
        carry_ref[...] = d_final_ref[...]

    # the state before the block's first token: the output before it, or what entered the sequence
    last = before_ref[ROWS - TILE :, :].astype(jnp.float32)[TILE - 1 :]
    first_before = jnp.where(time == 0, state_ref[...], last)
    row = lax.broadcasted_iota(jnp.int32, (TILE, g_ref.shape[1]), 0)

    def turn(i, carry):
        i = turns - 1 - i
        start = pl.multiple_of(i * ROWS, ROWS)
        at = pl.ds(start, ROWS)
        a, valid = _decay_and_valid(g_ref, at, time * g_ref.shape[0] + start, length)
        d_o, h = _masked(d_o_ref[at, :], valid), _masked(o_ref[at, :], valid)
        earlier = o_ref[pl.ds(pl.multiple_of(jnp.maximum(start - ROWS, 0), ROWS), ROWS), :].astype(jnp.float32)
        before = jnp.where(i == 0, first_before, earlier[ROWS - 1 :])
        d_g, d_x = [], []
        for tile in range(ROWS - TILE, -1, -TILE):
            part = slice(tile, tile + TILE)
            z = scan_tile(a[part], a[part] * d_o[part], carry, reverse=True)
            d_x.append(d_o[part] + jnp.where(row < TILE - 1, pltpu.roll(z, TILE - 1, 0), carry))
            entered = before if tile == 0 else h[tile - 1 : tile]
            d_g.append(z * jnp.where(row > 0, pltpu.roll(h[part], 1, 0), entered))
            carry = z[:1]
        d_x_ref[at, :] = jnp.concatenate(d_x[::-1]).astype(d_x_ref.dtype)
        d_g_ref[at, :] = jnp.concatenate(d_g[::-1]).astype(d_g_ref.dtype)
        return carry

    carry_ref[...] = lax.fori_loop(0, turns, turn, carry_ref[...], unroll=2)
    d_state_ref[...] = carry_ref[...]


class _Tiling:
    """The blocks of arrays `[B, T, D]` and `[B, 1, D]`: batch and channels in parallel, time in sequence."""

    def __init__(self, shape: tuple[int, ...], time_block: int, channel_block: int, reverse: bool):
        batch, length, width = shape
        self.length, self.time = length, min(time_block, -(-length // ROWS) * ROWS)
        self.width = width if width <= channel_block else channel_block
        self.time_blocks = -(-length // self.time)
        self.grid = (batch, -(-width // self.width), self.time_blocks)
        self.at = (lambda t: self.time_blocks - 1 - t) if reverse else (lambda t: t)

    def tokens(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.time, self.width), lambda b, d, t: (b, self.at(t), d))

    def before(self) -> pl.BlockSpec:
        """The rows that end where the block begins; the first ones for the first block."""
        turns = self.time // ROWS
        return pl.BlockSpec((None, ROWS, self.width), lambda b, d, t: (b, jnp.maximum(self.at(t) * turns - 1, 0), d))

    def state(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, self.width), lambda b, d, t: (b, 0, d))

    def call(self, kernel, name: str, inputs: dict, outputs: dict) -> dict[str, jax.Array]:
        return pallas_call(
            functools.partial(kernel, length=self.length),
            name,
            grid=self.grid,
            inputs=inputs,
            outputs={name: (jax.ShapeDtypeStruct(x.shape, x.dtype), spec) for name, (x, spec) in outputs.items()},
            scratch={"carry": pltpu.VMEM((1, self.width), jnp.float32)},
            dimension_semantics=("parallel", "parallel", "arbitrary"),
        )


@dataclasses.dataclass(frozen=True)
class _VectorPasses:
    """The two passes, as `_shared.passes` wants them."""

    machine: Machine
    time_block: int
    channel_block: int
    heads: tuple[int, int]

    inputs = {"g": TOKENS, "x": TOKENS, "state": STATE}
    outputs = {"o": TOKENS, "final": STATE}
    kept = ("g", "o", "state")
    saved = {}

    def forward(self, arrays: Arrays, keep: bool) -> Arrays:
        x, state = arrays["x"], arrays["state"]
        tiling = _Tiling(x.shape, self.time_block, self.channel_block, reverse=False)
        tokens, states = tiling.tokens(), tiling.state()
        return tiling.call(
            _forward_kernel,
            "vector_forward",
            {"g": (arrays["g"], tokens), "x": (x, tokens), "state": (state, states)},
            {"o": (x, tokens), "final": (jax.ShapeDtypeStruct(state.shape, jnp.float32), states)},
        )

    def backward(self, arrays: Arrays) -> Arrays:
        g, o, state = arrays["g"], arrays["o"], arrays["state"]
        tiling = _Tiling(g.shape, self.time_block, self.channel_block, reverse=True)
        tokens, states = tiling.tokens(), tiling.state()
        return tiling.call(
            _backward_kernel,
            "vector_backward",
            {
                "g": (g, tokens),
                "o": (o, tokens),
                "before": (o, tiling.before()),
                "d_o": (arrays["d_o"], tokens),
                "state": (state, states),
                "d_final": (arrays["d_final"], states),
            },
            {
                "d_g": (g, tokens),
                "d_x": (o, tokens),
                "d_state": (jax.ShapeDtypeStruct(state.shape, jnp.float32), states),
            },
        )


def vector_scan(
    x: jax.Array,
    g: jax.Array,
    state: jax.Array,
    time_block: int = TIME_BLOCK,
    channel_block: int = CHANNEL_BLOCK,
    machine: Machine | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(final state float32 `[B, D]`, h `[B, T, D]` in the dtype of x) of h_t = exp(g_t) h_{t-1} + x_t from `state`.

    Args:
        x, g: `[B, T, D]`, float32 or bfloat16; g may be -inf where the state is to be forgotten.
        state: `[B, D]` float32.
        time_block, channel_block: tokens and channels of a grid step.
        machine: what the call is traced for; None is the one around it.

    Raises:
        ValueError: blocks that are no multiple of 16 tokens or of 128 channels.
    """
    if time_block < 1 or time_block % ROWS or channel_block < 1 or channel_block % 128:
        raise ValueError(
            f"vector_scan: time_block={time_block}, channel_block={channel_block}, wants multiples of {ROWS} and 128"
        )
    channels = x.shape[2]
    passes = _VectorPasses(machine or machine_here(), time_block, channel_block, (channels, channels))
    results = differentiable(passes, {"g": g, "x": x, "state": state[:, None]})
    return results["final"][:, 0], results["o"]


def refuses(machine: Machine, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> list[str]:
    """Reasons against a call: only its dtypes."""
    return dtype_reasons(dtypes)


def no_scale(record: str, scale: float | None) -> None:
    """Raises ValueError where a scale is given: elementwise recurrences have no queries."""
    if scale is not None:
        raise ValueError(f"{record}: scale={scale!r}, but there are no queries to scale; leave it out.")


def _run(
    machine: Machine,
    scale: float | None,
    chunk_size: int | None,
    fields: dict,
    reset: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """There is nothing that `chunk_size` could change: no state is kept, and no sum depends on it."""
    no_scale("vector_decay", scale)
    g = fields["g"]
    if reset is not None:
        # no sums of logs are taken here, so that the logarithm of zero is as good as a mask
        g = jnp.where(reset[..., None], -jnp.inf, g)
    return vector_scan(fields["x"], g, state, machine=machine)


VECTOR_DECAY = Kernel("vector_decay", "tpu", "chunk", {"x": "D", "g": "D"}, _run, refuses)
