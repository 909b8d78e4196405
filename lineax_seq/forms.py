"""The forms of a recurrence over batch, heads and time: `scan` (the reference, and of one token: decoding) and `chunk`.

Both take the recurrence's fields as `[B, T, heads, ...]`, `reset` (None or bool `[B, T]`: a document starts here)
and the state as `[B, HV, ...]`, and return the final state and the outputs `[B, T, HV, ...]`. They compute in float32,
or float64 when an input is float64. `scale` multiplies the field q.

`chunk` works through blocks of chunks: inside a block everything that does not need the state is computed for all its
chunks at once, then a walk carries the state over them. Its backward pass keeps the inputs and the states that enter
the blocks, and goes over these from right to left: it recomputes the block's factors, pulls back through its walk and
through `prepare`. Where all chunks are one block, as on accelerators, or a chunk is a loop over its tokens, it keeps
the states that enter the chunks instead.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .layout import Layout, MappedChunk, pad_time
from .recurrence import Recurrence, step
from .typing import Inputs, State

# Tokens of all sequences and heads that a block holds on a CPU, where its arrays should stay in cache. Forward alone
# twice as many are as fast; backward the memory of a call then exceeds what malloc keeps (32 MB), and touching fresh
# pages costs a quarter of the time. Accelerators take all chunks at once: they want the parallelism.
CPU_BLOCK_TOKENS: int = 1024
# And its chunks at most. They are walked without a loop: one would copy the state at every step, and fill the arrays
# that it stacks results in with zeros first. Programs grow with it.
CPU_BLOCK_CHUNKS: int = 8


def scan(
    recurrence: Recurrence, scale: float | None, xs: Inputs, reset: jax.Array | None, state: State
) -> tuple[State, jax.Array]:
    """Token by token: the reference of every other form."""
    layout, out_dtype = Layout(recurrence, xs), xs[recurrence.output_field].dtype
    xs = layout.computed(xs, scale)
    tokens, parameters = layout.tokens_first(xs), layout.parameters(xs)
    keep = None if reset is None else jnp.moveaxis(~reset, 1, 0)

    def body(state, token):
        x, keep_t = token[0] | parameters, token[1]
        if keep_t is None:
            return layout.over_heads(lambda x, s: step(recurrence, x, None, s), "xs")(x, state)
        return layout.over_heads(functools.partial(step, recurrence), "xrs")(x, keep_t, state)

    state, o = lax.scan(body, layout.group_state(state), (tokens, keep))
    return layout.merge_heads(state), jnp.moveaxis(layout.merge_heads(o, 2), 0, 1).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def chunk(
    recurrence: Recurrence,
    scale: float | None,
    chunk_size: int,
    xs: Inputs,
    reset: jax.Array | None,
    state: State,
    factors: Any = None,
) -> tuple[State, jax.Array]:
    """Chunk-parallel: everything inside a chunk for many chunks at once, the state carried over them by a scan.

    `factors`, where `chunk_factors` gave any for these inputs, are not made again; gradients are of the inputs alone.
    """
    return _Chunked(recurrence, scale, chunk_size, xs, reset).forward(state, factors, keep_entries=False)[0]


def _chunk_forward(recurrence, scale, chunk_size, xs, reset, state, factors):
    result, entries = _Chunked(recurrence, scale, chunk_size, xs, reset).forward(state, factors, keep_entries=True)
    return result, (xs, reset, entries)


def _chunk_backward(recurrence, scale, chunk_size, residuals, cotangents):
    xs, reset, entries = residuals
    d_xs, d_state = _Chunked(recurrence, scale, chunk_size, xs, reset).backward(entries, *cotangents)
    return d_xs, None, d_state, None


chunk.defvjp(_chunk_forward, _chunk_backward)


def chunk_factors(
    recurrence: Recurrence, scale: float | None, chunk_size: int, xs: Inputs, reset: jax.Array | None
) -> Any:
    """The factors of all chunks, for several runs of `chunk` from different states, where `chunk` has them apart.

    None where it does not: where blocks follow one another, or where ways to prepare give factors of different kinds.
    """
    return _Chunked(recurrence, scale, chunk_size, xs, reset).factors()


class _Chunked:
    """One call of the chunk form: its layout and its blocks."""

    def __init__(self, recurrence, scale, chunk_size, xs, reset):
        self.recurrence, self.scale, self.chunk_size = recurrence, scale, chunk_size
        self.layout = Layout(recurrence, xs)
        self.dtypes = {name: x.dtype for name, x in xs.items()}
        chunks = -(-self.layout.length // chunk_size)
        most = self._chunks_at_once(xs)
        self.at_once = most >= self.layout.length
        self.keeps_entries = self.at_once or recurrence.walks_tokens
        if not self.keeps_entries:
            most = min(most, CPU_BLOCK_CHUNKS)
        self.blocks = -(-chunks // max(1, most))
        self.chunks = -(-chunks // self.blocks)  # of a block
        self.unroll = 1 if self.keeps_entries else self.chunks
        padded = self.blocks * self.chunks * chunk_size
        pad = lambda name, x: pad_time(x, padded, recurrence.padding.get(name, 0))  # noqa: E731
        self.xs = {name: pad(name, x) if name in recurrence.fields else x for name, x in xs.items()}
        self.keep = None if reset is None else ~pad_time(reset, padded)
        self.shortcuts = [s for s in recurrence.shortcuts if chunk_size > s.longer_than]
        self.forms = [functools.partial(MappedChunk, self.layout, shortcut) for shortcut in (*self.shortcuts, None)]

    def _chunks_at_once(self, xs) -> int:
        if jax.default_backend() != "cpu":
            return self.layout.length
        rows = self.layout.batch * (xs[self.recurrence.output_field].shape[2] if self.recurrence.has_heads else 1)
        return CPU_BLOCK_TOKENS // (rows * self.chunk_size)

    def _time(self, x: jax.Array, block: jax.Array) -> jax.Array:
        size = self.chunks * self.chunk_size
        return x if self.blocks == 1 else lax.dynamic_slice_in_dim(x, block * size, size, axis=1)

    def _inputs(self, block: jax.Array) -> tuple[Inputs, jax.Array | None]:
        """The block's fields `[N, B, H, (n,) C, ...]` with the parameters, and its `keep [N, B, C]`."""
        part = {name: self._time(x, block) if name in self.recurrence.fields else x for name, x in self.xs.items()}
        part = self.layout.computed(part, self.scale)
        x = {name: self.layout.chunks_first(name, part[name], self.chunk_size) for name in self.recurrence.fields}
        keep = self.keep
        if keep is not None:
            keep = self._time(keep, block)
            keep = jnp.moveaxis(keep.reshape(keep.shape[0], self.chunks, self.chunk_size), 1, 0)
        return x | self.layout.parameters(part), keep

    def _cheapest(self, block: jax.Array, run: Callable):
        """`run(form)` with `form(keep)` the chunk form that takes the first shortcut that applies to the block.

        On a CPU all of `run` is decided at once, and takes the inputs itself: what crosses the border of a branch is
        written to memory first. Where all chunks are one block, only `prepare` waits for the decision, and the rest
        for nothing in it: so a shard prepares its chunks once, before it knows the state that enters it.
        """
        if len(self.forms) == 1:
            return run(self.forms[0])
        x, keep = self._inputs(block)
        if self._prepares_apart(x, keep):
            return run(self._deciding)
        return lax.switch(self._first(x), [functools.partial(run, form) for form in self.forms])

    def _first(self, x: Inputs) -> jax.Array:
        """Which of the forms is the first that applies."""
        return jnp.argmax(jnp.stack([*(shortcut.applies(x) for shortcut in self.shortcuts), jnp.ones((), bool)]))

    def _deciding(self, keep: jax.Array | None) -> MappedChunk:
        """The form in whose `prepare_all` alone the forms differ."""
        form, prepares = self.forms[-1](keep), [form(keep).prepare_all for form in self.forms]
        form.prepare_all = lambda x: lax.switch(self._first(x), prepares, x)
        return form

    def _prepares_apart(self, x: Inputs, keep: jax.Array | None) -> bool:
        if not self.at_once:
            return False
        first, *others = (jax.eval_shape(form(keep).prepare_all, x) for form in self.forms)
        return all(jax.tree.structure(o) == jax.tree.structure(first) for o in others) and all(
            jax.tree.leaves(o) == jax.tree.leaves(first) for o in others
        )

    def factors(self):
        x, keep = self._inputs(jnp.asarray(0))
        return self._deciding(keep).prepare_all(x) if self._prepares_apart(x, keep) else None

    def forward(self, state: State, factors: Any, keep_entries: bool):
        """`((final state, o), entries)`: the states `backward` asks for, of the blocks `[blocks, B, H, (n,) ...]` or of
        their chunks `[blocks, N, B, H, (n,) ...]`, or None."""
        field = self.recurrence.output_field

        def block(state, index):
            def run(form):
                x, keep = self._inputs(index)
                form = form(keep)
                prepared = form.prepare_all(x) if factors is None else factors
                new, entries, seen = self._walk(form, prepared, state)
                o = self.layout.time_back(field, form.readout_all(prepared, seen)).astype(self.dtypes[field])
                return new, o, entries if self.keeps_entries else None

            new, o, entries = self._cheapest(index, run) if factors is None else run(self.forms[-1])
            return new, (o, (entries if self.keeps_entries else state) if keep_entries else None)

        state = self.layout.group_state(state)
        state, (o, entries) = self._over_blocks(block, state)
        return (self.layout.merge_heads(state), self._joined(o)), entries

    def backward(self, entries: State, d_state: State, d_o: jax.Array):
        """The gradients of the inputs and of the initial state."""
        field = self.recurrence.output_field
        d_o = pad_time(d_o, self.blocks * self.chunks * self.chunk_size)

        def block(d_state, index_and_entries):
            index, entries_b = index_and_entries
            back = lambda name, d: self.layout.time_back(name, d).astype(self.dtypes[name])  # noqa: E731

            def run(form):
                x, keep = self._inputs(index)
                d_o_b = self._time(d_o, index).astype(self.layout.dtype)
                d_o_b = self.layout.chunks_first(field, d_o_b, self.chunk_size)
                form = form(keep)
                factors, pull_prepare = jax.vjp(form.prepare_all, x)
                pull = self._pull_apart if self.keeps_entries else self._pull_walk
                d_factors, d_before = pull(form, factors, entries_b, d_state, d_o_b)
                (d_x,) = pull_prepare(d_factors)
                if self.scale is not None:
                    d_x = {**d_x, "q": d_x["q"] * self.scale}
                fields = self.recurrence.fields
                return d_before, {name: back(name, d) if name in fields else d for name, d in d_x.items()}

            return self._cheapest(index, run)

        d_state = self.layout.group_state(d_state)
        d_state, d_xs = self._over_blocks(block, d_state, entries, reverse=True)
        gradients = {}
        for name, d in d_xs.items():
            if name in self.recurrence.fields:
                gradients[name] = self._joined(d)
            else:
                gradients[name] = d.sum(0).reshape(self.xs[name].shape).astype(self.dtypes[name])
        return gradients, self.layout.merge_heads(d_state)

    def _walk(self, form: MappedChunk, factors: Any, state: State):
        """The state carried over a block's chunks: `(final state, states that enter them, what their outputs need)`."""

        def body(state, factors_c):
            new, seen = form.advance(factors_c, state)
            return new, (state, seen)

        state, (entries, seen) = lax.scan(body, state, factors, unroll=self.unroll)
        return state, entries, entries if seen is None else seen

    def _pull_walk(self, form: MappedChunk, factors: Any, state: State, d_state: State, d_o: jax.Array):
        """The gradients of a block's factors and of the state that enters it, from that state."""
        (_, seen), pull = jax.vjp(lambda factors, state: self._walk(form, factors, state)[::2], factors, state)
        _, pull_readout = jax.vjp(form.readout_all, factors, seen)
        d_factors, d_seen = pull_readout(d_o)
        d_through, d_before = pull((d_state, d_seen))
        return jax.tree.map(jnp.add, d_factors, d_through), d_before

    def _pull_apart(self, form: MappedChunk, factors: Any, entries: State, d_state: State, d_o: jax.Array):
        """The same from the states that enter the chunks: only the adjoint state goes from chunk to chunk, what the
        factors get of it all chunks get at once. Unless they are tokens of a loop, which would run twice."""
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

        walks_tokens = self.recurrence.walks_tokens
        d_before, d_through = lax.scan(body, d_state, (factors, entries, d_entries, d_seen), reverse=True)
        if not walks_tokens:
            d_through, _ = pull_advance((d_through, d_seen))
        return jax.tree.map(jnp.add, d_factors, d_through), d_before

    def _over_blocks(self, block: Callable, carry, *rows, reverse: bool = False):
        """Scan `block(carry, index or (index, row))`; a single block needs no loop."""
        indices = jnp.arange(self.blocks)
        over = (indices, *rows) if rows else indices
        if self.blocks == 1:
            carry, out = block(carry, jax.tree.map(lambda x: x[0], over))
            return carry, jax.tree.map(lambda x: x[None], out)
        return lax.scan(block, carry, over, reverse=reverse)

    def _joined(self, x: jax.Array) -> jax.Array:
        """`[blocks, B, tokens, ...]` -> `[B, T, ...]` without the padding."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.layout.length]
