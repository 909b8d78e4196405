"""A recurrence is a record of pure functions of ONE head; the forms map them over batch, heads and chunks.

What must be given is the mathematics of one token (`element`, `output`) and the monoid its summaries live in.
The chunk form of a family is given by three more functions with derived defaults that are slow and obviously right:

    factors      = prepare(x, keep)         what a chunk's tokens say without the state (all chunks at once)
    state', seen = advance(factors, state)  carry the state over the chunk (in sequence)
    o            = readout(factors, seen)   the chunk's outputs (all chunks at once)

`seen` is what the outputs need of the state that entered the chunk; None where that is the state itself.

Some inputs allow a cheaper way that is just as exact: gates that decay little, keys of moderate size, chunks that begin
at round positions. Which inputs these are is decided once for a whole group of chunks, by a boolean that the compiled
program computes. A record says so in one of two ways. With `decide`, `prepare` gets the boolean and branches where the
two ways differ. With `special`, the group's chunks all take another form.
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


class Form(NamedTuple):
    """One way through a chunk, see the module's docstring."""

    prepare: Callable[..., Any]
    advance: Callable[[Any, State], tuple[State, Any]]
    readout: Callable[[Any, Any], jax.Array]
    walks_tokens: bool = False  # whether `advance` is a loop over the chunk's tokens


class Special(NamedTuple):
    """A cheaper form and the inputs that it is exact for."""

    applies: Callable[[Inputs], jax.Array]  # of all chunks of a group, fields [B, N, C, heads, ...]: a boolean scalar
    form: Form


class Adjoint(NamedTuple):
    """The way back through `advance`, written out: what autodiff makes of it repeats products and transposes.

    ready: factors -> what `retreat` needs of them (all chunks at once).
    retreat: (ready factors, gradient of the state that leaves, of `seen`) -> (gradient of the state that enters,
        `kept` for `gather`) (in sequence, the last chunk first).
    gather: (factors, state that enters, seen, gradient of the state that leaves, kept) -> gradients of the factors that
        `advance` reads (all chunks at once).
    """

    ready: Callable[[Any], Any]
    retreat: Callable[[Any, State, Any], tuple[State, Any]]
    gather: Callable[[Any, State, Any, State, Any], Any]


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
        logs: fields that hold logarithms and may be -inf.
        padding: field -> its value in a token that leaves the state alone, where that is not zero.
        prepare, advance, readout: the chunk form, see the module's docstring; None takes the derived default.
            `keep` is None or a boolean `[C]`, False where a document starts.
        adjoint: None, or the way back through `advance` written out.
        decide: None, or all fields of a group of chunks, `[B, N, C, heads, ...]` -> a boolean scalar that `prepare`
            takes as its third argument.
        special: None, or a cheaper form for some inputs.
        loops: whether `advance` is a loop over the chunk's tokens.
        states: inputs -> how many matrices a head's state is made of, for the memory of a group of chunks.
        shares_heads: whether value heads of one key head share work. Where every value head has decays of its own per
            channel, nothing is shared; queries and keys are repeated then, and arrays have an axis less.
        scans_on_cpu: whether the token scan is the faster form there; then the chunk form is that scan.
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
    logs: tuple[str, ...] = ("g", "f", "i")
    padding: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prepare: Callable[..., Any] | None = None
    advance: Callable[[Any, State], tuple[State, Any]] | None = None
    readout: Callable[[Any, Any], jax.Array] | None = None
    adjoint: Adjoint | None = None
    decide: Callable[[Inputs], jax.Array] | None = None
    special: Special | None = None
    loops: bool = False
    states: Callable[[Inputs], int] = lambda xs: 1
    shares_heads: bool = True
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
        return dataclasses.replace(
            self, prepare=None, advance=None, readout=None, adjoint=None, decide=None, special=None
        )

    @property
    def form(self) -> Form:
        """The general way through a chunk, derived where not given: the chunk is a scan, and `seen` its outputs."""
        if self.prepare is not None:
            assert self.advance and self.readout, f"{self.name}: prepare, advance and readout go together"
            return Form(self.prepare, self.advance, self.readout, self.loops)

        # keep travels as a float so that every factor is differentiable
        def prepare(x: Inputs, keep: jax.Array | None):
            return x, None if keep is None else keep.astype(jnp.float32)

        def advance(factors, state: State):
            x, keep = factors
            tokens, shared = ({name: x[name] for name in names} for names in (self.fields, self.parameters))

            def body(state, token):
                x, keep = token
                return step(self, x | shared, None if keep is None else keep > 0.5, state)

            return lax.scan(body, state, (tokens, keep))

        return Form(prepare, advance, lambda factors, seen: seen, walks_tokens=True)
