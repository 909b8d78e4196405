"""Elementwise recurrences: h_t = exp(g_t) h_{t-1} + x_t for each channel, forward and backward.

Channels lie on lanes, tokens on sublanes. Eight tokens are scanned in registers in three doublings, whatever entered
them is added at the end, and only that last step waits for the tokens before. Everything is read and written once: HBM
binds.

Backward is the same scan from right to left. With z_t = exp(g_t) dh_t, what token t hands to its predecessor,

    z_t = exp(g_t) z_{t+1} + exp(g_t) do_t,   dx_t = do_t + z_{t+1},   dg_t = z_t h_{t-1},   dh_0 = z_1

and h_{t-1} is the output before, so that nothing is kept but the outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._platform import require_tpu
from ._partition import over_mesh

TILE = 8  # tokens of a register
ROWS = 16  # tokens of a turn: one tile of bfloat16, two registers
TIME_BLOCK = 256
CHANNEL_BLOCK = 512
TOKENS, STATE = "B T H", "B X H"  # to what partitions, channels are what heads are elsewhere


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


def _forward_kernel(g_ref, x_ref, state_ref, o_ref, final_ref, carry_ref, *, length: int):
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
    g_ref, o_ref, before_ref, d_o_ref, state_ref, d_final_ref, d_g_ref, d_x_ref, d_state_ref, carry_ref, *, length: int
):
    blocks, turns = pl.num_programs(2), g_ref.shape[0] // ROWS
    time = blocks - 1 - pl.program_id(2)

    @pl.when(time == blocks - 1)
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


class _Blocks:
    """Tiling of arrays `[B, T, D]` and `[B, 1, D]`: batch and channels in parallel, time in sequence."""

    def __init__(self, shape: tuple[int, int, int], time_block: int, channel_block: int, reverse: bool):
        batch, length, width = shape
        self.time = min(time_block, -(-length // ROWS) * ROWS)
        self.width = width if width <= channel_block else channel_block
        self.blocks = -(-length // self.time)
        self.grid = (batch, -(-width // self.width), self.blocks)
        self.at = (lambda t: self.blocks - 1 - t) if reverse else (lambda t: t)

    def tokens(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.time, self.width), lambda b, d, t: (b, self.at(t), d))

    def before(self) -> pl.BlockSpec:
        """The rows that end where the block begins; the first ones for the first block."""
        turns = self.time // ROWS
        return pl.BlockSpec((None, ROWS, self.width), lambda b, d, t: (b, jnp.maximum(self.at(t) * turns - 1, 0), d))

    def state(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, self.width), lambda b, d, t: (b, 0, d))

    def call(self, kernel, name: str, in_specs, out_specs, out_shape):
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_shape],
            scratch_shapes=[pltpu.VMEM((1, self.width), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name=name,
        )


def vector_scan(
    x: jax.Array,
    g: jax.Array,
    state: jax.Array,
    time_block: int = TIME_BLOCK,
    channel_block: int = CHANNEL_BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """(final state float32 `[B, D]`, h `[B, T, D]` in the dtype of x) of h_t = exp(g_t) h_{t-1} + x_t from `state`.

    Args:
        x, g: `[B, T, D]`, float32 or bfloat16; g may be -inf where the state is to be forgotten.
        state: `[B, D]` float32.
        time_block, channel_block: tokens and channels of a grid step.

    Raises:
        ValueError: blocks that are no multiple of 16 tokens or of 128 channels.
    """
    if time_block < 1 or time_block % ROWS or channel_block < 1 or channel_block % 128:
        raise ValueError(
            f"vector_scan: time_block={time_block}, channel_block={channel_block}, wants multiples of {ROWS} and 128"
        )
    return _scan(x, g, state, time_block, channel_block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scan(x, g, state, time_block, channel_block):
    def run(g, x, state):
        blocks = _Blocks(x.shape, time_block, channel_block, reverse=False)
        return blocks.call(
            functools.partial(_forward_kernel, length=x.shape[1]),
            "vector_forward",
            [blocks.tokens(), blocks.tokens(), blocks.state()],
            [blocks.tokens(), blocks.state()],
            [x, jax.ShapeDtypeStruct(state.shape, jnp.float32)],
        )(g, x, state)

    o, final = _over_mesh(run, [TOKENS, TOKENS, STATE], [TOKENS, STATE], (g, x, state[:, None]))
    return final[:, 0], o


def _vector_forward(x, g, state, time_block, channel_block):
    final, o = _scan(x, g, state, time_block, channel_block)
    return (final, o), (g, o, state)


def _vector_backward(time_block, channel_block, residuals, cotangents):
    (g, o, state), (d_final, d_o) = residuals, cotangents

    def run(g, o, d_o, state, d_final):
        blocks = _Blocks(g.shape, time_block, channel_block, reverse=True)
        return blocks.call(
            functools.partial(_backward_kernel, length=g.shape[1]),
            "vector_backward",
            [blocks.tokens(), blocks.tokens(), blocks.before(), blocks.tokens(), blocks.state(), blocks.state()],
            [blocks.tokens(), blocks.tokens(), blocks.state()],
            [g, o, jax.ShapeDtypeStruct(state.shape, jnp.float32)],
        )(g, o, o, d_o, state, d_final)

    operands = [TOKENS, TOKENS, TOKENS, STATE, STATE]
    d_g, d_x, d_state = _over_mesh(
        run, operands, [TOKENS, TOKENS, STATE], (g, o, d_o, state[:, None], d_final[:, None])
    )
    return d_x, d_g, d_state[:, 0]


_scan.defvjp(_vector_forward, _vector_backward)


def _over_mesh(run, operands: list[str], results: list[str], arrays: tuple):
    """Each device scans its own sequences and channels."""
    channels = arrays[0].shape[2]
    return over_mesh(lambda *own: tuple(run(*own)), operands, results, {"H": channels, "HV": channels}, arrays)


def check(scale: float | None, fields: dict) -> None:
    """Refuse what these kernels do not take: ValueError for a scale, NotImplementedError for the rest."""
    require_tpu()
    if scale is not None:
        raise ValueError(f"mosaic_tpu: scale={scale!r}: elementwise recurrences have no queries to scale; wants None")
    wide = {name: str(x.dtype) for name, x in fields.items() if x.dtype not in (jnp.float32, jnp.bfloat16)}
    if wide:
        raise NotImplementedError(
            f"mosaic_tpu: {wide}: the kernels take float32 and bfloat16; use implementation='xla'"
        )


def vector_decay(scale: float | None, chunk_size: int | None, fields: dict, reset: jax.Array | None, state: jax.Array):
    """(final state, o) of the record `vector_decay`: fields x and g `[B, T, D]`, state `[B, D]`.

    There is nothing that `chunk_size` could change: no state is kept, and the sums of a step do not depend on it.

    Raises:
        NotImplementedError: the platform or dtypes it does not support.
    """
    check(scale, fields)
    x, g = fields["x"], fields["g"]
    if reset is not None:
        # no sums of logs are taken here, so that the logarithm of zero is as good as a mask
        g = jnp.where(reset[..., None], -jnp.inf, g)
    return vector_scan(x, g, state)
