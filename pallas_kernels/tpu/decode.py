"""One token for a batch of states, in place: decay the state, write a key and value, read a query.

    S' = exp(g) S + k w + b (a S),   o = q S'

with g a number per head or per key channel, or none. A delta rule reads the decayed state and subtracts what
it reads: w = beta v, b = -k, a = beta k exp(g). Records without such a correction have no a and b. The state is read
and written once, and that is what takes the time: 2 K V float32 numbers a head.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .._shared.kernel import DTYPES, Kernel, dtype_reasons
from .._shared.machine import Machine
from .._shared.partition import over_mesh
from ._family import Family
from ._matrix_state import WIDTHS
from ._pallas_call import pallas_call

HEADS = 8  # of a grid step: the rows of a register


def _kernel(
    *, q_ref, k_ref, w_ref, state_ref, o_ref, new_state_ref, g_ref: Any = None, a_ref: Any = None, b_ref: Any = None
):
    """Vectors are `[heads, K or V]`, g may be `[heads, 1]`, states are `[heads, K, V]`."""
    # what multiplies the state's rows is wanted along sublanes
    keys, decays = k_ref[...].T, None if g_ref is None else jnp.exp(g_ref[...])
    # the new state is read as the old one and what is written to it, so that one product with it does for all
    queries = q_ref[...] if decays is None else q_ref[...] * decays
    overlap = lambda ref: jnp.sum(q_ref[...] * ref[...], axis=1, keepdims=True)  # noqa: E731
    own, back = overlap(k_ref), None if b_ref is None else (b_ref[...].T, overlap(b_ref))
    per_channel = decays is not None and decays.shape[1] > 1
    decays = decays.T if per_channel else decays
    for head in range(state_ref.shape[0]):
        row, state, written = slice(head, head + 1), state_ref[head], w_ref[head : head + 1, :]
        readers = queries[row] if back is None else jnp.concatenate([queries[row], a_ref[row, :]])
        reads = jnp.dot(readers, state, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        if decays is not None:
            state = state * (decays[:, row] if per_channel else decays[row])
        state, o = state + keys[:, row] * written, reads[:1] + own[row] * written
        if back is not None:
            state, o = state + back[0][:, row] * reads[1:], o + back[1][row] * reads[1:]
        new_state_ref[head] = state
        o_ref[row, :] = o


def decode(
    machine: Machine,
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
    given = {"q": q, "k": k, "w": w, "g": g, "a": a, "b": b}
    arrays = {name: x.astype(jnp.float32) for name, x in given.items() if x is not None} | {"state": state}
    operands, heads = [*(["B H D"] * (len(arrays) - 1)), "B H K V"], state.shape[1]

    def own_part(*own: jax.Array) -> tuple[jax.Array, ...]:
        results = _call(dict(zip(arrays, own, strict=True)))
        return results["o"], results["new_state"]

    o, new = over_mesh(machine, own_part, operands, ["B H V", "B H K V"], (heads, heads), [*arrays.values()])
    return new, o


def _call(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    state = arrays["state"]
    batch, heads, K, V = state.shape
    block = HEADS if heads % HEADS == 0 else heads
    row = lambda width: pl.BlockSpec((None, block, width), lambda b, h: (b, h, 0))  # noqa: E731
    matrix = pl.BlockSpec((None, block, K, V), lambda b, h: (b, h, 0, 0))
    return pallas_call(
        _kernel,
        "decode",
        grid=(batch, heads // block),
        inputs={name: (x, matrix if name == "state" else row(x.shape[2])) for name, x in arrays.items()},
        outputs={
            "o": (jax.ShapeDtypeStruct((batch, heads, V), jnp.float32), row(V)),
            "new_state": (jax.ShapeDtypeStruct(state.shape, jnp.float32), matrix),
        },
        in_place={"state": "new_state"},
        dimension_semantics=("parallel", "parallel"),
    )


def _to_value_heads(x: jax.Array, heads: int) -> jax.Array:
    """Each key head's `[B, H, K]` for the value heads that share it."""
    batch, own, width = x.shape
    if own == heads:
        return x
    return jnp.broadcast_to(x[:, :, None], (batch, own, heads // own, width)).reshape(batch, heads, width)


def refuses(machine: Machine, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> list[str]:
    """Reasons against one token of these sizes and dtypes."""
    reasons = dtype_reasons(dtypes, (*DTYPES, "float16"))
    reasons += [f"{letter}={sizes[letter]}, wants one of {WIDTHS}" for letter in "KV" if sizes[letter] not in WIDTHS]
    if sizes["T"] > 1:
        reasons.append(f"{sizes['T']} steps a token, wants one step a token, not several")
    return reasons


def step(
    machine: Machine,
    scale: float | None,
    chunk_size: None,
    fields: Mapping[str, jax.Array],
    reset: None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(new state, o `[B, 1, HV, V]`) of one token of the scalar, diagonal, delta and low-rank records.

    Raises:
        ValueError: a chunk size or a reset, which one token has not.
    """
    if chunk_size is not None or reset is not None:
        raise ValueError(f"decode.step: {chunk_size=}, {reset=}; one token has neither: both want None.")
    f32 = {name: x[:, 0].astype(jnp.float32) for name, x in fields.items()}
    q, k = (_to_value_heads(f32[name], state.shape[1]) for name in ("q", "k"))
    written, g, a, b = f32["v"], f32.get("g"), f32.get("a"), f32.get("b")
    if "beta" in f32 or "w" in f32:  # a delta rule, with one rate or with gates per channel
        erase, write = (f32["b"], f32["w"]) if "w" in f32 else (f32["beta"][..., None],) * 2
        decay = 1.0 if g is None else jnp.exp(g if g.ndim == 3 else g[..., None])
        written, a, b = write * written, erase * k * decay, -k
    new, o = decode(machine, q if scale is None else q * scale, k, written, state, g, a, b)
    return new, o[:, None].astype(fields["v"].dtype)


def step_kernel(family: Family) -> Kernel:
    """One token of the family's record."""
    return Kernel(family.name, "tpu", "step", family.fields, step, refuses)
