"""A family as a record's chunk form: what is refused, block sizes, the layouts that its kernels want, a custom VJP."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import block_sizes
from .._platform import device_kind, require_tpu
from ..block_sizes import BlockSizes
from ._family import Call, Family, run_backward, run_forward
from ._heads import heads_back, laid_out
from ._partition import over_mesh

WIDTHS = (64, 128, 256)
DTYPES = ("bfloat16", "float32")


def chunk_form(
    family: Family,
    scale: float | None,
    chunk_size: int | None,
    fields: dict,
    reset: jax.Array | None,
    state: jax.Array,
    blocks: BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`(final state [B, HV, K, V] float32, o [B, T, HV, V] in v's dtype)`, with a gradient.

    Args:
        scale: of the queries; None is 1.
        chunk_size: C, 64 or 128; None is the tuned one. Any that holds all T tokens is one chunk, as is 64 then.
        fields: as the family's, `[B, T, heads, ...]`, bfloat16 or float32. Matrix units read v's dtype and add up in
            float32, so with a bfloat16 v the other fields are rounded to it inside products.
        reset: None, or bool [B, T], where a document starts.
        state: [B, HV, K, V] float32.
        blocks: None, or the block sizes to take.

    Raises:
        NotImplementedError: not on a TPU, or shapes and dtypes that the kernel does not support.
        ValueError: block sizes that do not fit the shapes.
    """
    require_tpu()
    sizes = _sizes(family, fields)
    if chunk_size is not None and sizes["T"] <= chunk_size < min(block_sizes.CHUNKS):
        chunk_size = min(block_sizes.CHUNKS)
    _refuse(family, fields, sizes, chunk_size)
    chosen = _blocks(family, device_kind(), sizes, str(fields["v"].dtype), chunk_size)
    if blocks is not None:
        choices = block_sizes.head_choices(sizes["H"], sizes["HV"])
        if blocks.heads not in choices or chunk_size not in (None, blocks.chunk):
            raise ValueError(
                f"{family.name}: {blocks} for {sizes['H']} key heads, {sizes['HV']} value heads and "
                f"chunk_size={chunk_size}; heads wants one of {choices}, chunk the chunk_size."
            )
        chosen = blocks
    plan = Plan(family, 1.0 if scale is None else float(scale), chosen, device_kind())
    o, final = _chunked(plan, fields, reset, state)
    return final, o


def _sizes(family: Family, fields: dict) -> dict[str, int]:
    sizes = {}
    for name, kind in family.fields.items():
        sizes |= dict(zip(("B", "T", *kind.split()), fields[name].shape, strict=True))
    return sizes


def require_dtypes(record: str, fields: dict) -> None:
    """Before a wrapper computes in float32.

    Raises:
        NotImplementedError: a field's dtype is none of `DTYPES`.
    """
    dtypes = {name: str(x.dtype) for name, x in fields.items()}
    wrong = [f"{name} is {dtype}, wants one of {DTYPES}" for name, dtype in dtypes.items() if dtype not in DTYPES]
    if wrong:
        raise NotImplementedError(f"mosaic_tpu: the kernel of {record} cannot: {'; '.join(wrong)}")


def _refuse(family: Family, fields: dict, sizes: dict, chunk_size: int | None) -> None:
    require_dtypes(family.name, {name: fields[name] for name in family.fields})
    reasons = [f"{letter}={sizes[letter]}, wants one of {WIDTHS}" for letter in "KV" if sizes[letter] not in WIDTHS]
    if chunk_size not in (None, *block_sizes.CHUNKS):
        reasons.append(f"chunk_size={chunk_size}, wants None or one of {block_sizes.CHUNKS}")
    if reasons:
        raise NotImplementedError(f"mosaic_tpu: the kernel of {family.name} cannot: {'; '.join(reasons)}")


def _blocks(family: Family, device: str, sizes: dict, dtype: str, chunk: int | None) -> BlockSizes:
    facts = {"K": sizes["K"], "V": sizes["V"], "dtype": dtype}
    return block_sizes.choose(family.name, device, sizes["H"], sizes["HV"], chunk, **facts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a call, on one device or on many."""

    family: Family
    scale: float
    blocks: BlockSizes
    device: str

    def call(self, fields: dict, reset: jax.Array | None) -> Call:
        """For these arrays, which may be one device's part of the whole."""
        sizes, blocks = _sizes(self.family, fields), self.blocks
        if blocks.heads not in block_sizes.head_choices(sizes["H"], sizes["HV"]):
            blocks = _blocks(self.family, self.device, sizes, str(fields["v"].dtype), blocks.chunk)
        chunks = -(-sizes["T"] // blocks.chunk)
        return Call(
            self.family,
            self.scale,
            blocks,
            tuple({**sizes, "C": blocks.chunk, "N": chunks}.items()),
            tuple((name, jnp.dtype(fields[name].dtype)) for name in self.family.rows),
            jnp.dtype(fields["v"].dtype),
            reset is not None,
        )

    def over_mesh(self, run: Callable, fields: dict, reset, more: list[tuple[str, Any]], results: list[str]) -> tuple:
        """`run(fields, reset, *more)`, partitioned; `more`: the others' dimensions and arrays."""
        kinds = {name: f"B T {kind}" for name, kind in self.family.fields.items()}
        operands = [*kinds.values(), *([] if reset is None else ["B T"]), *(dims for dims, _ in more)]
        arrays = [*(fields[name] for name in kinds), *([] if reset is None else [reset]), *(x for _, x in more)]

        def local(*arrays):
            own = dict(zip(kinds, arrays, strict=False))
            rest = arrays[len(kinds) :]
            return run(own, *((None, *rest) if reset is None else rest))

        return over_mesh(local, operands, results, _sizes(self.family, fields), arrays)

    @property
    def saves(self) -> list[str]:
        return ["B N HV V K", *(f"B N HV {letters}" for letters in self.family.saves)]

    # ---- one device's part

    def forward(self, keep: bool, fields: dict, reset, state) -> tuple:
        """`(o, final state, *saved)`."""
        call = self.call(fields, reset)
        xs, count = self._laid_out(call, fields, reset)
        o, final, saved = run_forward(call, keep, xs, count, jnp.swapaxes(state, 2, 3))
        return heads_back(o, call["HV"], call["V"]), jnp.swapaxes(final, 2, 3), *saved

    def backward(self, fields: dict, reset, d_o, d_final, *saved) -> tuple:
        """`(gradients of the fields in order, of the initial state)`."""
        call, family = self.call(fields, reset), self.family
        xs, count = self._laid_out(call, fields, reset)
        d_xs, d_state = run_backward(call, xs, count, saved, laid_out(d_o), jnp.swapaxes(d_final, 2, 3))
        grads = []
        for name in family.fields:
            x = fields[name]
            if name in family.rows:
                d = heads_back(d_xs[name], *x.shape[2:])
            else:
                d = _tokens(d_xs[name], x.shape[1])
                if name in family.floor:
                    d = jnp.where(x > family.floor[name], d, 0)
            grads.append(d.astype(x.dtype))
        return *grads, jnp.swapaxes(d_state, 2, 3)

    def _laid_out(self, call: Call, fields: dict, reset) -> tuple[dict, jax.Array | None]:
        xs = {}
        for name, x in fields.items():
            if name in self.family.rows:
                xs[name] = laid_out(x)
                continue
            x = x.astype(jnp.float32)
            xs[name] = _chunk_rows(jnp.maximum(x, self.family.floor[name]) if name in self.family.floor else x, call)
        return xs, None if reset is None else _chunk_rows(reset[:, :, None].astype(jnp.float32), call).cumsum(-1)


def _chunk_rows(x: jax.Array, call: Call) -> jax.Array:
    """`[B, T, HV]` -> `[B, N, HV, C]`, zero after the end."""
    batch, length, heads = x.shape
    x = jnp.pad(x, ((0, 0), (0, call["N"] * call["C"] - length), (0, 0)))
    return jnp.swapaxes(x.reshape(batch, call["N"], call["C"], heads), 2, 3)


def _tokens(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunk_rows`."""
    x = jnp.swapaxes(x, 2, 3)
    return x.reshape(x.shape[0], -1, x.shape[3])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(plan: Plan, fields: dict, reset, state):
    run = functools.partial(plan.forward, False)
    return plan.over_mesh(run, fields, reset, [("B HV K V", state)], ["B T HV V", "B HV K V"])


def _chunked_forward(plan: Plan, fields: dict, reset, state):
    run, results = functools.partial(plan.forward, True), ["B T HV V", "B HV K V", *plan.saves]
    o, final, *saved = plan.over_mesh(run, fields, reset, [("B HV K V", state)], results)
    return (o, final), (fields, reset, saved)


def _chunked_backward(plan: Plan, residuals, cotangents):
    fields, reset, saved = residuals
    d_o, d_final = cotangents
    more = [("B T HV V", d_o), ("B HV K V", d_final), *zip(plan.saves, saved, strict=True)]
    results = [*(f"B T {kind}" for kind in plan.family.fields.values()), "B HV K V"]
    *grads, d_state = plan.over_mesh(plan.backward, fields, reset, more, results)
    return dict(zip(plan.family.fields, grads, strict=True)), None, d_state


_chunked.defvjp(_chunked_forward, _chunked_backward)
