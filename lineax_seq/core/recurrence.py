"""A recurrence is a record of pure functions of ONE head; the forms map them over batch, heads and chunks.

A record must say what one token does (`element` and `output`) and how the summaries of tokens combine (`monoid`). Every
form follows from these. A family whose chunk form has matrix products writes it down as three more functions:

    factors      = prepare(x, keep)         what a chunk's tokens give without the state; for all chunks at once
    state', seen = advance(factors, state)  the state after the chunk; one chunk after the other
    o            = readout(factors, seen)   the outputs of the chunk's tokens; for all chunks at once

`seen` is what `readout` needs to know of the state that entered the chunk. Where `advance` returns None for it,
`readout` gets that state itself.

Some inputs allow a cheaper way that is just as exact: decays that leave much of the state, keys of similar size, chunks
that begin at a multiple of their size. The compiled program tests the inputs, and the record says what follows. With
`decide`, every group of chunks is tested by itself, and `prepare` gets the answer and branches where the two ways
differ. With `special`, all chunks of the call take another form if the inputs of every group pass the test.
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
    """The state after one token of one head, and the token's output.

    Args:
        x: the token's fields, and the parameters that all tokens share.
        keep: None, or a boolean scalar that is False where a document starts: the token then finds the zero state.
        state: before the token.
    """
    if keep is not None:
        zero = recurrence.init_state(x)
        state = jax.tree.map(lambda s, z: jnp.where(keep, s, z), state, zero)
    if recurrence.update is None:
        new = recurrence.monoid.apply(recurrence.element(x), state)
    else:
        new = recurrence.update(x, state)
    return new, recurrence.output(x, new, state)


class Form(NamedTuple):
    """The three functions that take a state through a chunk; the module's docstring says what each does."""

    prepare: Callable[..., Any]
    advance: Callable[[Any, State], tuple[State, Any]]
    readout: Callable[[Any, Any], jax.Array]
    walks_tokens: bool = False  # whether `advance` is a loop over the chunk's tokens


class Special(NamedTuple):
    """A cheaper form, and the test that its inputs must pass."""

    applies: Callable[[Inputs], jax.Array]  # fields [B, N, C, heads, ...] of a group of chunks -> a boolean scalar
    form: Form


class Adjoint(NamedTuple):
    """The backward pass of `advance`, written out because automatic differentiation would repeat products in it.

    Derivation: docs/design/derivations/way_back.md.

    Attributes:
        ready: factors -> what `retreat` needs of them; for all chunks at once.
        retreat: (what `ready` gave, gradient of the state that leaves the chunk, gradient of `seen`) -> (gradient of
            the state that enters it, anything that `gather` wants to know); one chunk after the other, the last first.
        gather: (factors, state that enters, `seen`, gradient of the state that leaves, what `retreat` left) ->
            gradients of the factors, as far as `advance` reads them; for all chunks at once.
    """

    ready: Callable[[Any], Any]
    retreat: Callable[[Any, State, Any], tuple[State, Any]]
    gather: Callable[[Any, State, Any, State, Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Recurrence:
    """What a recurrence computes, as functions of one head. None of them sees a batch or a head axis.

    Attributes:
        name: of the record, in messages and in the table of kernels.
        fields: what one token consists of: the name of each array, and its dimensions after `B T` in the legend's
            letters: `"H K"`, `"HV V"`, `"HV"` (one number per value head), `"D"` (no heads).
        parameters: what all tokens share: names and dimensions, without `B T`. The functions below find fields and
            parameters in one dictionary.
        element: token -> its summary.
        output: (token, state after it, state before it) -> the token's output.
        monoid: how summaries combine and act on states.
        init_state: token -> the zero state, the one that has seen nothing. Only shapes and dtypes of the token count.
        update: (token, state) -> the state after the token, for summaries with a dense transition, which a single
            token need not build. None applies the token's summary.
        output_field: the field whose dtype the outputs have.
        padding: the values that make a token leave the state alone, for fields where it is not zero.
        prepare, advance, readout: the chunk form, as in the module's docstring; None derives it from `element`. `keep`
            is None, or a boolean `[C]` that is False where a document starts.
        adjoint: the backward pass of `advance`; None leaves it to JAX.
        decide: fields `[B, N, C, heads, ...]` of a group of chunks -> a boolean scalar, which `prepare` gets as its
            third argument; None where there is nothing to decide.
        special: a cheaper form for some inputs; None where there is none.
        loops: whether `advance` is a loop over the chunk's tokens.
        states: fields and parameters -> of how many matrices the state of a head consists. Groups of chunks get smaller
            with it, as far as the states that enter chunks are kept.
        shares_heads: whether the value heads of one key head share work in the chunk form. Where decays differ between
            them channel by channel they share none; queries and keys are then repeated for each value head, so that
            arrays have one axis less.
        scans_on_cpu: whether a CPU is faster with the token scan, which is then taken for the chunk form.
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
        """The heads that a field or parameter belongs to: "H", "HV", or None where it has no heads."""
        letter = (self.fields.get(name) or self.parameters[name]).split()[0]
        return letter if letter in ("H", "HV") else None

    def derived(self) -> "Recurrence":
        """The record without a chunk form of its own. What is derived from its tokens is the reference of that form."""
        return dataclasses.replace(
            self, prepare=None, advance=None, readout=None, adjoint=None, decide=None, special=None
        )

    @property
    def form(self) -> Form:
        """The chunk form for all inputs. Where it is derived, `advance` scans the tokens, and `seen` is the outputs."""
        if self.prepare is not None:
            assert self.advance and self.readout, f"{self.name}: prepare, advance and readout go together"
            return Form(self.prepare, self.advance, self.readout, self.loops)

        # `keep` is among the factors, and all factors must be differentiable: so it is a float there.
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
