"""A recurrence is a record of pure functions of ONE head; the forms map them over batch, heads and chunks.

What must be given is the mathematics of one token (`element`, `output`) and the monoid its summaries live in.
The chunk form of a family is given by three more functions with derived defaults that are slow and obviously right:

    factors      = prepare(x, keep)         what a chunk's tokens say without the state (all chunks at once)
    state', seen = advance(factors, state)  carry the state over the chunk (in sequence)
    o            = readout(factors, seen)   the chunk's outputs (all chunks at once)

`seen` is what the outputs need of the state that entered the chunk; None where that is the state itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .monoid import Monoid
from .typing import Inputs, State, Summary


def step(recurrence: "Recurrence", x: Inputs, keep: jax.Array | None, state: State) -> tuple[State, jax.Array]:
    """One token of one head: the new state and the token's output. `keep` False starts from the zero state."""
    if keep is not None:
        zero = recurrence.init_state(x)
        state = jax.tree.map(lambda s, z: jnp.where(keep, s, z), state, zero)
    if recurrence.update is None:
        new = recurrence.monoid.apply(recurrence.element(x), state)
    else:
        new = recurrence.update(x, state)
    return new, recurrence.output(x, new, state)


class Shortcut(NamedTuple):
    """A cheaper `prepare` and the inputs that it is exact for."""

    applies: Callable[[Inputs], jax.Array]  # of all chunks of a block, fields [B, N, C, heads, ...]: a boolean scalar
    prepare: Callable[[Inputs, jax.Array | None], Any]
    longer_than: int = 0  # the chunks worth it: shorter ones have the same from another shortcut


@dataclasses.dataclass(frozen=True, eq=False)
class Recurrence:
    """One head's recurrence.

    Attributes:
        name: identifies the record in messages and tables of kernels.
        fields: what one token consists of: name -> its dimensions after `B T`, in the legend's letters: `"H K"`,
            `"HV V"`, `"HV"` (a scalar per value head), `"D"` (no heads).
        parameters: what all tokens share, in the same notation without `B T`; part of every `x`.
        element: one token -> its summary.
        output: (token, state after it, state before it) -> the token's output.
        monoid: how summaries combine and act on states.
        init_state: one token -> the zero state.
        update: None, or (token, state) -> state, where applying the token's summary would build a dense transition.
        output_field: the field whose dtype the outputs take.
        padding: field -> its value in a token that leaves the state alone, where that is not zero.
        prepare, advance, readout: the chunk form, see the module's docstring; None takes the derived default.
            `keep` is None or a boolean `[C]`, False where a document starts.
        loops: whether `advance` is a loop over the chunk's tokens.
        scans_on_cpu: whether the token scan is the faster form there; then the chunk form is that scan.
        shortcuts: cheaper ways to `prepare` that are exact for some inputs only, the cheapest first. The first that
            applies is taken, decided at run time for each block of chunks.
    """

    name: str
    fields: Mapping[str, str]
    element: Callable[[Inputs], Summary]
    output: Callable[[Inputs, State, State], jax.Array]
    monoid: Monoid
    init_state: Callable[[Inputs], State]
    update: Callable[[Inputs, State], State] | None = None
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    output_field: str = "v"
    padding: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Inputs, jax.Array | None], Any] | None = None
    advance: Callable[[Any, State], tuple[State, Any]] | None = None
    readout: Callable[[Any, Any], jax.Array] | None = None
    shortcuts: tuple[Shortcut, ...] = ()
    loops: bool = False
    scans_on_cpu: bool = False

    @property
    def has_heads(self) -> bool:
        return any(self.head_letter(name) for name in self.fields)

    def head_letter(self, name: str) -> str | None:
        """ "H", "HV" or None: which heads own the field or parameter."""
        letter = (self.fields.get(name) or self.parameters[name]).split()[0]
        return letter if letter in ("H", "HV") else None

    def derived(self) -> "Recurrence":
        """This recurrence with the chunk form derived from its tokens: the reference of a family's fast form."""
        return dataclasses.replace(self, prepare=None, advance=None, readout=None, shortcuts=())

    @property
    def walks_tokens(self) -> bool:
        """Whether the chunk form advances token by token."""
        return self.loops or self.prepare is None

    def chunk_form(self, shortcut: Shortcut | None = None) -> tuple[Callable, Callable, Callable]:
        """`(prepare, advance, readout)`, derived where not given: the chunk is a scan, and `seen` its outputs."""
        prepare = shortcut.prepare if shortcut else self.prepare
        if prepare is not None:
            assert self.advance and self.readout, f"{self.name}: prepare, advance and readout go together"
            return prepare, self.advance, self.readout

        # keep travels as a float so that every factor is differentiable
        def derived_prepare(x: Inputs, keep: jax.Array | None):
            return x, None if keep is None else keep.astype(jnp.float32)

        def derived_advance(factors, state: State):
            x, keep = factors
            tokens, shared = ({name: x[name] for name in names} for names in (self.fields, self.parameters))

            def body(state, token):
                x, keep = token
                return step(self, x | shared, None if keep is None else keep > 0.5, state)

            return lax.scan(body, state, (tokens, keep))

        return derived_prepare, derived_advance, lambda factors, seen: seen
