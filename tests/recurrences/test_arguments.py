"""Bad input is refused before tracing, with what was got, what was wanted and what to do."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import OUTPUTS, assert_close

import lineax_seq as ls

SIZES = dict(B=2, T=8, H=2, HV=4, K=4, V=6)


@pytest.fixture
def args():
    return ls.gated_delta_rule.example(jax.random.key(0), **SIZES)


def refused(match, **changed):
    with pytest.raises(ValueError, match=match):
        ls.gated_delta_rule(**changed)


def test_all_offenders_are_named_at_once(args):
    bad = args | dict(v=args["v"][:, :5], g=args["g"][..., None], beta=jnp.ones((2, 8, 4), jnp.int32))
    with pytest.raises(ValueError) as error:
        ls.gated_delta_rule(**bad)
    message = str(error.value)
    assert message.startswith("gated_delta_rule: ")
    assert "v [2, 5, 4, 6] has T=5, but q has T=8" in message
    assert "g has shape [2, 8, 4, 1], wants [B, T, HV]" in message
    assert "beta is int32, wants a floating dtype" in message


def test_head_counts(args):
    v, g, beta = args["v"][:, :, :3], args["g"][..., :3], args["beta"][..., :3]
    refused("HV=3 value heads over H=2 key heads: HV must be a multiple of H", **args | dict(v=v, g=g, beta=beta))


def test_empty_time(args):
    refused("T=0, wants at least 1", **jax.tree.map(lambda x: x[:, :0], args))


@pytest.mark.parametrize(
    ("option", "match"),
    [
        (dict(form="chunks"), r"form='chunks' \(did you mean 'chunk'\?\), wants one of"),
        (dict(chunk_size=48), "chunk_size=48, wants a power of two"),
        (dict(chunk_size=True), "chunk_size=True, wants a power of two"),
        (dict(implementation="mosaic_tpus"), r"unknown \['mosaic_tpus'\] \(did you mean 'mosaic_tpu'\?\)"),
        (dict(implementation=()), "implementation"),
        (dict(scale="big"), "scale is str, wants a Python number"),
        (dict(initial_state=jnp.zeros((2, 4, 4, 5))), r"float32\[2, 4, 4, 5\], wants float32\[2, 4, 4, 6\]"),
        (dict(initial_state=jnp.zeros((2, 4, 4, 6), jnp.bfloat16)), "bfloat16"),
        (dict(initial_state=(jnp.zeros((2, 4, 4, 6)),)), "pass a state a call returned"),
        (dict(segment_ids=jnp.zeros((2, 7), jnp.int32)), r"segment_ids is int32\[2, 7\], wants int32\[2, 8\]"),
        (dict(segment_ids=jnp.zeros((2, 8))), "segment_ids is float32"),
        (
            dict(segment_id=jnp.zeros((2, 8), jnp.int32)),
            r"unknown argument 'segment_id' \(did you mean 'segment_ids'\?\)",
        ),
        (dict(causal=False), "reads the past only"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options(args, option, match):
    refused(match, **args, **option)


def test_missing_and_repeated_arguments(args):
    with pytest.raises(ValueError, match="missing g, beta; it takes q, k, v, g, beta"):
        ls.gated_delta_rule(args["q"], args["k"], args["v"])
    with pytest.raises(ValueError, match="q was given twice"):
        ls.gated_delta_rule(args["q"], q=args["q"])
    with pytest.raises(ValueError, match="6 positional arguments, wants 5"):
        ls.gated_delta_rule(*args.values(), args["q"])


def test_step_checks_too(args):
    token = {name: x[:, 0] for name, x in args.items()}
    with pytest.raises(ValueError, match=r"gated_delta_rule.step: q has shape \[2, 8, 2, 4\], wants \[B, H, K\]"):
        ls.gated_delta_rule.step(**args, state=None)
    with pytest.raises(ValueError, match="gated_delta_rule.step: state is float32"):
        ls.gated_delta_rule.step(**token, state=jnp.zeros((1, 4, 4, 6)))
    o, state = ls.gated_delta_rule.step(**token)
    assert o.shape == (2, 4, 6) and state.shape == (2, 4, 4, 6)


def test_named_implementations_never_fall_back(args):
    with pytest.raises(NotImplementedError, match="gated_delta_rule: mosaic_tpu: .* cannot: this call runs on cpu"):
        ls.gated_delta_rule(**args, implementation="mosaic_tpu")
    with pytest.raises(ExceptionGroup) as group:
        ls.gated_delta_rule(**args, implementation=("mosaic_tpu", "mosaic_gpu"))
    assert len(group.value.exceptions) == 2
    o, _ = ls.gated_delta_rule(**args, implementation=("mosaic_tpu", "xla"))
    assert o.shape == args["v"].shape


def test_the_token_scan_has_no_kernel(args):
    with pytest.raises(NotImplementedError, match="gated_delta_rule: mosaic_tpu: the token scan has no kernel"):
        ls.gated_delta_rule(**args, form="scan", implementation="mosaic_tpu")


def test_numbers_of_numpy_and_lists_are_taken(args):
    """What an experiment's configuration or a data loader holds."""
    ids = [[0] * 5 + [1] * 3, [0] * 2 + [1] * 6]
    want = ls.gated_delta_rule(**args, chunk_size=4, scale=0.5, segment_ids=jnp.asarray(ids))
    for integer in (np.int64, np.int32):
        got = ls.gated_delta_rule(**args, chunk_size=integer(4), scale=np.float32(0.5), segment_ids=ids)
        assert_close(got, want, 0.0)
    got = ls.gated_delta_rule(**args, chunk_size=4, scale=np.float64(0.5), segment_ids=np.asarray(ids, np.int64))
    assert_close(got, want, 0.0)
    some = ls.retention.example(jax.random.key(0), B=1, T=8, H=1, K=4, V=4)
    assert_close(ls.retention(**some, block_size=np.int64(4)), ls.retention(**some, block_size=4), 0.0)
    assert_close(ls.retention(**some, causal=np.bool_(False)), ls.retention(**some, causal=False), 0.0)


@pytest.mark.parametrize("causal", [1, 0, "yes", None])
@pytest.mark.parametrize("operator", [ls.retention, ls.gla], ids=lambda operator: operator.name)
def test_causal_is_a_truth_value(operator, causal):
    args = operator.example(jax.random.key(0), B=1, T=8, H=1, K=4, V=4)
    with pytest.raises(ValueError, match=f"{operator.name}: causal={causal!r}, wants True or False"):
        operator(**args, causal=causal)


def test_errors_come_before_tracing(args):
    """Inside jit the message is the same, and no value is needed for it."""
    with pytest.raises(ValueError, match="chunk_size=3"):
        jax.eval_shape(lambda a: ls.gated_delta_rule(**a, chunk_size=3), args)


def test_signature_and_registry():
    assert ls.RECURRENCES["gla"] is ls.gla
    assert list(inspect.signature(ls.gla).parameters)[:4] == ["q", "k", "v", "g"]
    assert "2312.06635" in ls.gla.__doc__ and "g: float [B, T, HV, K]" in ls.gla.__doc__


@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_linear_attention(packed, x64):
    """Every token reads all tokens of its document; the entering state belongs to the first document."""
    args = ls.linear_attention.example(jax.random.key(0), B=1, T=21, H=2, HV=4, K=4, V=6, dtype=jnp.float64)
    state = jax.random.normal(jax.random.key(1), (1, 4, 4, 6), jnp.float64)
    segments = (jnp.arange(21) >= 9).astype(jnp.int32)[None] if packed else None
    o, final = ls.linear_attention(**args, causal=False, initial_state=state, segment_ids=segments)
    q, k, v = (args[name][0] for name in "qkv")
    q, k = jnp.repeat(q, 2, 1) * 4**-0.5, jnp.repeat(k, 2, 1)
    same = jnp.ones((21, 21), bool) if segments is None else segments[0][:, None] == segments[0][None]
    enters = jnp.ones(21) if segments is None else segments[0] == 0
    want = jnp.einsum("ihk,jhk,ij,jhv->ihv", q, k, same, v) + jnp.einsum("ihk,hkv,i->ihv", q, state[0], enters)
    assert_close(o[0], want, OUTPUTS["float64"])
    last = jnp.ones(21) if segments is None else segments[0] == 1
    kv = jnp.einsum("jhk,jhv,j->hkv", k, v, last) + (0 if packed else state[0])
    assert_close(final[0], kv, OUTPUTS["float64"])


def test_examples_want_every_size():
    with pytest.raises(ValueError, match="no size for K, V"):
        ls.gla.example(jax.random.key(0), B=1, T=4, H=1)
