"""One token for a batch of states, in place: decay the state, write a key and value, read a query.

    S' = exp(g) S + k w + b (a S),   o = q S'

with g a number per head or per key channel, or none. A delta rule reads the decayed state and takes off what it reads:
w = beta v, b = -k, a = beta k exp(g). Records without such a correction have no a and b. The state is read and written
once and that is what takes the time: 2 K V float32 numbers a head.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._platform import require_tpu
from ._partition import over_mesh

HEADS = 8  # of a grid step: the rows of a register
WIDTHS = (64, 128, 256)


def _kernel(*refs, names: tuple[str, ...]):
    """Inputs in the order of `names`, `[heads, K or V or 1]`, and the state `[heads, K, V]`; then o and the state."""
    ins, (state_ref, o_ref, new_ref) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    # what multiplies the state's rows is wanted along sublanes
    keys, decays = ins["k"][...].T, None if "g" not in ins else jnp.exp(ins["g"][...])
    # the new state is read as the old one and what is written to it, so that one product with it does for all
    queries = ins["q"][...] if decays is None else ins["q"][...] * decays
    overlap = lambda name: jnp.sum(ins["q"][...] * ins[name][...], axis=1, keepdims=True)  # noqa: E731
    own, back = overlap("k"), (ins["b"][...].T, overlap("b")) if "b" in ins else None
    per_channel = decays is not None and decays.shape[1] > 1
    decays = decays.T if per_channel else decays
    for head in range(state_ref.shape[0]):
        row, state, written = slice(head, head + 1), state_ref[head], ins["w"][head : head + 1, :]
        readers = queries[row] if back is None else jnp.concatenate([queries[row], ins["a"][row, :]])
        reads = jnp.dot(readers, state, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        if decays is not None:
            state = state * (decays[:, row] if per_channel else decays[row])
        state, o = state + keys[:, row] * written, reads[:1] + own[row] * written
        if back is not None:
            state, o = state + back[0][:, row] * reads[1:], o + back[1][row] * reads[1:]
        new_ref[head] = state
        o_ref[row, :] = o


def decode(
    q: jax.Array,
    k: jax.Array,
    w: jax.Array,
    state: jax.Array,
    g: jax.Array | None = None,
    a: jax.Array | None = None,
    b: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(new state, o `[B, HV, V]` float32); the state's memory is reused where its caller gives it up.

    Args:
        q, k: `[B, HV, K]`.
        w: what is written, `[B, HV, V]`.
        state: `[B, HV, K, V]` float32.
        g: log of the decay, `[B, HV]` or `[B, HV, K]`.
        a, b: what reads the state before it decays, and along what that is written back, `[B, HV, K]`; both or none.
    """
    if g is not None and g.ndim == 2:
        g = g[..., None]
    ins = {"q": q, "k": k, "w": w, "g": g, "a": a, "b": b}
    ins = {name: x.astype(jnp.float32) for name, x in ins.items() if x is not None}
    arrays, heads = (*ins.values(), state), state.shape[1]
    operands, results = ["B H D"] * len(ins) + ["B H K V"], ["B H V", "B H K V"]
    run = functools.partial(_call, tuple(ins))
    o, new = over_mesh(run, operands, results, {"H": heads, "HV": heads}, arrays)
    return new, o


def _call(names: tuple[str, ...], *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    *rows, state = arrays
    batch, heads, K, V = state.shape
    block = HEADS if heads % HEADS == 0 else heads
    row = lambda width: pl.BlockSpec((None, block, width), lambda b, h: (b, h, 0))  # noqa: E731
    matrix = pl.BlockSpec((None, block, K, V), lambda b, h: (b, h, 0, 0))
    o, new = pl.pallas_call(
        functools.partial(_kernel, names=names),
        grid=(batch, heads // block),
        in_specs=[*(row(x.shape[2]) for x in rows), matrix],
        out_specs=[row(V), matrix],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, V), jnp.float32),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ],
        input_output_aliases={len(rows): 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="decode",
    )(*arrays)
    return o, new


def _to_value_heads(x: jax.Array, heads: int) -> jax.Array:
    """Each key head's `[B, H, K]` for the value heads that share it."""
    batch, own, width = x.shape
    if own == heads:
        return x
    return jnp.broadcast_to(x[:, :, None], (batch, own, heads // own, width)).reshape(batch, heads, width)


def step(scale: float | None, fields: dict, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(new state, o) of one token of the scalar, diagonal, delta and low-rank records: fields without their T axis.

    Raises:
        NotImplementedError: the platform, sizes or dtypes it does not support.
    """
    require_tpu()
    K, V = state.shape[-2:]
    if K not in WIDTHS or V not in WIDTHS or state.dtype != jnp.float32:
        raise NotImplementedError(
            f"mosaic_tpu: K={K}, V={V}, state in {state.dtype}: the kernel takes K and V in {WIDTHS} and float32; "
            "use implementation='xla'"
        )
    f32 = {name: x.astype(jnp.float32) for name, x in fields.items()}
    q, k = (_to_value_heads(f32[name], state.shape[1]) for name in ("q", "k"))
    written, g, a, b = f32["v"], f32.get("g"), f32.get("a"), f32.get("b")
    if "beta" in f32 or "w" in f32:  # a delta rule, with one rate or with gates per channel
        erase, write = (f32["b"], f32["w"]) if "w" in f32 else (f32["beta"][..., None],) * 2
        decay = 1.0 if g is None else jnp.exp(g if g.ndim == 3 else g[..., None])
        written, a, b = write * written, erase * k * decay, -k
    new, o = decode(q if scale is None else q * scale, k, written, state, g, a, b)
    return new, o.astype(fields["v"].dtype)
