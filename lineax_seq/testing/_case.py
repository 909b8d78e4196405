"""What laws are tested on: one recurrence's inputs, and one program that gives outputs, states and all gradients."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..core.operator import Operator
from ._closeness import GRADIENTS, OUTPUTS, assert_close

CHUNK = 16
SIZES = dict(B=2, T=2 * CHUNK + 5, H=2, HV=4, K=8, V=16, D=8, N=4, L=7)  # HV > H: grouped heads; T no multiple of C


@functools.lru_cache(16)
def _drawn(operator: Operator, seed: int, sizes: tuple[tuple[str, int], ...]):
    """Arguments, state and cotangents, as numpy arrays: cutting out pieces of them compiles nothing."""
    keys = jax.random.split(jax.random.key(seed), 4)
    with jax.enable_x64(True):
        args = operator.example(keys[0], dtype=jnp.float64, **dict(sizes))
        out = jax.eval_shape(lambda a: operator(**a, form="scan"), args)
        draw = lambda key: lambda leaf: jax.random.normal(key, leaf.shape, leaf.dtype)  # noqa: E731
        before = operator.example(keys[1], dtype=jnp.float64, **{**dict(sizes), "T": SIZES["T"]})
        return jax.tree.map(np.asarray, (args, operator(**before, form="scan")[1], jax.tree.map(draw(keys[2]), out)))


class Case:
    """Arguments, a state that other tokens left, document ids, cotangents of outputs and final state, all in float64.

    Everything follows from the seed and the sizes, so that a failure can be seen again.
    """

    def __init__(self, operator: Operator, seed: int = 0, **sizes: int):
        self.operator, self.sizes = operator, {**SIZES, **sizes}
        args, self.state, self.d_out = _drawn(operator, seed, tuple(sorted(self.sizes.items())))
        self.args = dict(args)
        self.segment_ids: jax.Array | None = None

    def packed(self, *starts: int) -> "Case":
        """Documents start at these tokens in the first sequence, one token later in the others."""
        ids = np.zeros((self.sizes["B"], self.sizes["T"]), np.int32)
        for start in starts:
            ids[0, start:] += 1
            ids[1:, start + 1 :] += 1
        self.segment_ids = jnp.asarray(ids)
        return self

    def rounded(self, dtype: str) -> "Case":
        """The same case with inputs and output cotangents that `dtype` holds exactly."""
        through = lambda x: np.asarray(x).astype(jnp.dtype(dtype)).astype("float64")  # noqa: E731
        self.args = jax.tree.map(through, self.args)
        self.d_out = through(self.d_out[0]), self.d_out[1]
        return self

    def first(self, length: int) -> "Case":
        """The same case cut after its first `length` tokens."""
        return self._each_token_array(lambda x: x[:, :length])

    def silent_after(self, length: int) -> "Case":
        """The same case with zeros for all tokens but the first `length`."""

        def silence(x):
            heard = np.arange(x.shape[1]).reshape(1, -1, *(1,) * (x.ndim - 2)) < length
            return np.where(heard, x, 0)

        return self._each_token_array(silence)

    def _each_token_array(self, change: Callable) -> "Case":
        per_token = {name for name, argument in self.operator.arguments.items() if argument.per_token}
        self.args = {name: change(np.asarray(x)) if name in per_token else x for name, x in self.args.items()}
        self.d_out = change(np.asarray(self.d_out[0])), self.d_out[1]
        return self


@functools.lru_cache(256)
def _program(operator: Operator, form: str, chunk_size: int | None, implementation: str | None):
    options: dict = {"form": form} if form == "scan" else {"chunk_size": chunk_size, "implementation": implementation}

    @jax.jit
    def run(args, state, segment_ids, d_out):
        call = lambda args, state: operator(  # noqa: E731
            **args, initial_state=state, segment_ids=segment_ids, **options
        )
        out, pull = jax.vjp(call, args, state)
        return out, pull(jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), d_out, out))

    return run


def evaluate(
    operator: Operator,
    form: str,
    case: Case,
    dtype: str = "float64",
    chunk_size: int | None = CHUNK,
    implementation: str | None = None,
):
    """`((o, final state), (gradients of the arguments, of the initial state))` as numpy arrays.

    The inputs are in `dtype`, states in float32 or, for float64 inputs, in float64.
    """
    with jax.enable_x64(dtype == "float64"):
        narrow = lambda x: jnp.asarray(np.asarray(x), dtype)  # noqa: E731
        wide = lambda x: jnp.asarray(np.asarray(x), "float64" if dtype == "float64" else "float32")  # noqa: E731
        args, state = jax.tree.map(narrow, case.args), jax.tree.map(wide, case.state)
        d_out = narrow(case.d_out[0]), jax.tree.map(wide, case.d_out[1])
        results = _program(operator, form, chunk_size, implementation)(args, state, case.segment_ids, d_out)
        return jax.tree.map(np.asarray, results)


def reference(operator: Operator, case: Case):
    """The float64 token scan."""
    return evaluate(operator, "scan", case)


def assert_same(got, want, dtype: str) -> None:
    """Two results of `evaluate`, within the tolerances of `dtype`: outputs, final state and all gradients."""
    (out, (d_args, d_state)), (wanted, (wanted_d_args, wanted_d_state)) = got, want
    name = lambda out, d_args, d_state: (  # noqa: E731
        {"o": out[0], "final_state": out[1]},
        {**{f"d {name}": d for name, d in d_args.items()}, "d initial_state": d_state},
    )
    got, want = name(out, d_args, d_state), name(wanted, wanted_d_args, wanted_d_state)
    assert_close(got[0], want[0], OUTPUTS[dtype], dtype)
    assert_close(got[1], want[1], GRADIENTS[dtype], dtype)
