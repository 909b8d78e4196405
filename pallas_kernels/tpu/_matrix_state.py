"""The chunk form of a family whose state is a matrix per head: refusals, block sizes, layouts, the two passes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._shared.kernel import Kernel, dtype_reasons, sizes_of
from .._shared.machine import Machine
from .._shared.passes import Arrays, Dimensions, differentiable
from . import _block_sizes, _matrix_kernels
from ._block_sizes import BlockSizes
from ._family import Family
from ._heads import heads_back, laid_out
from ._tiling import Tiling

WIDTHS = (64, 128, 256)


def refuses(machine: Machine, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> list[str]:
    """Reasons against a call of a matrix-state kernel, or of one that is built on another."""
    reasons = dtype_reasons(dtypes)
    reasons += [f"{letter}={sizes[letter]}, wants one of {WIDTHS}" for letter in "KV" if sizes[letter] not in WIDTHS]
    chunk = _chunk(sizes)
    if chunk is not None and chunk not in _block_sizes.CHUNKS:
        reasons.append(f"chunk_size={chunk}, wants None or one of {_block_sizes.CHUNKS}")
    return reasons


def _chunk(sizes: Mapping[str, int]) -> int | None:
    """The chunk size that a call asks for: any that holds all tokens is one chunk, as the least one is then."""
    least = min(_block_sizes.CHUNKS)
    asked = sizes.get("C")
    return least if asked is not None and sizes["T"] <= asked < least else asked


def chunk_kernel(family: Family) -> Kernel:
    """The chunk form of the family's record."""
    return Kernel(
        family.name,
        "tpu",
        "chunk",
        family.fields,
        functools.partial(chunk_form, family),
        refuses,
        block_sizes=_block_sizes.choices,
    )


def chunk_form(
    family: Family,
    machine: Machine,
    scale: float | None,
    chunk_size: int | None,
    fields: dict,
    reset: jax.Array | None,
    state: jax.Array,
    block_sizes: BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`(final state [B, HV, K, V] float32, o [B, T, HV, V] in v's dtype)`, with a gradient.

    Args:
        scale: of the queries; None is 1.
        chunk_size: C, as `refuses` lets it pass; None is the tuned one.
        fields: as the family's, `[B, T, heads, ...]`, bfloat16 or float32. Matrix units read v's dtype and add up in
            float32, so with a bfloat16 v the other fields are rounded to it inside products.
        reset: None, or bool [B, T], where a document starts.
        state: [B, HV, K, V] float32.
        block_sizes: None is the tuned ones.

    Raises:
        ValueError: block sizes that do not fit the shapes.
    """
    if reset is not None:
        fields = family.at_starts(fields, reset)
    sizes = sizes_of(family.fields, fields)
    chunk = _chunk(sizes if chunk_size is None else {**sizes, "C": chunk_size})
    if block_sizes is None:
        block_sizes = _chosen(family, machine, sizes, str(fields["v"].dtype), chunk)
    allowed = _block_sizes.head_choices(sizes["H"], sizes["HV"])
    if block_sizes.heads not in allowed or chunk not in (None, block_sizes.chunk):
        raise ValueError(
            f"{family.name}: {block_sizes} for {sizes['H']} key heads, {sizes['HV']} value heads and "
            f"chunk_size={chunk_size}; heads wants one of {allowed}, chunk the chunk_size."
        )
    heads = sizes["H"], sizes["HV"]
    passes = MatrixPasses(
        family, 1.0 if scale is None else float(scale), block_sizes, machine, heads, reset is not None
    )
    arrays = {**{name: fields[name] for name in family.fields}, "initial_state": state}
    results = differentiable(passes, arrays if reset is None else {**arrays, "reset": reset})
    return results["final_state"], results["o"]


def _chosen(family: Family, machine: Machine, sizes: Mapping[str, int], dtype: str, chunk: int | None) -> BlockSizes:
    facts = {"K": sizes["K"], "V": sizes["V"], "dtype": dtype}
    return _block_sizes.choose(family.name, machine.device_kind, sizes["H"], sizes["HV"], chunk, **facts)


@dataclasses.dataclass(frozen=True)
class MatrixPasses:
    """The two passes of a family, as `_shared.passes` wants them: on one device, or on each of many."""

    family: Family
    scale: float
    block_sizes: BlockSizes
    machine: Machine
    heads: tuple[int, int]
    resets: bool

    @property
    def inputs(self) -> Dimensions:
        fields = {name: f"B T {kind}" for name, kind in self.family.fields.items()}
        return fields | ({"reset": "B T"} if self.resets else {}) | {"initial_state": "B HV K V"}

    @property
    def outputs(self) -> Dimensions:
        return {"o": "B T HV V", "final_state": "B HV K V"}

    @property
    def kept(self) -> tuple[str, ...]:
        return *self.family.fields, *(["reset"] if self.resets else [])

    @property
    def saved(self) -> Dimensions:
        return {f"saved_{name}": f"B N HV {letters}" for name, letters in self.family.saved.items()}

    def forward(self, arrays: Arrays, keep: bool) -> Arrays:
        tiling, (xs, count) = self._tiling(arrays), self._laid_out(arrays)
        results = _matrix_kernels.forward(tiling, keep, xs, count, jnp.swapaxes(arrays["initial_state"], 2, 3))
        o, final = heads_back(results["o"], tiling["HV"], tiling["V"]), jnp.swapaxes(results["final_state"], 2, 3)
        return results | {"o": o, "final_state": final}

    def backward(self, arrays: Arrays) -> Arrays:
        tiling, (xs, count) = self._tiling(arrays), self._laid_out(arrays)
        saved = {name: arrays[f"saved_{name}"] for name in self.family.saved}
        d_o, d_final = laid_out(arrays["d_o"]), jnp.swapaxes(arrays["d_final_state"], 2, 3)
        results = _matrix_kernels.backward(tiling, xs, count, saved, d_o, d_final)
        grads = {"d_initial_state": jnp.swapaxes(results["d_initial_state"], 2, 3)}
        for name in self.family.fields:
            x, d, floor = arrays[name], results[f"d_{name}"], self.family.floor.get(name)
            d = heads_back(d, *x.shape[2:]) if name in self.family.rows else _tokens(d, x.shape[1])
            grads[f"d_{name}"] = (d if floor is None else jnp.where(x > floor, d, 0)).astype(x.dtype)
        return grads

    def _tiling(self, arrays: Arrays) -> Tiling:
        """For these arrays, which may be one device's part of the whole."""
        family, block_sizes = self.family, self.block_sizes
        sizes, dtype = sizes_of(family.fields, arrays), arrays["v"].dtype
        if block_sizes.heads not in _block_sizes.head_choices(sizes["H"], sizes["HV"]):
            block_sizes = _chosen(family, self.machine, sizes, str(dtype), block_sizes.chunk)
        chunks = -(-sizes["T"] // block_sizes.chunk)
        return Tiling(
            family,
            self.scale,
            block_sizes,
            tuple({**sizes, "C": block_sizes.chunk, "N": chunks}.items()),
            tuple((name, jnp.dtype(arrays[name].dtype)) for name in family.rows),
            jnp.dtype(dtype),
            self.resets,
            self.machine.interpret,
        )

    def _laid_out(self, arrays: Arrays) -> tuple[dict[str, jax.Array], jax.Array | None]:
        """The fields, and how many documents have started, as the kernels want them."""
        xs: dict[str, Any] = {}
        for name in self.family.fields:
            x, floor = arrays[name], self.family.floor.get(name)
            if name in self.family.rows:
                xs[name] = laid_out(x)
                continue
            x = x.astype(jnp.float32)
            xs[name] = _chunk_rows(x if floor is None else jnp.maximum(x, floor), self.block_sizes.chunk)
        if not self.resets:
            return xs, None
        starts = arrays["reset"][:, :, None].astype(jnp.float32)
        return xs, _chunk_rows(starts, self.block_sizes.chunk).cumsum(-1)


def _chunk_rows(x: jax.Array, chunk: int) -> jax.Array:
    """`[B, T, HV]` -> `[B, N, HV, C]`, zero after the end."""
    batch, length, heads = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0)))
    return jnp.swapaxes(x.reshape(batch, -1, chunk, heads), 2, 3)


def _tokens(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunk_rows`."""
    x = jnp.swapaxes(x, 2, 3)
    return x.reshape(x.shape[0], -1, x.shape[3])[:, :length]
