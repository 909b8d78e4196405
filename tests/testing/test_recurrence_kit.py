"""Every law of the kit finds the recurrence that breaks it, and says where and how."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lineax_seq as ls
from lineax_seq.testing import assert_close, check_recurrence, recurrence_laws, relative_rms

GATED = ls.simple_gla


def with_record(operator=GATED, **changes):
    return dataclasses.replace(operator, recurrence=dataclasses.replace(operator.recurrence, **changes))


def with_prepare(change, operator=GATED):
    """The chunk form sees other inputs than the scan; documents are `keep`."""
    prepare = operator.recurrence.prepare
    return with_record(operator, prepare=lambda x, keep: prepare(*change(x, keep)))


def with_monoid(operator=GATED, **changes):
    return with_record(operator, monoid=operator.recurrence.monoid._replace(**changes))


def with_fields(change, operator=GATED):
    """All forms see other inputs than the caller gave: they agree, and are wrong."""
    return dataclasses.replace(operator, lower=lambda xs: change(xs if operator.lower is None else operator.lower(xs)))


def with_outputs(change):
    return dataclasses.replace(GATED, finish=lambda o, xs: change(o))


def wrong_decay():
    return with_prepare(lambda x, keep: ({**x, "g": 1.01 * x["g"]}, keep))


def leaking_documents():
    return with_prepare(lambda x, keep: (x, None if keep is None else jnp.ones_like(keep)))


def sign_error():
    return with_prepare(lambda x, keep: ({**x, "k": -x["k"]}, keep))


def overflowing():
    """Decays between tokens as quotients of decays since the chunk's start."""

    def prepare(x, keep):
        since_start = jnp.exp(jnp.cumsum(x["g"]))
        return {
            **x,
            "g": jnp.log(since_start / jnp.concatenate([jnp.ones(1, since_start.dtype), since_start[:-1]])),
        }, keep

    return with_prepare(prepare)


def swapped_product():
    """A product of transitions in the wrong order."""
    combine = ls.delta_rule.recurrence.monoid.combine

    def swapped(earlier, later):
        right = combine(earlier, later)
        return right._replace(transition=earlier.transition @ later.transition)

    return with_monoid(ls.delta_rule, combine=swapped)


def lost_values():
    combine = GATED.recurrence.monoid.combine
    return with_monoid(combine=lambda earlier, later: combine(earlier, later)._replace(offset=later.offset))


def offset_as_identity():
    identity = GATED.recurrence.monoid.identity
    return with_monoid(identity=lambda state: identity(state)._replace(offset=jnp.ones_like(state)))


def update_without_decay():
    return with_record(update=lambda x, state: state + x["k"][:, None] * x["v"][None, :])


class Forgetful(ls.Operator):
    """A step that starts anew."""

    def step(self, *args, state=None, **kwargs):
        return super().step(*args, **kwargs)


class Restless(ls.Operator):
    """A new operator at every call, and so a new program."""

    def __call__(self, *args, **kwargs):
        return ls.Operator.__call__(dataclasses.replace(self), *args, **kwargs)


class WithoutLastTokens(ls.Operator):
    """Tokens after the last whole chunk are left out of the state."""

    def __call__(self, *args, **kwargs):
        o, state = super().__call__(*args, **kwargs)
        if kwargs.get("form") != "scan" and o.shape[1] % 16:
            state = jax.tree.map(lambda s: 0.99 * s, state)
        return o, state


def of_class(kind):
    return kind(**{field.name: getattr(GATED, field.name) for field in dataclasses.fields(GATED)})


def reads_the_future():
    return with_fields(lambda xs: {**xs, "v": jnp.roll(xs["v"], -1, axis=1)})


def mixes_rows():
    return with_fields(lambda xs: {**xs, "v": xs["v"] - xs["v"].mean(axis=0, keepdims=True)})


def turns_key_heads():
    return with_fields(lambda xs: {**xs, "k": jnp.roll(xs["k"], 1, axis=2)})


def counts_from_the_call():
    return with_outputs(lambda o: o * jnp.arange(1, o.shape[1] + 1, dtype=o.dtype)[:, None, None])


def wide_outputs():
    return with_outputs(lambda o: o.astype(jnp.promote_types(o.dtype, jnp.float32)))


def undifferentiated():
    return with_prepare(lambda x, keep: ({**x, "g": jax.lax.stop_gradient(x["g"])}, keep))


BROKEN = {
    "wrong decay": (
        wrong_decay,
        "chunk = scan, float64",
        r"float64 \['o'\]: relative rms .* wants at most 1e-12; the worst",
    ),
    "wrong decay, derived": (wrong_decay, "derived chunk form", "relative rms"),
    "wrong decay, hard": (wrong_decay, "hard: g=-30", "relative rms"),
    "sign error": (sign_error, "chunk = scan, bfloat16", "relative rms"),
    "no gradient": (
        undifferentiated,
        "chunk = scan, float32",
        r"^(?!.*\['o'\])[\s\S]*\['d g'\]: relative rms 1.0e\+00",
    ),
    "leak": (leaking_documents, "packed = separate", "the document at 5 alone"),
    "leak, against the scan": (leaking_documents, "chunk = scan, float64", r"\['o'\]"),
    "overflow": (overflowing, "hard: g=-1e4", "Nonfinite"),
    "overflow at -inf": (overflowing, "hard: g=-inf among slow ones", "Nonfinite"),
    "swapped product": (swapped_product, "associative and an action", r"against a \(b c\), applied"),
    "lost values": (lost_values, "associative and an action, packed", "one after the other"),
    "identity": (offset_as_identity, "associative and an action", "identity a against a"),
    "update": (update_without_decay, "a summary does what a step does", "token 1: the summary applied"),
    "step": (lambda: of_class(Forgetful), "steps = scan", r"float32 \['o'\]: relative rms"),
    "last tokens": (lambda: of_class(WithoutLastTokens), "T = 17", r"\['final_state'\]"),
    "last tokens, handed over": (lambda: of_class(WithoutLastTokens), "state handed over at 33", r"\['final_state'\]"),
    "the place in the call": (counts_from_the_call, "state handed over at 16", r"two calls \['o'\]"),
    "future": (reads_the_future, "causality", "tokens from 16 on changed to NaN"),
    "gradients to the future": (reads_the_future, "causality of gradients", "the gradient of v from token 23 on"),
    "rows": (mixes_rows, "rows are independent", r"\['o'\]"),
    "key heads": (turns_key_heads, "grouped heads", "repeated key heads"),
    "dtype": (wide_outputs, "chunk = scan, bfloat16", r"o and its gradients are \['bfloat16', 'float32'\]"),
    "traces": (lambda: of_class(Restless), "traced once", "is traced again"),
}


@pytest.mark.parametrize(("make", "law", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_recurrence_is_found(make, law, message):
    with pytest.raises(AssertionError, match=message) as error:
        check_recurrence(make(), laws=[law])
    assert f"law {law!r} is broken" in str(error.value) and f"check_recurrence(..., laws=[{law!r}])" in str(error.value)


def test_every_kind_of_law_has_a_recurrence_that_breaks_it():
    kinds = lambda laws: {law.split(",")[0].split(":")[0].rstrip("0123456789 ") for law in laws}  # noqa: E731
    without_mutant = {"scan in float"}  # the reference itself, rounded: held by the equations in test_oracles.py
    assert kinds(recurrence_laws(GATED)) - kinds(law for _, law, _ in BROKEN.values()) == without_mutant


def test_all_broken_laws_are_told_at_once():
    with pytest.raises(AssertionError) as error:
        check_recurrence(wrong_decay(), laws=["steps = scan", "state handed over at 33", "derived chunk form"])
    assert "simple_gla breaks 2 of 3 laws" in str(error.value)


def test_unknown_laws_are_refused():
    with pytest.raises(ValueError, match=r"check_recurrence: law='causalty' \(did you mean 'causality'\?\)"):
        check_recurrence(GATED, laws=["causalty"])
    with pytest.raises(ValueError, match="recurrence_laws: T given, but the laws choose them"):
        recurrence_laws(GATED, T=5)


def test_another_error_says_which_law_it_was():
    def refuses(xs):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as error:
        check_recurrence(with_fields(refuses), laws=["causality"])
    assert error.value.__notes__[-1] == "check_recurrence: simple_gla, law 'causality'"


def test_relative_rms_fails_when_it_should():
    """The measure that everything rests on."""
    x = np.ones(4)
    assert relative_rms(x * (1 + 1e-3), x) == pytest.approx(1e-3)
    assert relative_rms(x, 0 * x) == np.inf and relative_rms(0 * x, 0 * x) == 0
    assert relative_rms(x * np.nan, x) == np.inf
    with pytest.raises(AssertionError, match=r"\['a'\]: relative rms 1.0e-01, wants .* got 1.1, wanted 1"):
        assert_close({"a": x * 1.1}, {"a": x}, 1e-2)
    with pytest.raises(AssertionError, match=r"the worst is at \[2\]: got nan, wanted 1 \(1 of 4 are not finite\)"):
        assert_close(np.array([1, 1, np.nan, 1]), x, 1e-2)
    with pytest.raises(AssertionError, match=r"got shape \(2,\), wants \(4,\)"):
        assert_close(x[:2], x, 1e-2)
    with pytest.raises(AssertionError):
        assert_close({"a": x}, {"b": x}, 1e-2)
