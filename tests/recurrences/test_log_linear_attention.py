"""Log-linear attention is a matrix of levels, and its short way for aligned chunks is the long one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXACT, STARTS, T, direct, example, segments, with_gradients
from tolerances import assert_close

import lineax_seq as ls
from lineax_seq.core import forms
from lineax_seq.core.layout import Layout
from lineax_seq.core.target import target_here


@pytest.mark.parametrize("levels", [1, 2, 3, 7])
def test_log_linear_attention_is_its_matrix_of_levels(levels, x64):
    """level(t, j) = bitlength(t xor j), the last one for all that is older."""
    args = example(ls.log_linear_attention, L=levels)
    t = np.arange(T)
    level = np.minimum(np.vectorize(lambda n: int(n).bit_length())(t[:, None] ^ t), levels - 1)
    by_level = jnp.moveaxis(args["level_scales"], 2, 3)  # [B, T, L, HV]
    scales = jnp.stack([by_level[:, i][:, level[i]] for i in t], axis=1)  # [B, T, T, HV]
    G = jnp.cumsum(args["g"], axis=1)
    weights = jnp.where(jnp.tri(T, dtype=bool)[None, :, :, None], jnp.exp(G[:, :, None] - G[:, None]), 0)
    want = direct(args["q"], args["k"], args["v"], weights * scales, jnp.ones((2, T, T)), 4**-0.5)[1]
    for form in ("scan", "chunk"):
        o, _ = ls.log_linear_attention(**args, form=form, **({"chunk_size": 8} if form == "chunk" else {}))
        assert_close(o, want, EXACT, form)


@pytest.mark.parametrize("levels", [3, 7])
def test_aligned_chunks_take_the_short_way(levels, x64):
    """The form for aligned chunks against the one for chunks that begin anywhere, with gradients."""
    operator = ls.log_linear_attention
    args = example(operator, T=40, L=levels)
    anywhere = dataclasses.replace(operator.recurrence, special=None)
    fields = operator.fields(args)
    aligned = operator.recurrence.special.applies
    chunks = fields["position"].reshape(2, 5, 8, 4)
    assert aligned({"position": chunks}) and not aligned({"position": chunks + 1})
    assert not aligned({"position": chunks.at[-1, 0, 0, 3].set(-1)})
    state = Layout.of(anywhere, fields).zero_state(fields)
    floats = {name: x for name, x in fields.items() if name != "position"}

    def run(record):
        def on(xs):
            return forms.chunk(record, target_here(), 0.5, 8, {**xs, "position": fields["position"]}, None, state)

        return on

    assert_close(with_gradients(run(operator.recurrence), floats), with_gradients(run(anywhere), floats), EXACT)


def test_documents_that_start_with_aligned_chunks(x64):
    """The short way forgets too."""
    args = example(ls.log_linear_attention, T=40)
    ids = jnp.broadcast_to((jnp.arange(40) >= 16).astype(jnp.int32), (2, 40))
    state = ls.log_linear_attention(**example(ls.log_linear_attention, seed=1, T=32))[1]

    def run(**options):
        return lambda args, state: ls.log_linear_attention(**args, initial_state=state, segment_ids=ids, **options)

    got, want = (with_gradients(run(**o), args, state) for o in (dict(chunk_size=8), dict(form="scan")))
    assert_close(got, want, EXACT)


def test_log_linear_count_wraps(x64):
    """The count keeps the bits that the levels can tell apart: no length of a document is too long for it."""
    args = example(ls.log_linear_attention, L=4)
    _, (_, count) = ls.log_linear_attention(**args)
    np.testing.assert_array_equal(count, T % 4)
    _, (_, count) = ls.log_linear_attention(**args, segment_ids=segments())
    np.testing.assert_array_equal(count, (T - STARTS[-1]) % 4)
