"""Sequence parallelism of any recurrence: time is split over a mesh axis, with one collective forward and one backward.

Every device has a shard of contiguous tokens. Its forward pass has three steps:

    summary      what the shard's tokens do to any state. The chunk form from the zero state gives the part that they
                 add; sums of log-decays, or K columns that start as the identity, give the transition.
    exchange     `prefix` combines the summaries of earlier shards into the state that enters this one.
    outputs      The chunk form runs again from that state.

The backward pass has the same steps from right to left, for the gradient of the loss with respect to the state. A shard
maps the gradient L after it to T^T L + W before it, where T is its transition, and W comes from its own outputs. These
maps are a monoid as well. After the exchange, the chunk form's own backward pass runs with the gradient that enters
from the right. Summaries that are not affine pull gradients back through `apply` at the state that entered.
Derivation: docs/design/derivations/exchange.md.

What the tokens give without the state does not wait for the exchange, and the compiler moves it in between. Both runs
share their factors where `forms.chunk_factors` gives any, which a single group of chunks does. With a dense transition
the runs have different factors, because the columns of the identity are among those of the summary.

Source: LASP-2, Sun et al. 2025, arXiv:2502.07563, algorithms 1-4, for every monoid in place of their sum.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from ..core import checks, forms, quarantine
from ..core.layout import Layout
from ..core.lowering import How, finished, form_of, prepared, resets
from ..core.monoid import Monoid, Segmented, segmented
from ..core.operator import Operator
from ..core.recurrence import Recurrence
from ..core.typing import Inputs, State, Summary
from . import cost, prefix
from .prefix import Axis
from .summary import Adjoint, adjoint_monoid, mapped, shard_summary, zero_state
from .varying import vary, varying


def on_shard(how: How, xs: dict, segment_ids, state: State | None, first_head: jax.Array | int = 0):
    """`(o, final state)` of a call with `axis_name=`, whose arrays are one shard, inside `jax.shard_map`."""
    operator, name, marks = how.operator, how.axis_name, None
    assert name is not None  # what makes a call one of a shard
    if how.strategy is not None:
        checks.one_of(operator.name, "strategy", how.strategy, tuple(prefix.STRATEGIES))
    if not how.causal and not (operator.order_free and segment_ids is None):
        raise NotImplementedError(
            f"{operator.name}: causal=False with axis_name needs a sum over one whole document; "
            "leave segment_ids out, take a recurrence without decay, or gather T on one device."
        )
    if how.block_size is not None:
        raise NotImplementedError(f"{operator.name}: block_size with axis_name: blocks may cross a shard's border.")
    axes = varying((xs, segment_ids, state)) | varying(lax.axis_index(name))
    everywhere = functools.partial(vary, axes=axes)
    xs, replicated = everywhere(xs), axes - {name}
    place: dict[str, Any] = {"first_head": first_head} if operator.numbers_heads else {}
    starts, seen = _documents(operator, name, segment_ids, state, xs)
    if operator.seen is not None:
        place["seen"] = seen
    if starts is not None:
        xs, state, marks = quarantine.cleaned(operator, xs, state, how.causal)
    fields, reset, given = prepared(operator, xs, starts, state, **place)
    record, fields = operator.recurrence, everywhere(fields)
    state = vary(zero_state(record, fields) if state is None else given, replicated)
    prepare, form = None, form_of(how)
    run = lambda xs, reset, state, **more: form(xs, reset=reset, state=state, **more)  # noqa: E731
    if how.form == "chunk" and how.implementation == "xla" and record.monoid.probe is None:
        assert how.chunk_size is not None  # XLA's is always known
        prepare = functools.partial(forms.chunk_factors, record, how.target, how.scale, how.chunk_size)
    if lax.axis_size(name) == 1:
        final, o = run(fields, reset, everywhere(state))
        final = lax.psum(final, name)
    else:
        link = cost.link_of(how.target.machine)
        final, o = _Exchange(record, run, prepare, name, how.strategy, link, axes).call(fields, reset, state)
    if not how.causal:
        o = _reading(record, how.scale, fields, everywhere(final))
    result = finished(operator, xs, (final, o))
    if marks is None:
        return result
    spoilt, last = _spoilt(name, marks, starts)
    return quarantine.spoil(result, spoilt | marks.queried, last)


def _reading(recurrence: Recurrence, scale, fields: Inputs, state: State) -> jax.Array:
    """The outputs `[B, T, HV, V]` of tokens that all read the same state."""
    layout, dtype = Layout.of(recurrence, fields), fields[recurrence.output_field].dtype
    xs = layout.computed(fields, scale)
    read = layout.over_heads(lambda x, state: recurrence.output(x, state, state), "xs")
    o = jax.vmap(read, (layout.token_axes, None))(
        layout.tokens_first(xs) | layout.parameters(xs), layout.group_state(state)
    )
    return jnp.moveaxis(layout.merge_heads(o, 2), 0, 1).astype(dtype)


# ---- documents


def _documents(operator: Operator, name: str, segment_ids, state, xs: dict):
    """Where documents start in this shard, `[B, T]` or None, and how many tokens of its document precede it, `[B]`.

    Whether a document starts with the shard depends on the last token of the shard before. Every shard gathers four
    numbers from each of the others.
    """
    batch, length = xs[next(iter(operator.arguments))].shape[:2]
    index = lax.axis_index(name)
    seen = jnp.asarray(0 if operator.seen is None else operator.seen(state), jnp.int32)
    ids, starts = segment_ids, resets(segment_ids)
    if starts is None:
        return None, seen + index * length
    last = jnp.max(jnp.where(starts, jnp.arange(length), 0), axis=1).astype(ids.dtype)
    mine = jnp.stack([ids[:, 0], ids[:, -1], last, jnp.any(starts, axis=1).astype(ids.dtype)])
    first, end, last, inside = jnp.moveaxis(lax.all_gather(mine, name), 1, 0)  # [P, B] each
    border = jnp.concatenate([jnp.zeros_like(first[:1], bool), first[1:] != end[:-1]])
    starts = starts.at[:, 0].set(border[index])
    if operator.seen is None:
        return starts, None
    before = jnp.broadcast_to(seen, (batch,))
    for p in range(lax.axis_size(name) - 1):
        after = jnp.where(border[p] | (inside[p] > 0), length - last[p].astype(jnp.int32), before + length)
        before = jnp.where(p < index, after, before)
    return starts, before


def _spoilt(name: str, marks: quarantine.Marks, reset) -> tuple[jax.Array, jax.Array]:
    """Which tokens of this shard are reached by something that is not finite, and whether the final state is.

    A shard spoils the next one by tokens of its own last document. If no document starts in it, it also hands on what
    enters it. So two bits are gathered from each shard and head.
    """
    own = quarantine.reached(marks.written, jnp.zeros_like(marks.entered), reset, causal=True)[1]
    through = ~jnp.any(reset, axis=1).reshape(-1, *(1,) * (own.ndim - 1)) & jnp.ones_like(own)
    owns, throughs = lax.all_gather(jnp.stack([own, through]), name, axis=1, to="invarying")
    entered = [marks.entered]
    for p in range(lax.axis_size(name)):
        entered.append(owns[p] | (throughs[p] & entered[-1]))
    before = jnp.stack(entered)[lax.axis_index(name)]
    return quarantine.reached(marks.written, before, reset, causal=True)[0], entered[-1]


# ---- forward and backward


class _Exchange:
    """One call on one shard, with its backward pass.

    `run(fields, reset, state) -> (final state, o)` is the form that computes it. `prepare(fields, reset)` gives the
    `factors` that `run` may be given, or None.
    """

    def __init__(self, recurrence, run: Callable, prepare: Callable | None, name: str, strategy, link: cost.Link, axes):
        self.recurrence, self.run, self.prepare, self.name = recurrence, run, prepare, name
        self.strategy, self.link, self.axes = strategy, link, axes
        self.lead = 2 if recurrence.has_heads else 1

    def call(self, xs: Inputs, reset, state: State) -> tuple[State, jax.Array]:
        @jax.custom_vjp
        def exchange(xs, reset, state):
            run = self._run_of(xs, reset)
            final, entering, _ = self._enter(run, xs, reset, state)
            return final, run(xs, reset, entering)[1]

        def forward(*primals):
            xs, reset, state = jax.tree.map(lambda primal: primal.value, primals)
            run = self._run_of(xs, reset)
            final, entering, kept = self._enter(run, xs, reset, state)
            (_, o), pull = jax.vjp(lambda xs, state: run(xs, reset, state), xs, entering)
            return (final, o), (pull, entering, kept)

        exchange.defvjp(forward, self._backward, symbolic_zeros=True)
        self.shared_state = all(self._shared(x) for x in jax.tree.leaves(state))
        return exchange(xs, reset, state)

    def _run_of(self, xs: Inputs, reset) -> Callable:
        """`run` with the factors of these inputs, where there are any."""
        factors = self.prepare and self.prepare(xs, reset)
        return self.run if factors is None else functools.partial(self.run, factors=factors)

    def _enter(self, run: Callable, xs: Inputs, reset, state: State):
        """`(final state, state that enters this shard, (summary, zero state))`."""
        zero = vary(zero_state(self.recurrence, xs), self.axes - {self.name})
        summary = shard_summary(self.recurrence, run, xs, reset, vary(zero, self.axes), self.lead)
        entering, final = self._prefix(self._monoid(summary, zero), summary, state, reverse=False)
        return final, entering, (summary, zero)

    def _backward(self, residuals, cotangents):
        pull, entering, (summary, zero) = residuals
        d_final, d_o = cotangents
        d_final = jax.tree.map(self._whole, d_final)
        d_o = vary(_dense(d_o), self.axes)
        nothing = vary(jax.tree.map(jnp.zeros_like, zero), self.axes)
        tail = pull((nothing, d_o))[1]
        monoid = self._monoid(summary, zero)
        adjoint = monoid.adjoint(summary, tail) if monoid.adjoint else Adjoint(summary, entering, tail)
        leaving, d_state = self._prefix(adjoint_monoid(monoid), adjoint, d_final, reverse=True)
        d_xs, _ = pull((leaving, d_o))
        if not self.shared_state:
            d_state = jax.tree.map(lambda d: jnp.where(lax.axis_index(self.name) == 0, d, 0), d_state)
        return d_xs, None, d_state

    def _prefix(self, monoid: Monoid, summary: Summary, state: State, reverse: bool) -> tuple[State, State]:
        strategy = self.strategy or self._cheapest(monoid, summary, state)
        return prefix.STRATEGIES[strategy](monoid, summary, state, Axis(self.name, reverse), self.lead)

    def _cheapest(self, monoid: Monoid, summary: Summary, state: State) -> str:
        state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        packed = prefix.pack(summary, self.lead)[0].nbytes
        columns = prefix.columns(monoid, state, self.lead)
        return cost.cheapest(lax.axis_size(self.name), state_bytes, packed - state_bytes, columns, self.link)

    def _monoid(self, summary: Summary, zero: State) -> Monoid:
        monoid = mapped(self.recurrence.monoid, self.lead)
        if not isinstance(summary, Segmented):
            return monoid
        # `all_scan` takes some heads and columns of a state, so one zero must stand for all heads and columns.
        one = (slice(0, 1),) * self.lead + ((..., slice(0, 1)) if monoid.columns else ())
        return segmented(monoid, jax.tree.map(lambda z: z[one], zero))

    # Every device returns the final state. If the compiler knows that it is the same everywhere, so is its gradient.
    # If it does not know, under `check_vma=False`, each device has a share of the gradient, and the shares are added
    # here. For the initial state it is the other way round: the caller will add the gradients of all devices, so the
    # first device gives the whole gradient and the others give zeros.

    def _shared(self, x: jax.Array) -> bool:
        return bool(self.axes) and self.name not in varying(x)

    def _whole(self, cotangent):
        if isinstance(cotangent, SymbolicZero):
            return vary(_dense(cotangent), self.axes - {self.name})
        return cotangent if self._shared(cotangent) else lax.psum(cotangent, self.name)


def _dense(cotangent):
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    aval: Any = cotangent.aval
    return jnp.zeros(aval.shape, aval.dtype)
