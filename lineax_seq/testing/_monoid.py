"""The laws of a recurrence's summaries, and that a token's summary does to the state what its step does."""

import jax
import jax.numpy as jnp

from ..core.monoid import Segmented, segmented
from ..core.operator import Operator
from ..core.recurrence import step
from ._closeness import OUTPUTS, assert_close

SIZES = dict(B=1, T=6, H=1, HV=1, K=4, V=5, D=6, N=3, L=4)
EXACT = OUTPUTS["float64"]


def tokens(operator: Operator, sizes: dict[str, int]) -> list[dict]:
    """The record's inputs of one head, token by token."""
    record = operator.recurrence
    fields = operator.fields(operator.example(jax.random.key(0), dtype=jnp.float64, **{**SIZES, **sizes}))
    one_head = lambda name, x: x[0] if record.head_letter(name) else x  # noqa: E731

    def token(t):
        xs = {name: fields[name][0, t] for name in record.fields} | {name: fields[name] for name in record.parameters}
        return {name: one_head(name, x) for name, x in xs.items()}

    return [token(t) for t in range(SIZES["T"])]


def check_monoid(operator: Operator, sizes: dict[str, int], packed: bool) -> None:
    """Associativity, action on states, identities; `packed`: of summaries that may forget what came before."""
    record = operator.recurrence
    with jax.enable_x64(True):
        xs = tokens(operator, sizes)
        zero = state = record.init_state(xs[0])
        for x in xs[:3]:
            state = record.monoid.apply(record.element(x), state)
        a, b, c = (record.element(x) for x in xs[3:])
        laws, identity = record.monoid, record.monoid.identity(state)
        if packed:
            laws = segmented(laws, zero)
            a, b, c = (Segmented(jnp.asarray(f), s) for f, s in zip((False, True, False), (a, b, c), strict=True))
            identity = laws.identity(state)
        left, right = laws.combine(laws.combine(a, b), c), laws.combine(a, laws.combine(b, c))
        assert_close(laws.apply(left, state), laws.apply(right, state), EXACT, "(a b) c against a (b c), applied")
        in_turn = laws.apply(c, laws.apply(b, laws.apply(a, state)))
        assert_close(laws.apply(left, state), in_turn, EXACT, "a b c applied at once against one after the other")
        for name, summary in (("identity a", laws.combine(identity, a)), ("a identity", laws.combine(a, identity))):
            assert_close(laws.apply(summary, state), laws.apply(a, state), EXACT, f"{name} against a, applied")


def check_element(operator: Operator, sizes: dict[str, int]) -> None:
    """`monoid.apply(element(x), S)` is the state after the token x, which `update` may compute in another way."""
    record = operator.recurrence
    with jax.enable_x64(True):
        xs = tokens(operator, sizes)
        state = record.init_state(xs[0])
        for t, x in enumerate(xs):
            applied = record.monoid.apply(record.element(x), state)
            state, _ = step(record, x, None, state)
            assert_close(applied, state, EXACT, f"token {t}: the summary applied against the step")
