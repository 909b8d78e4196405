"""The compiled part of a call: from its checked arguments to the record's fields, through one form, and back."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import dispatch, forms, quarantine
from .layout import Layout, compute_dtype
from .target import Target
from .typing import State

if TYPE_CHECKING:
    from .operator import Operator


@dataclasses.dataclass(frozen=True)
class How:
    """All that is static in a call: what is computed, in which way, and for which target.

    Attributes:
        chunk_size: C; None leaves it to a kernel, which has a tuned size of its own.
        axis_name, strategy: the mesh axis that T is split over, and how summaries travel along it; the arrays of the
            call are then one shard.
    """

    operator: "Operator"
    target: Target
    implementation: str
    form: str
    scale: float | None = None
    chunk_size: int | None = None
    causal: bool = True
    block_size: int | None = None
    axis_name: str | None = None
    strategy: str | None = None


class Distribution(NamedTuple):
    """How calls are computed on several devices. `lineax_seq.parallel` provides it when it is imported.

    Attributes:
        placement: (operator, arguments, segment ids, state) -> how these are split over a mesh; None if they are not.
        on_mesh: (how, placement, arguments, segment ids, state) -> `(o, final state)`, each device its own part.
        on_shard: (how, arguments, segment ids, state, first head) -> `(o, final state)` of one shard of T.
    """

    placement: Callable
    on_mesh: Callable
    on_shard: Callable


distribution: Distribution | None = None


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(how: How, placement: Any, xs: dict, segment_ids, state: State | None) -> tuple[jax.Array, State]:
    """`(o, final state)` of checked arguments.

    Raises:
        NotImplementedError: the implementation cannot compute this call; the message has the reasons.
    """
    if placement is not None:
        assert distribution is not None
        return distribution.on_mesh(how, placement, xs, segment_ids, state)
    return compute(how, xs, segment_ids, state)


@functools.partial(jax.jit, static_argnums=0)
def run_token(how: How, xs: dict, state: State | None) -> tuple[jax.Array, State]:
    """`(o_t, state)` of one token, from checked arguments without their T axis."""
    tokens = {name: x[:, None] if how.operator.arguments[name].per_token else x for name, x in xs.items()}
    o, state = compute(how, tokens, None, state)
    return o[:, 0], state


def compute(how: How, xs: dict, segment_ids, state: State | None, first_head: jax.Array | int = 0):
    """`(o, final state)` of the arrays at hand, inside the compiled program.

    `first_head` is the number of their first value head among all: on a mesh that splits heads, devices differ in it.
    """
    if how.axis_name is not None:
        assert distribution is not None, "import lineax_seq"
        return distribution.on_shard(how, xs, segment_ids, state, first_head)
    operator, starts, marks = how.operator, resets(segment_ids), None
    if starts is not None:
        xs, state, marks = quarantine.cleaned(operator, xs, state, how.causal)
    place = {"first_head": first_head} if operator.numbers_heads else {}
    fields, reset, state = prepared(operator, xs, starts, state, **place)
    if how.causal and how.block_size is None:
        form = functools.partial(form_of(how), reset=reset)
    else:
        form = _bidirectional(how, reset, *xs[next(iter(operator.arguments))].shape[:2])
    result = finished(operator, xs, form(fields, state=state))
    if marks is None or starts is None:
        return result
    spoilt, last = quarantine.reached(marks.written, marks.entered, starts, how.causal)
    return quarantine.spoil(result, spoilt | marks.queried, last)


def form_of(how: How) -> Callable:
    """The function `(fields, reset, state) -> (final state, o)` that the call asks for.

    Raises:
        NotImplementedError: there is no such kernel.
    """
    record = how.operator.recurrence
    if how.implementation == "xla":
        if how.form == "chunk":
            assert how.chunk_size is not None  # XLA's is always known
            return functools.partial(forms.chunk, record, how.target, how.scale, how.chunk_size)
        return functools.partial(forms.scan, record, how.scale)
    if how.form == "scan":
        raise NotImplementedError(f"{how.implementation}: the token scan has no kernel")
    chunk_size = how.chunk_size if how.form == "chunk" else None
    kernel = dispatch.kernel(record, how.implementation, how.target.machine, how.form)
    return functools.partial(kernel, how.scale, chunk_size)


def _bidirectional(how: How, reset, batch: int, length: int) -> Callable:
    if how.implementation != "xla":
        raise NotImplementedError(f"{how.implementation}: no kernel that reads the future yet")
    starts = None
    if how.block_size is not None:
        starts = positions(0, reset, batch, length) % how.block_size == 0
    both: Any = how.operator.bidirectional  # the checks refuse a call where it is None
    return lambda fields, state: both(how.target, how.scale, how.chunk_size, fields, reset, state, starts)


# ---- arguments to fields


def resets(segment_ids) -> jax.Array | None:
    """True where a token's document differs from the token's before it; never at the first token."""
    if segment_ids is None:
        return None
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def positions(seen: jax.Array | int, reset: jax.Array | None, batch: int, length: int) -> jax.Array:
    """int32 `[B, T]`: how many tokens of its document come before each token. `seen` came before the first one."""
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    before = jnp.broadcast_to(jnp.asarray(seen, jnp.int32), (batch,))[:, None] + places
    if reset is None:
        return before
    start = lax.cummax(jnp.where(reset, places, -1), axis=1)  # of the token's document; -1: before these tokens
    return jnp.where(start < 0, before, places - start)


def zero_state(operator: "Operator", fields: dict) -> State:
    return Layout.of(operator.recurrence, fields).zero_state(fields)


def prepared(operator: "Operator", xs: dict, reset, state, **place):
    """`(fields, reset, state)` as the forms take them; `place` is handed on to `Operator.fields`."""
    fields = operator.fields(xs, reset, state, **place)
    if state is None:
        state = zero_state(operator, fields)
    else:
        state = jax.tree.map(lambda s: jnp.asarray(s, compute_dtype(fields)), state)
    if reset is not None:
        length = Layout.of(operator.recurrence, fields).length
        if length != reset.shape[1]:  # Tokens have become micro-steps: a document starts at a token's first one.
            steps = length // reset.shape[1]
            reset = jnp.pad(reset[:, :, None], ((0, 0), (0, 0), (0, steps - 1))).reshape(reset.shape[0], length)
    return fields, reset, state


def finished(operator: "Operator", xs: dict, result) -> tuple[jax.Array, State]:
    final, o = result
    return (o if operator.finish is None else operator.finish(o, xs)), final
