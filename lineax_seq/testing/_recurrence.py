"""The laws that every recurrence obeys: all forms are the float64 token scan, whatever the inputs and their lengths."""

import dataclasses
import functools
from collections.abc import Collection

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ..core.arguments import log_decay
from ..core.operator import Operator
from ._case import CHUNK, SIZES, Case, assert_same, evaluate, reference
from ._closeness import OUTPUTS, assert_close
from ._hard_inputs import HARD_INPUTS, changed, changes, closing
from ._monoid import check_element, check_monoid
from ._report import Law, run

DOCUMENTS = (5, CHUNK, 2 * CHUNK - 1)
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK)
CUTS = (1, CHUNK, 2 * CHUNK + 1)
F32 = OUTPUTS["float32"]


def check_recurrence(operator: Operator, laws: Collection[str] | None = None, **sizes: int) -> None:
    """Every form of the recurrence is right: chunk, scan and step, with all gradients.

    Args:
        operator: the public callable; its declaration says how examples are drawn.
        laws: the names of those to check, of `recurrence_laws(operator)`; None is all of them.
        sizes: of the legend's letters, where those of `SIZES` do not suit. B, T and the chunks' size stay.

    Raises:
        AssertionError: the broken laws, each with what was got and wanted and how to see it again.
        ValueError: an unknown law.
    """
    run("check_recurrence", operator.name, recurrence_laws(operator, **sizes), laws)


def recurrence_laws(operator: Operator, **sizes: int) -> dict[str, Law]:
    """The laws that apply to this recurrence, by name. Each raises an AssertionError where it is broken.

    Raises:
        ValueError: sizes that the laws fix.
    """
    if fixed := sorted({"B", "T"} & sizes.keys()):
        raise ValueError(f"recurrence_laws: {', '.join(fixed)} given, but the laws choose them; leave them out.")
    case = functools.partial(Case, operator, **sizes)
    bind = functools.partial
    laws: dict[str, Law] = {
        "associative and an action": bind(check_monoid, operator, sizes, packed=False),
        "associative and an action, packed": bind(check_monoid, operator, sizes, packed=True),
        "a summary does what a step does": bind(check_element, operator, sizes),
        **{f"chunk = scan, {dtype}": bind(_form, operator, case, "chunk", dtype) for dtype in OUTPUTS},
        "scan in float32": bind(_form, operator, case, "scan", "float32"),
        "derived chunk form": bind(_derived, operator, case),
        "steps = scan": bind(_steps, operator, case),
        **{f"T = {length}": bind(_length, operator, case, length) for length in LENGTHS},
        **{f"state handed over at {cut}": bind(_handed_over, operator, case, cut) for cut in CUTS},
        "causality": bind(_causality, operator, case),
        "causality of gradients": bind(_causal_gradients, operator, case),
        "packed = separate": bind(_packed, operator, case),
        "rows are independent": bind(_rows, operator, case),
        "traced once": bind(_traced_once, operator, sizes),
        **{f"hard: {hard}": bind(_hard, operator, case, hard) for hard in HARD_INPUTS if changes(operator, hard)},
    }
    letters = {letter for argument in operator.arguments.values() for letter in argument.letters}
    if {"H", "HV"} <= letters:
        laws["grouped heads"] = bind(_grouped, operator, case)
    if "g" in operator.arguments and operator.arguments["g"].draw is log_decay:
        laws["hard: g=-inf among slow ones"] = bind(_closed, operator, case)
    return laws


def _tokens(operator: Operator, case: Case, part: slice) -> dict[str, jax.Array]:
    """The arguments of a part of the tokens, in float32."""
    return {name: _narrow(x[:, part] if operator.arguments[name].per_token else x) for name, x in case.args.items()}


def _narrow(x) -> jax.Array:
    return jnp.asarray(np.asarray(x), "float32")


# ---- the forms agree


def _form(operator, case, form, dtype):
    """Grouped heads, packed documents, a state that enters, T no multiple of the chunk; and the dtypes."""
    packed = case().packed(*DOCUMENTS).rounded(dtype)
    got = evaluate(operator, form, packed, dtype)
    assert_same(got, reference(operator, packed), dtype)
    (o, final), (d_args, d_state) = got
    state_dtype = "float64" if dtype == "float64" else "float32"
    for what, tree, wanted in (("o", (o, d_args), dtype), ("final_state", (final, d_state), state_dtype)):
        found = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(tree)})
        assert found == [wanted], f"{what} and its gradients are {found} for {dtype} inputs, wants {wanted}"


def _derived(operator, case):
    """A family's chunk form against the chunk form that follows from its tokens alone, without documents."""
    args, state = case().args, case().state
    slow = dataclasses.replace(operator, recurrence=operator.recurrence.derived())
    with jax.enable_x64(True):
        got, want = (op(**args, initial_state=state, chunk_size=CHUNK, form="chunk") for op in (operator, slow))
    assert_close(got, want, OUTPUTS["float64"], "float64")


def _steps(operator, case):
    """All tokens one at a time, as a loop in one program; with gradients."""
    case = case()
    per_token = {name for name, argument in operator.arguments.items() if argument.per_token}

    def call(args, state):
        shared = {name: x for name, x in args.items() if name not in per_token}

        def body(state, token):
            o, state = operator.step(**token, **shared, state=state)
            return state, o

        tokens = {name: jnp.moveaxis(x, 1, 0) for name, x in args.items() if name in per_token}
        final, o = jax.lax.scan(body, state, tokens)
        return jnp.moveaxis(o, 0, 1), final

    @jax.jit
    def run(args, state, d_out):
        out, pull = jax.vjp(call, args, state)
        return out, pull(d_out)

    got = run(*jax.tree.map(_narrow, (case.args, case.state, case.d_out)))
    assert_same(got, reference(operator, case), "float32")


def _length(operator, case, length):
    """Against the reference at full length, whose later tokens are zeros, where these leave the state alone."""
    if length > SIZES["T"] or not operator.zero_is_identity:
        short = case(T=length) if length > SIZES["T"] else case().first(length)
        want = reference(operator, short)
    else:
        short = case().first(length)
        (o, state), (d_args, d_state) = reference(operator, case().silent_after(length))
        first = {n: x[:, :length] if operator.arguments[n].per_token else x for n, x in d_args.items()}
        want = (o[:, :length], state), (first, d_state)
    assert_same(evaluate(operator, "chunk", short, "float32"), want, "float32")


# ---- time, rows and heads


def _handed_over(operator, case, cut):
    """The state carries everything: two calls equal one."""
    case = case()
    (o, final), _ = reference(operator, case)
    state, outputs = jax.tree.map(_narrow, case.state), []
    for part in (slice(None, cut), slice(cut, None)):
        o_part, state = operator(**_tokens(operator, case, part), initial_state=state, chunk_size=CHUNK)
        outputs.append(np.asarray(o_part))
    got = {"o": np.concatenate(outputs, 1), "final_state": state}
    assert_close(got, {"o": o, "final_state": final}, F32, "two calls")


def _causality(operator, case):
    """Other tokens in the future change nothing in the past, to the last bit; NaN from a chunk's border on neither."""
    clean, other = case(), case(seed=1)
    (o, _), _ = evaluate(operator, "chunk", clean, "float32")
    for t, future in ((CHUNK, np.nan), (CHUNK + 7, None)):
        changed = case()
        for name, x in changed.args.items():
            if operator.arguments[name].per_token:
                x = np.array(x)
                x[:, t:] = np.asarray(other.args[name])[:, t:] if future is None else future
                changed.args[name] = x
        (got, _), _ = evaluate(operator, "chunk", changed, "float32")
        told = f"tokens from {t} on changed{' to NaN' if future else ''}: outputs before them"
        np.testing.assert_array_equal(np.asarray(got)[:, :t], np.asarray(o)[:, :t], told)
        same = np.array_equal(np.asarray(got)[:, t:], np.asarray(o)[:, t:], equal_nan=True)
        assert not same, f"tokens from {t} on changed, and their own outputs did not"


def _causal_gradients(operator, case):
    """What only the past is asked about sends nothing to the future."""
    case, t = case(), CHUNK + 7
    d_o = np.array(case.d_out[0])
    d_o[:, t:] = 0
    case.d_out = d_o, jax.tree.map(np.zeros_like, case.d_out[1])
    _, (d_args, _) = evaluate(operator, "chunk", case, "float32")
    for name, d in d_args.items():
        if operator.arguments[name].per_token:
            assert np.any(np.asarray(d)[:, :t]), f"the gradient of {name} is zero"
            np.testing.assert_array_equal(np.asarray(d)[:, t:], 0, f"the gradient of {name} from token {t} on")


def _packed(operator, case):
    """The entering state reaches the first document only; the final state is the last document's."""
    case = case(B=1).packed(*DOCUMENTS)
    (o, final), _ = evaluate(operator, "chunk", case, "float32")
    borders = (0, *DOCUMENTS, SIZES["T"])
    with jax.enable_x64(True):
        for start, stop in zip(borders, borders[1:], strict=False):
            tokens = {n: x[:, start:stop] if operator.arguments[n].per_token else x for n, x in case.args.items()}
            alone, state = operator(**tokens, form="scan", initial_state=case.state if start == 0 else None)
            assert_close({"o": o[:, start:stop]}, {"o": alone}, F32, f"the document at {start} alone")
    assert_close({"final_state": final}, {"final_state": state}, F32, "the last document alone")


def _rows(operator, case):
    """`jax.vmap` over sequences, each a batch of one, is one call with all of them; with gradients."""
    case = case()
    (o, final), (d_args, d_state) = reference(operator, case)
    per_token = {name for name, argument in operator.arguments.items() if argument.per_token}
    args, state, d_out = jax.tree.map(_narrow, (case.args, case.state, case.d_out))

    def one(args, state, d_out):
        def call(args, state):
            rows = {name: x[None] if name in per_token else x for name, x in args.items()}
            out = operator(**rows, initial_state=jax.tree.map(lambda s: s[None], state), chunk_size=CHUNK)
            return jax.tree.map(lambda x: x[0], out)

        out, pull = jax.vjp(call, args, state)
        return out, pull(d_out)

    axes = {name: 0 if name in per_token else None for name in args}
    (got_o, got_final), (d_rows, d_got) = jax.jit(jax.vmap(one, (axes, 0, 0)))(args, state, d_out)
    d_rows = {name: d if name in per_token else d.sum(0) for name, d in d_rows.items()}
    assert_same(((got_o, got_final), (d_rows, d_got)), ((o, final), (d_args, d_state)), "float32")


def _grouped(operator, case):
    """Value heads that share a key head are as if each had its own copy."""
    case = case()
    (o, final), _ = reference(operator, case)
    n = case.sizes["HV"] // case.sizes["H"]
    args = {
        name: np.repeat(x, n, operator.arguments[name].letters.index("H"))
        if "H" in operator.arguments[name].letters
        else x
        for name, x in _tokens(operator, case, slice(None)).items()
    }
    got_o, got_final = operator(**args, initial_state=jax.tree.map(_narrow, case.state), chunk_size=CHUNK)
    got, want = {"o": got_o, "final_state": got_final}, {"o": o, "final_state": final}
    assert_close(got, want, F32, "repeated key heads")


# ---- numbers


def _hard(operator, case, hard):
    case = case()
    case.args = changed(case.args, changes(operator, hard))
    case = case.rounded("float32")
    got = evaluate(operator, "chunk", case, "float32")
    chex.assert_tree_all_finite(got)
    assert_same(got, reference(operator, case), "float32")


def _closed(operator, case):
    """A gate of -inf forgets exactly, and its gradient is zero, not NaN."""
    case = case().rounded("float32")
    closed = closing(case.args["g"])
    case.args["g"] = np.where(closed, -np.inf, np.asarray(case.args["g"]))
    got = evaluate(operator, "chunk", case, "float32")
    chex.assert_tree_all_finite(got)
    assert_same(got, reference(operator, case), "float32")
    np.testing.assert_array_equal(np.asarray(got[1][0]["g"])[closed], 0, "the gradient of closed gates")


# ---- compilation


def _traced_once(operator, sizes):
    """A second call with the same shapes runs none of the record's Python: outside `jax.jit`, and inside."""
    traces = []

    def counted(function):
        if function is None:
            return None

        def counts(*args):
            traces.append(function)
            return function(*args)

        return counts

    functions = {
        name: counted(getattr(operator.recurrence, name)) for name in ("element", "update", "output", "prepare")
    }
    operator = dataclasses.replace(operator, recurrence=dataclasses.replace(operator.recurrence, **functions))
    args = operator.example(jax.random.key(0), **{**SIZES, **sizes})
    halved = jax.tree.map(lambda x: x * 0.5, args)
    want = operator(**args, chunk_size=CHUNK)
    assert traces, "none of the record's functions was called"
    traces.clear()
    operator(**halved, chunk_size=CHUNK)
    assert not traces, "a second call with the same shapes is traced again"
    call = jax.jit(chex.assert_max_traces(lambda args: operator(**args, chunk_size=CHUNK), 1))
    call(halved)
    assert_close(call(args), want, F32, "inside jax.jit against outside")
