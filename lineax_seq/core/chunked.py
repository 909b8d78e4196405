"""One call of the chunk form: blocks of chunks, the state carried over them, and the way back.

Inside a block everything that does not need the state is computed for all its chunks at once, then a walk carries the
state over them. The backward pass keeps the inputs and the states that enter the blocks, and goes over these from right
to left: it recomputes the block's factors, pulls back through its walk and through `prepare`. Where all chunks are one
block, as on accelerators, or a chunk is a loop over its tokens, it keeps the states that enter the chunks instead.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import machine_here

from .layout import Layout, MappedChunk, pad_time
from .recurrence import Shortcut
from .typing import Inputs, State

# Tokens of all sequences and heads that a block holds on a CPU, where its arrays should stay in cache. Backward with
# twice as many, the memory of a call exceeds what malloc keeps (32 MB), and touching fresh pages costs a quarter of the
# time. Accelerators take all chunks at once: they want the parallelism.
CPU_BLOCK_TOKENS: int = 1024
# And its chunks at most. They are walked without a loop: one would copy the state at every step, and fill the arrays
# that it stacks results in with zeros first. Programs grow with it.
CPU_BLOCK_CHUNKS: int = 8
# Forward alone, chunks of all sequences and heads: more of them do not make their products faster, and leave the cache.
CPU_FORWARD_CHUNKS: int = 16


class Chunked:
    """One call of the chunk form: its layout and its blocks."""

    def __init__(self, recurrence, scale, chunk_size, xs, reset, forward_alone: bool = False):
        self.recurrence, self.scale, self.chunk_size = recurrence, scale, chunk_size
        self.forward_alone = forward_alone
        self.layout = Layout(recurrence, xs)
        self.dtypes = {name: x.dtype for name, x in xs.items()}
        chunks = -(-self.layout.length // chunk_size)
        rows = self.layout.batch * (xs[recurrence.output_field].shape[2] if recurrence.has_heads else 1)
        on_cpu = machine_here().platform == "cpu"
        most = CPU_BLOCK_TOKENS // (rows * chunk_size) if on_cpu else self.layout.length
        self.at_once = most >= self.layout.length
        self.keeps_entries = self.at_once or recurrence.walks_tokens
        if not self.keeps_entries:
            most = min(most, CPU_BLOCK_CHUNKS, CPU_FORWARD_CHUNKS // rows if forward_alone else most)
        self.blocks = -(-chunks // max(1, most))
        self.chunks = -(-chunks // self.blocks)  # of a block
        self.unroll = 1 if self.keeps_entries else self.chunks
        padded = self.blocks * self.chunks * chunk_size
        pad = lambda name, x: pad_time(x, padded, recurrence.padding.get(name, 0))  # noqa: E731
        self.xs = {name: pad(name, x) if name in recurrence.fields else x for name, x in xs.items()}
        self.keep = None if reset is None else ~pad_time(reset, padded)
        self.shortcuts = [s for s in recurrence.shortcuts if chunk_size > s.longer_than]
        self.forms = [functools.partial(MappedChunk, self.layout, shortcut) for shortcut in (*self.shortcuts, None)]

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

    def _applies(self, shortcut: Shortcut) -> jax.Array:
        """Whether the shortcut applies, for each block."""
        fields = {name: x for name, x in self.layout.computed(self.xs, None).items() if name in self.recurrence.fields}
        split = lambda x: x.reshape(x.shape[0], self.blocks, self.chunks, self.chunk_size, *x.shape[2:])  # noqa: E731
        return jax.vmap(shortcut.applies, 1)(jax.tree.map(split, fields))

    def _decided(self, *known: jax.Array) -> jax.Array:
        """Which of the forms is the first that applies, for each block; `known`: whether the first ones do."""
        others = [self._applies(shortcut) for shortcut in self.shortcuts[len(known) :]]
        return jnp.argmax(jnp.stack([*known, *others, jnp.ones(self.blocks, bool)]), axis=0)

    def _deciding(self, keep: jax.Array | None) -> MappedChunk:
        """The form in whose `prepare_all` alone the forms differ."""
        form, prepares = self.forms[-1](keep), [form(keep).prepare_all for form in self.forms]
        form.prepare_all = lambda x: lax.switch(self._decided()[0], prepares, x)
        return form

    def _prepares_apart(self) -> bool:
        """Whether the forms differ in `prepare` alone: only that waits for the decision then, where all chunks are one
        block. So a shard prepares its chunks once, before it knows the state that enters it."""
        if not self.at_once:
            return False
        x, keep = self._inputs(jnp.asarray(0))
        first, *others = (jax.eval_shape(form(keep).prepare_all, x) for form in self.forms)
        return all(jax.tree.structure(o) == jax.tree.structure(first) for o in others) and all(
            jax.tree.leaves(o) == jax.tree.leaves(first) for o in others
        )

    def factors(self):
        if not self._prepares_apart():
            return None
        x, keep = self._inputs(jnp.asarray(0))
        return self._deciding(keep).prepare_all(x)

    def forward(self, state: State, factors: Any):
        """`((final state, o), entries)`: the states `backward` asks for, of the blocks `[blocks, B, H, (n,) ...]` or of
        their chunks `[blocks, N, B, H, (n,) ...]`, or None."""
        field = self.recurrence.output_field

        def block(form, state, index):
            x, keep = self._inputs(index)
            form = form(keep)
            prepared = form.prepare_all(x) if factors is None else factors
            new, entries, seen = self._walk(form, prepared, state)
            o = self.layout.time_back(field, form.readout_all(prepared, seen)).astype(self.dtypes[field])
            return new, (o, None if self.forward_alone else entries if self.keeps_entries else state)

        state = self.layout.group_state(state)
        state, (o, entries) = self._over_blocks(block, state, decided=factors is not None)
        return (self.layout.merge_heads(state), self._joined(o)), entries

    def backward(self, entries: State, d_state: State, d_o: jax.Array):
        """The gradients of the inputs and of the initial state."""
        field = self.recurrence.output_field
        d_o = pad_time(d_o, self.blocks * self.chunks * self.chunk_size)

        def block(form, d_state, index, entries):
            x, keep = self._inputs(index)
            d_o_b = self._time(d_o, index).astype(self.layout.dtype)
            d_o_b = self.layout.chunks_first(field, d_o_b, self.chunk_size)
            form = form(keep)
            factors, pull_prepare = jax.vjp(form.prepare_all, x)
            pull = self._pull_apart if self.keeps_entries else self._pull_walk
            d_factors, d_before = pull(form, factors, entries, d_state, d_o_b)
            (d_x,) = pull_prepare(d_factors)
            if self.scale is not None:
                d_x = {**d_x, "q": d_x["q"] * self.scale}
            back = lambda name, d: self.layout.time_back(name, d).astype(self.dtypes[name])  # noqa: E731
            fields = self.recurrence.fields
            return d_before, {name: back(name, d) if name in fields else d for name, d in d_x.items()}

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

    def _over_blocks(self, block: Callable, carry, *rows, reverse: bool = False, decided: bool = False):
        """Scan `block(form, carry, index, *rows)`, with the cheapest form that applies to each block.

        If the first form applies to all blocks, a loop that decides nothing walks them: what crosses the border of a
        branch is written to memory first. `decided`: the form does not matter.
        """

        def loop(carry, block):
            return self._loop(block, carry, rows, reverse)

        def choosing(carry):
            decisions = self._decided(first)
            return loop(carry, lambda carry, index, *row: lax.switch(decisions[index], blocks, carry, index, *row))

        blocks = [functools.partial(block, form) for form in self.forms]
        if decided or len(blocks) == 1:
            return loop(carry, blocks[-1])
        if self._prepares_apart():
            return loop(carry, functools.partial(block, self._deciding))
        first = self._applies(self.shortcuts[0])
        if self.blocks == 1:
            return choosing(carry)
        return lax.cond(first.all(), functools.partial(loop, block=blocks[0]), choosing, carry)

    def _loop(self, block: Callable, carry, rows, reverse: bool):
        """A single block needs no loop."""
        over = (jnp.arange(self.blocks), *rows)
        if self.blocks == 1:
            carry, out = block(carry, *jax.tree.map(lambda x: x[0], over))
            return carry, jax.tree.map(lambda x: x[None], out)
        return lax.scan(lambda carry, over: block(carry, *over), carry, over, reverse=reverse)

    def _joined(self, x: jax.Array) -> jax.Array:
        """`[blocks, B, tokens, ...]` -> `[B, T, ...]` without the padding."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.layout.length]
