"""The chunk form is the same however many chunks are held at once, and however they are prepared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXACT, STARTS, T, example, with_gradients
from tolerances import assert_close

import lineax_seq as ls
from lineax_seq.core import chunked, forms
from lineax_seq.core.chunked import Chunked

KINDS = ("simple_gla", "gated_delta_rule", "rwkv7", "mlstm", "mamba")  # of walks; the others under `slow`


def test_the_parallel_chunks_of_accelerators(x64):
    """On a CPU the vector family scans tokens; what runs elsewhere is right too."""
    record = dataclasses.replace(ls.hgrn.recurrence, scans_on_cpu=False)
    args = example(ls.hgrn)
    state = jax.random.normal(jax.random.key(1), (2, 5))
    starts = jnp.zeros((2, T), bool).at[:, jnp.asarray(STARTS)].set(True)
    assert not forms._scans(record) and forms._scans(ls.hgrn.recurrence)
    for reset in (None, starts):
        parallel = lambda args, state: forms.chunk(record, None, 8, args, reset, state)  # noqa: B023, E731
        loop = lambda args, state: forms.scan(record, None, args, reset, state)  # noqa: B023, E731
        got, want = with_gradients(parallel, args, state), with_gradients(loop, args, state)
        assert_close(got, want, EXACT)


@pytest.mark.parametrize("tokens", [1, 64, 1 << 40], ids=["blocks_of_one", "two_blocks", "at_once"])
@pytest.mark.parametrize(
    "operator",
    [
        pytest.param(operator, id=name, marks=() if name in KINDS else pytest.mark.slow)
        for name, operator in ls.RECURRENCES.items()
        if name != "log_linear_attention"  # its fields hold positions, which have no gradient
    ],
)
def test_chunks_are_right_in_blocks_of_any_size(operator, tokens, monkeypatch, x64):
    """Blocks keep the state that enters them and pull back through their walk, one block the states of its chunks."""
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", tokens)
    args = operator.example(jax.random.key(0), B=1, T=40, H=1, HV=2, K=4, V=4, D=2, N=4, NH=2, L=6, dtype=jnp.float64)
    fields, record = operator.fields(args), operator.recurrence
    state = jax.tree.map(lambda s: s + 0.5, operator(**args)[1])
    length = next(iter(fields.values())).shape[1]
    reset = jnp.zeros((1, length), bool).at[:, length // 3].set(True)
    got = with_gradients(lambda xs, state: forms.chunk(record, None, 8, xs, reset, state), fields, state)
    want = with_gradients(lambda xs, state: forms.scan(record, None, xs, reset, state), fields, state)
    assert_close(got, want, EXACT)


@pytest.mark.parametrize("operator", [ls.gla, ls.kda, ls.lightnet], ids=lambda operator: operator.name)
@pytest.mark.parametrize("strengths", [(0.1, 0.1, 0.1), (0.1, 300.0, 2.0), (300.0, 0.1, 0.1)], ids=str)
def test_every_block_chooses_how_to_prepare(operator, strengths, monkeypatch, x64):
    """Blocks of one chunk of 32 tokens: all mild, or each of its own kind; with gradients and without."""
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", 64)
    args = operator.example(jax.random.key(0), B=1, T=90, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    scaled = "k" if operator is ls.lightnet else "g"
    args[scaled] = args[scaled] * jnp.repeat(jnp.asarray(strengths), 32)[None, :90, None, None]
    fields, record = operator.fields(args), operator.recurrence
    state = jax.tree.map(lambda s: s + 0.5, operator(**args)[1])
    chunk = lambda xs, state: forms.chunk(record, None, 32, xs, None, state)  # noqa: E731
    want = with_gradients(lambda xs, state: forms.scan(record, None, xs, None, state), fields, state)
    assert_close(with_gradients(chunk, fields, state), want, EXACT)
    assert_close(jax.jit(chunk)(fields, state), want[0], EXACT)
    call = Chunked(record, None, 32, fields, None)
    np.testing.assert_array_equal(call._decided(call._applies(call.shortcuts[0])), call._decided())


def test_forward_alone_blocks_are_smaller(monkeypatch, x64):
    """Which changes nothing: here one chunk of both heads, where a gradient's forward pass takes four."""
    monkeypatch.setattr(chunked, "CPU_FORWARD_CHUNKS", 2)
    args = ls.kda.example(jax.random.key(0), B=1, T=60, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    chunk = lambda xs: forms.chunk(ls.kda.recurrence, None, 16, xs, None, jnp.zeros((1, 2, 4, 4)))  # noqa: E731
    (alone, (kept, _)) = jax.jit(chunk)(args), jax.vjp(chunk, args)
    assert_close(alone, kept, EXACT)
    blocks = [Chunked(ls.kda.recurrence, None, 16, args, None, forward_alone=it).blocks for it in (True, False)]
    assert blocks == [4, 1]


@pytest.mark.parametrize("operator", [ls.gla, ls.kda, ls.lightnet], ids=lambda operator: operator.name)
@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_all_chunks_at_once_choose_how_to_prepare(operator, strength, monkeypatch, x64):
    """Elsewhere than on a CPU all chunks are one block; of 32 tokens, so that every shortcut is worth it."""
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", 1 << 40)
    args = operator.example(jax.random.key(0), B=1, T=70, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    scaled = "k" if operator is ls.lightnet else "g"
    args[scaled] = args[scaled] * strength
    fields, record = operator.fields(args), operator.recurrence
    state = jax.tree.map(lambda s: s + 0.5, operator(**args)[1])
    got = with_gradients(lambda xs, state: forms.chunk(record, None, 32, xs, None, state), fields, state)
    want = with_gradients(lambda xs, state: forms.scan(record, None, xs, None, state), fields, state)
    assert_close(got, want, EXACT)


def test_factors_serve_several_runs(monkeypatch, x64):
    """All chunks at once: what `chunk_factors` gives is not made again, and gradients are as without it."""
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", 1 << 40)
    args = ls.gla.example(jax.random.key(0), B=1, T=20, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
    fields, state = ls.gla.fields(args), ls.gla(**args)[1]
    reset = jnp.zeros((1, 20), bool).at[:, 11].set(True)
    call = functools.partial(forms.chunk, ls.gla.recurrence, None, 8)
    factors = forms.chunk_factors(ls.gla.recurrence, None, 8, fields, reset)
    got = with_gradients(lambda xs, state: call(xs, reset, state, factors), fields, state)
    want = with_gradients(lambda xs, state: forms.scan(ls.gla.recurrence, None, xs, reset, state), fields, state)
    assert_close(got, want, EXACT)
    np.testing.assert_array_equal(call(fields, reset, state, jax.tree.map(jnp.zeros_like, factors))[1], 0)
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", 1)  # blocks follow one another
    assert forms.chunk_factors(ls.gla.recurrence, None, 8, fields, reset) is None


def test_factors_of_several_kinds_stay_inside_their_branch(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_BLOCK_TOKENS", 1 << 40)
    fields = ls.lightnet.fields(ls.lightnet.example(jax.random.key(0), B=1, T=40, H=1, HV=1, K=4, V=4))
    assert forms.chunk_factors(ls.lightnet.recurrence, None, 16, fields, None) is None
