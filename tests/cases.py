"""One compiled program per recurrence, form and dtype: outputs, final state and every gradient together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import lineax_seq as ls
from lineax_seq.core import forms
from lineax_seq.core.target import target_here

CHUNK = 16
SIZES = dict(B=2, T=2 * CHUNK + 5, H=2, HV=4, K=8, V=16, D=8, N=4, L=7)


class Case:
    """Arguments, a state other tokens left, document ids, cotangents of outputs and final state, all in float64."""

    def __init__(self, operator: ls.Operator, seed: int = 0, **sizes: int):
        self.sizes = {**SIZES, **sizes}
        keys = jax.random.split(jax.random.key(seed), 4)
        with jax.enable_x64(True):
            self.args = operator.example(keys[0], dtype=jnp.float64, **self.sizes)
            out = jax.eval_shape(lambda a: operator(**a, form="scan"), self.args)
            draw = lambda key: lambda leaf: jax.random.normal(key, leaf.shape, leaf.dtype)  # noqa: E731
            before = operator.example(keys[1], dtype=jnp.float64, **{**self.sizes, "T": SIZES["T"]})
            self.state = operator(**before, form="scan")[1]
            self.d_out = jax.tree.map(draw(keys[2]), out)
        self.segment_ids = jnp.zeros((self.sizes["B"], self.sizes["T"]), jnp.int32)

    def packed(self, *starts: int) -> "Case":
        """Documents start at these tokens in the first sequence, one token later in the others."""
        ids = np.zeros(self.segment_ids.shape, np.int32)
        for start in starts:
            ids[0, start:] += 1
            ids[1:, start + 1 :] += 1
        self.segment_ids = jnp.asarray(ids)
        return self

    def rounded(self, dtype: str) -> "Case":
        """The same case with inputs and output cotangents that `dtype` holds exactly."""
        with jax.enable_x64(True):
            through = lambda x: jnp.asarray(jnp.asarray(x, dtype), "float64")  # noqa: E731
            self.args = jax.tree.map(through, self.args)
            self.d_out = through(self.d_out[0]), self.d_out[1]
        return self


@functools.cache
def _program(operator: ls.Operator, form: str, chunk_size: int):
    @jax.jit
    def run(args, state, segment_ids, d_out):
        chunk = {"chunk_size": chunk_size} if form == "chunk" else {}
        call = lambda args, state: operator(  # noqa: E731
            **args, form=form, initial_state=state, segment_ids=segment_ids, **chunk
        )
        out, pull = jax.vjp(call, args, state)
        return out, pull(d_out)

    return run


def evaluate(operator: ls.Operator, form: str, case: Case, dtype: str = "float64", chunk_size: int = CHUNK):
    """`((o, final state), (gradients of the arguments, of the initial state))` computed from inputs in `dtype`."""
    with jax.enable_x64(dtype == "float64"):
        narrow = lambda x: jnp.asarray(np.asarray(x), dtype)  # noqa: E731
        wide = lambda x: jnp.asarray(np.asarray(x), "float64" if dtype == "float64" else "float32")  # noqa: E731
        args, state = jax.tree.map(narrow, case.args), jax.tree.map(wide, case.state)
        d_out = narrow(case.d_out[0]), jax.tree.map(wide, case.d_out[1])
        return _program(operator, form, chunk_size)(args, state, case.segment_ids, d_out)


def reference(operator: ls.Operator, case: Case):
    """The float64 token scan."""
    return evaluate(operator, "scan", case)


@functools.cache
def chunked(operator: ls.Operator, chunk_size: int, derived: bool = False):
    """The bare chunk form on the record's fields, jitted; `derived` drops the family's fast form."""
    record = operator.recurrence.derived() if derived else operator.recurrence

    @jax.jit
    def run(args, state):
        scale = args["q"].shape[-1] ** -0.5 if operator.scaled else None
        return forms.chunk(record, target_here(), scale, chunk_size, operator.fields(args, None, state), None, state)

    return run
