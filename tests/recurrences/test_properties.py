"""Properties of every recurrence on drawn values: gates mild and closed, documents, states, pieces, transformations.

A search looks for an `Example` that breaks a property and shrinks it. It prints as it is written here: paste it into
`FOUND`, so that it is tried from then on. The quick search draws values for the shapes that other tests compile;
the slow one draws more of them, and shapes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CHUNK, SIZES, Case, evaluate, reference
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls
from lineax_seq.core.arguments import log_decay, rate, unit, wide_rate

MEMBERS = 2  # that a transformed program maps over


@dataclasses.dataclass(frozen=True)
class Example:
    """Values for one call of an operator; what is left out is as the operator draws it.

    Attributes:
        decays: what log-decays are multiplied by.
        closed: how far the gates that close do so, and `share`, how many of them there are.
        rates: what the delta rules' rates are set to.
        identical_keys: every key of a delta rule is the first one.
        zero_state: the state that enters is zero, not what other tokens left.
        documents: the tokens that a document starts at, in the first sequence.
        sizes: lengths other than those of `cases.SIZES`, by letter.
    """

    operator: str
    dtype: str = "float32"
    seed: int = 0
    decays: float = 1.0
    closed: float = -1e4
    share: float = 0.0
    rates: float | None = None
    identical_keys: bool = False
    zero_state: bool = False
    documents: tuple[int, ...] = ()
    chunk_size: int = CHUNK
    sizes: tuple[tuple[str, int], ...] = ()

    def case(self) -> Case:
        operator = ls.RECURRENCES[self.operator]
        case = Case(operator, self.seed, **dict(self.sizes)).packed(*self.documents)
        closing = np.random.default_rng(self.seed)
        for name, argument in operator.arguments.items():
            x = np.array(case.args[name])
            if argument.draw is log_decay:
                x = np.where(closing.random(x.shape) < self.share, self.closed, x * self.decays)
            elif name in ("A", "slopes"):  # decays that all tokens share
                x = x * self.decays
            elif argument.draw in (rate, wide_rate) and self.rates is not None:
                x = np.full_like(x, self.rates)
            elif argument.draw is unit and self.identical_keys:
                x = np.broadcast_to(x[:, :1], x.shape)
            case.args[name] = x
        if self.zero_state:
            case.state = jax.tree.map(np.zeros_like, case.state)
        return case.rounded(self.dtype)


def _compare(got, want, dtype: str) -> None:
    """Outputs and gradients within the tolerances; below the normal numbers of float32 there is nothing to compare."""
    if dtype != "float64":
        smallest = np.finfo(np.float32).tiny
        got, want = jax.tree.map(
            lambda x: np.where(np.abs(y := np.asarray(x, np.float64)) < smallest, 0, y), (got, want)
        )
    assert_close(got[0], want[0], OUTPUTS[dtype], "outputs")
    assert_close(got[1], want[1], GRADIENTS[dtype], "gradients")


def check_chunk(example: Example) -> None:
    """Chunk form against the float64 token scan: outputs, final state and every gradient."""
    operator, case = ls.RECURRENCES[example.operator], example.case()
    got = evaluate(operator, "chunk", case, example.dtype, chunk_size=example.chunk_size)
    _compare(got, reference(operator, case), example.dtype)


@functools.cache
def _transformed(operator: ls.Operator, chunk_size: int, cut: int):
    """`jit(vmap(vjp(checkpoint(two pieces, the state handed on))))`."""

    @jax.checkpoint
    def in_pieces(args, state, segment_ids):
        outputs = []
        for part in (slice(None, cut), slice(cut, None)):
            tokens = {name: x[:, part] if operator.arguments[name].per_token else x for name, x in args.items()}
            ids = segment_ids[:, part]
            o, state = operator(**tokens, initial_state=state, segment_ids=ids, chunk_size=chunk_size)
            outputs.append(o)
        return jnp.concatenate(outputs, 1), state

    @jax.jit
    @jax.vmap
    def run(args, state, segment_ids, d_out):
        out, pull = jax.vjp(lambda args, state: in_pieces(args, state, segment_ids), args, state)
        return out, pull(d_out)

    return run


def _stacked(*leaves) -> np.ndarray:
    x = np.stack([np.asarray(leaf) for leaf in leaves])
    return x if x.dtype == np.int32 else x.astype(np.float32)


def check_transformed(example: Example, cut: int = CHUNK + 3) -> None:
    """The same in two pieces and under every transformation at once, in float32; each member as if it were alone."""
    operator = ls.RECURRENCES[example.operator]
    kept = tuple(start for start in example.documents if cut not in (start, start + 1))  # a call's first token is none
    examples = [dataclasses.replace(example, seed=example.seed + i, documents=kept) for i in range(MEMBERS)]
    cases = [member.case() for member in examples]
    values = [(case.args, case.state, case.segment_ids, case.d_out) for case in cases]
    got = _transformed(operator, example.chunk_size, cut)(*jax.tree.map(_stacked, *values))
    for i, case in enumerate(cases):
        _compare(jax.tree.map(lambda x, i=i: np.asarray(x)[i], got), reference(operator, case), "float32")


# ---- the search

POWERS = st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0, 1e4])
CLOSED = st.sampled_from([-1.0, -10.0, -60.0, -100.0, -1e4, -1e10, -1e30])
# K and V on both sides of C, heads that are shared and not.
SHAPES = {
    "B": st.integers(1, 2),
    "T": st.integers(1, 70),
    "H": st.integers(1, 2),
    "HV": st.sampled_from([2, 4]),
    "K": st.sampled_from([4, 8, 24]),
    "V": st.sampled_from([8, 20]),
}


@st.composite
def examples(draw, operator: str, dtypes: tuple[str, ...], shapes: bool = False, **sizes: int) -> Example:
    sizes |= {letter: draw(size) for letter, size in SHAPES.items()} if shapes else {}
    starts = st.integers(1, max(1, sizes.get("T", SIZES["T"]) - 1))
    return Example(
        operator,
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 1000)),
        decays=draw(POWERS),
        closed=draw(CLOSED),
        share=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        rates=draw(st.sampled_from([None, None, 0.0, 1.0, 2.0])),
        identical_keys=draw(st.booleans()),
        zero_state=draw(st.booleans()),
        documents=tuple(sorted(draw(st.sets(starts, max_size=5)))),
        chunk_size=draw(st.sampled_from([8, 16, 32])) if shapes else CHUNK,
        sizes=tuple(sizes.items()),
    )


def search(check, drawn: st.SearchStrategy[Example], count: int) -> None:
    """Tries `count` drawn examples, always the same ones, and shows the smallest that fails."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def tries(example: Example) -> None:
        check(example)

    tries()


every_recurrence = pytest.mark.parametrize("operator", ls.RECURRENCES.values(), ids=ls.RECURRENCES.keys())
slow = pytest.mark.slow
ALL_DTYPES = ("float64", "float32", "bfloat16")
# One of each way to carry a state between chunks; what the others compile takes minutes more.
SOON = ("gla", "gated_delta_rule", "mlstm")
some_recurrences = pytest.mark.parametrize(
    "operator",
    [pytest.param(operator, id=name, marks=() if name in SOON else slow) for name, operator in ls.RECURRENCES.items()],
)

# XLA's CPU code for a product of many axes ends the process when vmap adds one to those of shared heads and channels.
UNSHARED = {"HV": SIZES["H"]}

FOUND = [
    Example("gla", closed=-1e30, share=0.1, documents=(1, 36)),
    Example("simple_gla", decays=0.0, closed=-100.0, share=1.0),  # gradients too small for float32
    Example("mlstm", closed=-1e30, share=0.5, zero_state=True),
    Example("rwkv7", dtype="bfloat16", decays=1e4, share=0.1, documents=(5, 16, 31)),
]


@pytest.mark.parametrize("example", FOUND, ids=lambda example: example.operator)
def test_found_before(example):
    check_chunk(example)


@every_recurrence
def test_values(operator):
    search(check_chunk, examples(operator.name, ALL_DTYPES), 6)


@slow
@every_recurrence
def test_many_values(operator):
    search(check_chunk, examples(operator.name, ALL_DTYPES), 150)


@slow
@every_recurrence
def test_shapes(operator):
    search(check_chunk, examples(operator.name, ("float32", "bfloat16"), shapes=True), 8)


@some_recurrences
def test_transformations(operator):
    search(check_transformed, examples(operator.name, ("float32",), **UNSHARED), 4)


@slow
@every_recurrence
def test_many_transformations(operator):
    search(check_transformed, examples(operator.name, ("float32",), **UNSHARED), 50)
