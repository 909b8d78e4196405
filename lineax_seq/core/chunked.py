"""The chunk form of one call: groups of chunks, the state carried over them, and the way back.

What does not need the state is computed for all chunks of a group at once. A walk then carries the state over the
chunks, and the outputs follow for all chunks at once again.

The backward pass takes the groups from the last to the first. It computes the factors of a group again, and takes the
states that entered its chunks from the forward pass, or finds them by the same walk. Only the gradient of the state
goes from chunk to chunk; all gradients of the factors follow at once. Derivation: docs/design/derivations/way_back.md.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .layout import Layout, MappedForm, pad_time
from .recurrence import Form, Recurrence
from .target import Target
from .typing import Inputs, State


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut into groups and chunks.

    Attributes:
        layout: the order of axes.
        scale: what the field q is multiplied by, or None.
        chunk_size: C.
        groups: how many groups follow one another.
        chunks: N, the chunks of each sequence in a group.
        keeps_entries: whether the forward pass keeps the states that enter chunks, or only those that enter groups.
        forward_alone: whether there is no backward pass to keep anything for.
    """

    layout: Layout
    scale: float | None
    chunk_size: int
    groups: int
    chunks: int
    keeps_entries: bool
    forward_alone: bool

    @property
    def recurrence(self) -> Recurrence:
        return self.layout.recurrence

    @property
    def group_tokens(self) -> int:
        return self.chunks * self.chunk_size

    @property
    def padded_length(self) -> int:
        return self.groups * self.group_tokens

    def unroll(self, form: MappedForm) -> int:
        """How many chunks the walk takes in one turn of its loop; all of them where there is to be no loop."""
        return 1 if self.keeps_entries or form.walks_tokens else self.chunks


def plan(
    recurrence: Recurrence,
    scale: float | None,
    chunk_size: int,
    target: Target,
    xs: Inputs,
    forward_alone: bool = False,
) -> Plan:
    """The plan for fields and parameters `xs`. A symbolic batch counts as one sequence."""
    layout = Layout.of(recurrence, xs)
    heads = xs[recurrence.output_field].shape[2] if recurrence.has_heads else 1
    sequences = heads * (layout.batch if isinstance(layout.batch, int) else 1)
    chunks = -(-layout.length // chunk_size)
    width = xs[recurrence.output_field].shape[-1] if recurrence.has_heads else None
    at_once = target.groups.chunks_at_once(sequences, chunk_size, width, recurrence.states(xs), forward_alone)
    groups = -(-chunks // at_once)
    walks_tokens = recurrence.form.walks_tokens and recurrence.special is None
    keeps = target.groups.keep_entries or walks_tokens
    return Plan(layout, scale, chunk_size, groups, -(-chunks // groups), keeps, forward_alone)


class Cut:
    """The inputs of a call, padded to whole groups, and the ways to read them group by group."""

    def __init__(self, plan: Plan, xs: Inputs, reset: jax.Array | None):
        fields, padding, length = plan.recurrence.fields, plan.recurrence.padding, plan.padded_length
        self.plan, self.dtypes = plan, {name: x.dtype for name, x in xs.items()}
        self.xs = {n: pad_time(x, length, padding.get(n, 0)) if n in fields else x for n, x in xs.items()}
        self.keep = None if reset is None else ~pad_time(reset, length)
        decide = plan.recurrence.decide
        self.decisions = None if decide is None else self.holds(decide)

    def time(self, x: jax.Array, group: jax.Array) -> jax.Array:
        """The group's tokens of `x [B, T, ...]`."""
        size = self.plan.group_tokens
        return x if self.plan.groups == 1 else lax.dynamic_slice_in_dim(x, group * size, size, axis=1)

    def inputs(self, group: jax.Array) -> tuple[Inputs, jax.Array | None]:
        """The group's fields `[N, B, H, (n,) C, ...]` with the parameters, and its `keep [N, B, C]`."""
        plan, layout, fields = self.plan, self.plan.layout, self.plan.recurrence.fields
        part = {name: self.time(x, group) if name in fields else x for name, x in self.xs.items()}
        part = layout.computed(part, plan.scale)
        x = {name: layout.chunks_first(name, part[name], plan.chunk_size) for name in fields}
        keep = self.keep
        if keep is not None:
            keep = self.time(keep, group)
            keep = jnp.moveaxis(keep.reshape(keep.shape[0], plan.chunks, plan.chunk_size), 1, 0)
        return x | layout.parameters(part), keep

    def holds(self, question: Callable[[Inputs], jax.Array]) -> jax.Array:
        """What `question` says of the fields `[B, N, C, heads, ...]` of every group: bool `[groups]`."""
        plan = self.plan
        computed = plan.layout.computed(self.xs, None)
        shape = (plan.groups, plan.chunks, plan.chunk_size)
        split = {n: computed[n].reshape(-1, *shape, *computed[n].shape[2:]) for n in plan.recurrence.fields}
        return jax.vmap(question, 1)(split)

    def joined(self, x: jax.Array) -> jax.Array:
        """`[groups, B, tokens, ...]` -> `[B, T, ...]` without the padding."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.plan.layout.length]


# ---- forward


def forward(plan: Plan, xs: Inputs, reset: jax.Array | None, state: State, factors: Any = None):
    """`((final state, o), entries)`, where `entries` are the states that `backward` needs, or None.

    These are the states that enter the groups, `[groups, B, H, (n,) ...]`, or those that enter their chunks,
    `[groups, N, B, H, (n,) ...]`.
    """
    cut, layout, field = Cut(plan, xs, reset), plan.layout, plan.recurrence.output_field

    def group(form: MappedForm, x: Inputs, state: State, index: jax.Array):
        prepared = form.prepare_all(x) if factors is None else factors
        new, entries, seen = _walk(plan, form, prepared, state)
        o = layout.time_back(field, form.readout_all(prepared, seen)).astype(cut.dtypes[field])
        return new, (o, None if plan.forward_alone else entries if plan.keeps_entries else state)

    state, (o, entries) = _over_groups(cut, group, layout.group_state(state))
    return (layout.merge_heads(state), cut.joined(o)), entries


def factors(plan: Plan, xs: Inputs, reset: jax.Array | None) -> Any:
    """The factors of all chunks; None where there are several groups, or another form with factors of its own."""
    if plan.groups > 1 or plan.recurrence.special is not None:
        return None
    cut = Cut(plan, xs, reset)
    x, keep = cut.inputs(jnp.asarray(0))
    return _form(cut, plan.recurrence.form, keep, jnp.asarray(0)).prepare_all(x)


def _walk(plan: Plan, form: MappedForm, factors: Any, state: State):
    """The state carried over the chunks of a group: `(final state, states that enter the chunks, seen)`."""

    def body(state, factors_c):
        new, seen = form.advance(factors_c, state)
        return new, (state, seen)

    state, (entries, seen) = lax.scan(body, state, factors, unroll=plan.unroll(form))
    return state, entries, entries if seen is None else seen


# ---- backward


def backward(plan: Plan, xs: Inputs, reset: jax.Array | None, entries: State, d_state: State, d_o: jax.Array):
    """The gradients of the inputs and of the initial state."""
    cut, layout, field, fields = Cut(plan, xs, reset), plan.layout, plan.recurrence.output_field, plan.recurrence.fields
    d_o = pad_time(d_o, plan.padded_length)

    def group(form: MappedForm, x: Inputs, d_state: State, index: jax.Array, entries: State):
        d_out = layout.chunks_first(field, cut.time(d_o, index).astype(layout.dtype), plan.chunk_size)
        factors, pull_prepare = jax.vjp(form.prepare_all, x)
        seen = None
        if not plan.keeps_entries:
            _, entries, seen = _walk(plan, form, factors, entries)
        pull = _pull if plan.recurrence.adjoint is None else _pull_adjoint
        d_factors, d_before = pull(plan, form, factors, entries, seen, d_state, d_out)
        (d_x,) = pull_prepare(d_factors)
        if plan.scale is not None:
            d_x = {**d_x, "q": d_x["q"] * plan.scale}
        back = lambda name, d: layout.time_back(name, d).astype(cut.dtypes[name])  # noqa: E731
        return d_before, {name: back(name, d) if name in fields else d for name, d in d_x.items()}

    d_state, d_xs = _over_groups(cut, group, layout.group_state(d_state), entries, reverse=True)
    gradients = {}
    for name, d in d_xs.items():
        gradients[name] = cut.joined(d) if name in fields else d.sum(0).reshape(xs[name].shape).astype(xs[name].dtype)
    return gradients, layout.merge_heads(d_state)


def _pull(plan: Plan, form: MappedForm, factors: Any, entries: State, seen: Any, d_state: State, d_o: jax.Array):
    """The gradients of a group's factors and of the state that enters the group, by JAX's gradient of `advance`.

    Where `advance` is a loop over tokens, the gradients of the factors are taken in the same walk, because the loop
    would otherwise run twice.
    """
    walks_tokens = form.walks_tokens
    (_, seen), pull_advance = jax.vjp(form.advance_all, factors, entries)
    _, pull_readout = jax.vjp(form.readout_all, factors, entries if seen is None else seen)
    d_factors, d_seen = pull_readout(d_o)
    d_entries, d_seen = (d_seen, None) if seen is None else (None, d_seen)

    def body(d_state, chunk):
        factors_c, entry, d_entry, d_seen_c = chunk
        if walks_tokens:
            _, pull = jax.vjp(form.advance, factors_c, entry)
            out, d_before = pull((d_state, d_seen_c))
        else:
            _, pull = jax.vjp(functools.partial(form.advance, factors_c), entry)
            out, (d_before,) = d_state, pull((d_state, d_seen_c))
        return d_before if d_entry is None else jax.tree.map(jnp.add, d_before, d_entry), out

    chunks = factors, entries, d_entries, d_seen
    d_before, d_through = lax.scan(body, d_state, chunks, reverse=True, unroll=plan.unroll(form))
    if not walks_tokens:
        d_through, _ = pull_advance((d_through, d_seen))
    return jax.tree.map(jnp.add, d_factors, d_through), d_before


def _pull_adjoint(
    plan: Plan, form: MappedForm, factors: Any, entries: State, seen: Any, d_state: State, d_o: jax.Array
):
    """The same gradients by the record's `Adjoint`."""
    assert form.ready_all and form.retreat and form.gather_all
    if seen is None:
        seen = form.advance_all(factors, entries)[1]
    _, pull_readout = jax.vjp(form.readout_all, factors, seen)
    d_factors, d_seen = pull_readout(d_o)

    def body(d_state, chunk):
        d_before, kept = form.retreat(chunk[0], d_state, chunk[1])
        return d_before, (d_state, kept)

    d_before, (d_after, kept) = lax.scan(
        body, d_state, (form.ready_all(factors), d_seen), reverse=True, unroll=plan.unroll(form)
    )
    through = form.gather_all(factors, entries, seen, d_after, kept)
    return jax.tree.map(jnp.add, d_factors, through), d_before


# ---- groups


def _form(cut: Cut, form: Form, keep: jax.Array | None, group: jax.Array) -> MappedForm:
    """The form for one group. `prepare` is given what the record's `decide` said of this group."""
    if cut.decisions is not None:
        decision, prepare = cut.decisions[group], form.prepare
        form = form._replace(prepare=lambda x, keep: prepare(x, keep, decision))
    return MappedForm.of(cut.plan.layout, form, keep)


def _over_groups(cut: Cut, group: Callable, carry, *rows, reverse: bool = False):
    """A scan of `group(form, x, carry, index, *rows)` over the groups.

    If the record has a special form that is exact for all groups, all take it. The branch stands outside of the loop,
    because arrays that cross the border of a branch are written to memory.
    """
    plan, record = cut.plan, cut.plan.recurrence

    def loop(form: Form, carry):
        def body(carry, over):
            index, *row = over
            x, keep = cut.inputs(index)
            return group(_form(cut, form, keep, index), x, carry, index, *row)

        over = (jnp.arange(plan.groups), *rows)
        if plan.groups == 1:
            carry, out = body(carry, jax.tree.map(lambda x: x[0], over))
            return carry, jax.tree.map(lambda x: x[None], out)
        return lax.scan(body, carry, over, reverse=reverse)

    general = functools.partial(loop, record.form)
    if record.special is None:
        return general(carry)
    special = functools.partial(loop, record.special.form)
    return lax.cond(cut.holds(record.special.applies).all(), special, general, carry)
