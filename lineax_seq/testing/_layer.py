"""The laws of a mixing layer: the whole sequence, prefill in pieces and single steps are one function.

A layer maps `x [B, T, D]` to `[B, T, D]` by `layer(x, segment_ids=)`, and one piece or one token at a time by
`layer.init_cache(batch, max_length)`, `layer.prefill(x, cache, lengths=)` and `layer.step(x_t, cache)`.
"""

from collections.abc import Collection
from typing import Any, Protocol

import chex
import jax
import numpy as np
from flax import nnx

from ._closeness import OUTPUTS, assert_close
from ._report import Law, run

BATCH, LENGTH, PIECE = 2, 12, 5
F32 = OUTPUTS["float32"]


class MixingLayer(Protocol):
    """What the laws use of a layer, which is a Flax NNX module."""

    def __call__(self, x: jax.Array, *, segment_ids: Any = None) -> jax.Array: ...

    def init_cache(self, batch: int, max_length: int) -> Any: ...

    def prefill(self, x: jax.Array, cache: Any, *, lengths: Any = None) -> tuple[jax.Array, Any]: ...

    def step(self, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]: ...


def check_layer(layer: MixingLayer, d_model: int, laws: Collection[str] | None = None) -> None:
    """The layer is right in all its uses: whole sequences, packed documents, prefill, padding, steps, gradients.

    Args:
        layer: a causal layer that computes in float32. Draw its weights large enough that what it reads of the past
            shows in its outputs: a layer that says almost nothing obeys almost every law.
        d_model: D, the width of its inputs.
        laws: the names of those to check, of `layer_laws(layer, d_model)`; None is all of them.

    Raises:
        AssertionError: the broken laws, each with what was got and wanted and how to see it again.
        ValueError: an unknown law.
    """
    run("check_layer", type(layer).__name__, layer_laws(layer, d_model), laws)


def layer_laws(layer: MixingLayer, d_model: int) -> dict[str, Law]:
    """The laws of a layer by name. Each raises an AssertionError where it is broken."""
    case = _Case(layer, d_model)
    return {
        "causality": case.causality,
        "packed = separate": case.packed,
        "prefill in pieces = whole": case.pieces,
        "steps = whole": case.steps,
        "right-padded = alone": case.padded,
        "the cache keeps its form": case.cache_form,
        "gradients are finite": case.gradients,
    }


class _Case:
    """One layer, its inputs, and each of its uses jitted once."""

    def __init__(self, layer: MixingLayer, d_model: int):
        graph, self.params, rest = nnx.split(layer, nnx.Param, ...)
        merge = lambda params: nnx.merge(graph, params, rest)  # noqa: E731
        # numpy: cutting out pieces compiles nothing
        self.x = np.asarray(jax.random.normal(jax.random.key(1), (BATCH, LENGTH, d_model)))
        self.layer = layer
        self._whole = jax.jit(lambda params, x, ids: merge(params)(x, segment_ids=ids))
        self._prefill = jax.jit(lambda params, x, cache, lengths: merge(params).prefill(x, cache, lengths=lengths))
        self._step = jax.jit(lambda params, x, cache: merge(params).step(x, cache))

    def whole(self, x, segment_ids=None) -> np.ndarray:
        return np.asarray(self._whole(self.params, x, segment_ids))

    def prefill(self, x, cache, lengths=None) -> tuple[np.ndarray, Any]:
        y, cache = self._prefill(self.params, x, cache, lengths)
        return np.asarray(y), cache

    def step(self, x, cache) -> tuple[np.ndarray, Any]:
        y, cache = self._step(self.params, x, cache)
        return np.asarray(y), cache

    def empty(self) -> Any:
        return self.layer.init_cache(BATCH, LENGTH)

    def causality(self) -> None:
        """Other tokens in the future change nothing in the past, and do change the present."""
        y, changed = self.whole(self.x), self.whole(self.x + (np.arange(LENGTH) >= 7).astype(self.x.dtype)[:, None])
        assert y.dtype == self.x.dtype, f"y is {y.dtype} for {self.x.dtype} inputs"
        assert_close(changed[:, :7], y[:, :7], F32, "outputs before the tokens that changed")
        assert np.any(np.abs(changed[:, 7:] - y[:, 7:]) > 1e-3), "tokens changed, and their own outputs did not"

    def packed(self) -> None:
        """A document sees nothing of those before it, also where an id comes a second time."""
        ids = np.array([[5] * 4 + [2] * 2 + [5] * 6, [0] * 11 + [1]])
        packed = self.whole(self.x, ids)
        for row, borders in ((0, (0, 4, 6, 12)), (1, (0, 11, 12))):
            for start, end in zip(borders, borders[1:], strict=False):
                alone = self.whole(np.roll(self.x, -start, 1))  # the document first, whatever follows
                what = f"row {row}, the document of tokens {start} to {end - 1}"
                assert_close(packed[row, start:end], alone[row, : end - start], F32, what)

    def pieces(self) -> None:
        """Rows of different lengths, a second piece over what the first left, of no tokens for one row, and a step."""
        lengths, more, y = np.array([2, 5]), np.array([4, 0]), self.whole(self.x)
        cache = self.empty()
        first, cache = self.prefill(self.x[:, :PIECE], cache, lengths)
        following = np.stack([self.x[b, n : n + PIECE] for b, n in enumerate(lengths)])
        second, cache = self.prefill(following, cache, more)
        rows = np.arange(BATCH)
        after, _ = self.step(self.x[rows, lengths + more], cache)
        for b, n in enumerate(lengths):
            assert_close(first[b, :n], y[b, :n], F32, f"row {b}, the first piece of {n} tokens")
        assert_close(second[0, :4], y[0, 2:6], F32, "row 0, the second piece of 4 tokens")
        assert_close(after, y[rows, lengths + more], F32, "the token after both pieces")

    def steps(self) -> None:
        """From an empty cache, token by token."""
        y, cache = self.whole(self.x), self.empty()
        for t in range(LENGTH):
            y_t, cache = self.step(self.x[:, t], cache)
            assert_close(y_t, y[:, t], F32, f"token {t}")

    def padded(self) -> None:
        """What stands in the padding on the right changes neither the real tokens nor what follows them."""
        lengths, y = np.array([2, 4]), self.whole(self.x)
        real = (np.arange(PIECE) < lengths[:, None])[:, :, None]
        got, cache = self.prefill(np.where(real, self.x[:, :PIECE], np.float32(9)), self.empty(), lengths)
        rows = np.arange(BATCH)
        following, _ = self.step(self.x[rows, lengths], cache)
        for b, n in enumerate(lengths):
            assert_close(got[b, :n], y[b, :n], F32, f"row {b}, its {n} real tokens")
        assert_close(following, y[rows, lengths], F32, "the token after the padded ones")

    def cache_form(self) -> None:
        """A cache goes out as it came in, so that no step is compiled a second time."""
        cache = self.empty()
        _, filled = jax.eval_shape(self._prefill, self.params, self.x[:, :PIECE], cache, None)
        chex.assert_trees_all_equal_shapes_and_dtypes(cache, filled)
        _, stepped = jax.eval_shape(self._step, self.params, self.x[:, 0], cache)
        chex.assert_trees_all_equal_shapes_and_dtypes(cache, stepped)

    def gradients(self) -> None:
        """Of all parameters and of the inputs: finite, and those of the inputs not zero."""
        weights = jax.random.normal(jax.random.key(2), self.x.shape)
        loss = lambda params, x: (self._whole(params, x, None) * weights).sum()  # noqa: E731
        d_params, d_x = jax.jit(jax.grad(loss, (0, 1)))(self.params, self.x)
        by_name = {jax.tree_util.keystr(path): d for path, d in jax.tree_util.tree_leaves_with_path(d_params)}
        chex.assert_tree_all_finite({**by_name, "x": d_x})
        assert np.any(d_x), "the gradient of the inputs is zero"
