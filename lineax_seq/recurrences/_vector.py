"""Family: elementwise recurrences. h_t = exp(g_t) h_{t-1} + x_t for vectors [D], or for each channel's states [D, N].

Chunks bring no matrix product here. The token scan reads and writes everything once, and its backward pass keeps no
more than an input's size. On a CPU nothing is faster (T=2048 D=512 float32, two cores of a Zen 5, forward and
forward+backward: scan 0.5 and 1.4 ms, chunk by chunk 1.0 and 3.3 ms, `lax.associative_scan` 1.1 and 2.8 ms), so there
VECTOR_DECAY takes the scan for its chunk form. Accelerators pay for every turn of a loop, and compute chunks in
parallel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..core.monoid import DECAY, Affine
from ..core.recurrence import Recurrence
from ..core.typing import Inputs


class Factors(NamedTuple):
    decay: jax.Array  # [C, D] what each token finds left of the entering state
    own: jax.Array  # [C, D] the states that the chunk's tokens make of the zero state


def _prepare(x: Inputs, keep: jax.Array | None) -> Factors:
    decay = jnp.exp(x["g"])
    if keep is not None:
        decay = jnp.where(keep[:, None], decay, 0)
    join = lambda earlier, later: (later[0] * earlier[0], later[0] * earlier[1] + later[1])  # noqa: E731
    return Factors(*lax.associative_scan(join, (decay, x["x"])))


VECTOR_DECAY = Recurrence(
    name="vector_decay",
    fields={"x": "D", "g": "D"},
    element=lambda x: Affine(x["g"], x["x"]),
    output=lambda x, state, previous: state,
    monoid=DECAY,
    init_state=lambda x: jnp.zeros_like(x["x"]),
    output_field="x",
    prepare=_prepare,
    advance=lambda factors, state: (factors.decay[-1] * state + factors.own[-1], None),
    readout=lambda factors, state: factors.own + factors.decay * state,
    scans_on_cpu=True,
)


def _prepare_selective(x: Inputs, keep: jax.Array | None):
    """The inputs themselves. States of all tokens, [C, D, N], exist in `advance` alone, for one chunk at a time."""
    return x, None if keep is None else keep.astype(x["u"].dtype)


def _advance_selective(factors, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A loop over tokens, on states [N, D]: vector units work along the last axis, and D is the longer one."""
    x, keep = factors
    A = x["A"].T

    def body(state, token):
        (u, dt, B, C), keep = token
        if keep is not None:
            state = jnp.where(keep > 0.5, state, 0)
        state = jnp.exp(dt * A) * state + (dt * u) * B[:, None]
        return state, (state * C[:, None]).sum(0)

    state, y = lax.scan(body, state.T, ((x["u"], x["dt"], x["B"], x["C"]), keep))
    return state.T, y


SELECTIVE = Recurrence(
    name="selective",
    fields={"u": "D", "dt": "D", "B": "N", "C": "N"},
    parameters={"A": "D N"},
    element=lambda x: Affine(x["dt"][:, None] * x["A"], (x["dt"] * x["u"])[:, None] * x["B"][None, :]),
    output=lambda x, state, previous: state @ x["C"],
    monoid=DECAY,
    init_state=lambda x: jnp.zeros_like(x["A"]),
    output_field="u",
    prepare=_prepare_selective,
    advance=_advance_selective,
    readout=lambda factors, y: y,
    loops=True,
)
