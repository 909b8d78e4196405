"""Sampling filters and generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineax_seq.models import HybridConfig, _generate, filter_top_k, filter_top_p, generate, sample

VOCAB = 19
CONFIG = HybridConfig(
    vocab_size=VOCAB, d_model=16, num_layers=4, pattern="LN", num_heads=2, head_dim=4, d_ff=24, window=4, init_std=0.4
)
PROMPTS = [[3], [1, 2, 3, 4, 5, 6], [7, 8, 9]]
NEW = 8


@pytest.fixture(scope="module")
def model(filled):
    return filled(CONFIG)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, max_new_tokens=NEW, temperature=0)


def test_top_k_keeps_k():
    logits = jnp.array([[1.0, 4.0, 2.0, 3.0], [0.0, -1.0, -2.0, 5.0]])
    kept = np.isfinite(filter_top_k(logits, 2))
    np.testing.assert_array_equal(kept, [[False, True, False, True], [True, False, False, True]])
    np.testing.assert_array_equal(filter_top_k(logits, 9), logits)


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    p = np.array([0.1, 0.4, 0.2, 0.3])
    for mass, kept in (
        (1e-6, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        filtered = filter_top_p(jnp.log(jnp.asarray(p))[None], mass)[0]
        assert np.flatnonzero(np.isfinite(filtered)).tolist() == kept
    rows = jax.random.normal(jax.random.key(0), (50, 30)) * 3
    probability = np.asarray(jax.nn.softmax(rows), np.float64)
    kept = np.where(np.isfinite(filter_top_p(rows, 0.8)), probability, 0)
    assert (kept.sum(-1) >= 0.8 - 1e-6).all()
    least = np.where(kept > 0, kept, np.inf).min(-1)
    assert (kept.sum(-1) - least < 0.8 + 1e-6).all()  # without the least likely one it falls short


def test_draws_follow_the_tempered_distribution():
    logits, draws = jnp.array([0.0, 1.0, 2.0]), 4000
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = sample(jnp.tile(logits, (draws, 1)), keys, temperature=2.0, top_k=None, top_p=None)
    frequency = np.bincount(tokens, minlength=3) / draws
    np.testing.assert_allclose(frequency, jax.nn.softmax(logits / 2), atol=0.03)


def test_greedy_is_the_argmax_of_the_forward_pass(model, greedy):
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        whole = jnp.array([prompt + new])
        padded = jnp.pad(whole, ((0, 0), (0, 16 - whole.shape[1])))
        logits = jax.jit(lambda model, tokens: model(tokens))(model, padded)[0]
        assert len(new) == NEW
        assert new == jnp.argmax(logits[len(prompt) - 1 : len(prompt) + NEW - 1], -1).tolist()


def test_top_k_of_one_is_greedy(model, greedy):
    assert generate(model, PROMPTS, max_new_tokens=NEW, temperature=5.0, top_k=1, seed=3) == greedy


@pytest.mark.parametrize("temperature", [1e-4, 1e-38, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_greedy(model, greedy, temperature):
    assert generate(model, PROMPTS, max_new_tokens=NEW, temperature=temperature, seed=3) == greedy


def test_an_endless_temperature_is_a_uniform_guess():
    logits, keys = jnp.array([0.0, 1.0, 50.0]), jax.random.split(jax.random.key(0), 3000)
    tokens = sample(jnp.tile(logits, (3000, 1)), keys, temperature=float("inf"), top_k=None, top_p=None)
    np.testing.assert_allclose(np.bincount(tokens, minlength=3) / 3000, 1 / 3, atol=0.04)


def test_a_batch_is_each_prompt_alone(model, greedy):
    for n, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], max_new_tokens=NEW, temperature=0) == [greedy[n]]
    options = dict(max_new_tokens=NEW, temperature=1.0, top_p=0.9)
    batch = generate(model, PROMPTS, seed=[5, 6, 7], **options)
    assert batch == [generate(model, [p], seed=[s], **options)[0] for p, s in zip(PROMPTS, (5, 6, 7), strict=True)]
    assert batch != generate(model, PROMPTS, seed=[8, 9, 10], **options)


def test_seed_decides(model):
    draw = lambda seed: generate(model, [[1]] * 3, max_new_tokens=NEW, seed=seed)  # noqa: E731
    first = draw(0)
    assert draw(0) == first != draw(1)
    assert len({tuple(row) for row in first}) == 3  # equal prompts go their own ways
    assert draw(2**31) != first != draw(2**32 - 1) != draw(2**31)
    assert draw([2**32 - 1] * 3)[0] != draw([0] * 3)[0]


def test_stop_tokens_end_a_row_and_only_that_row(model, greedy):
    stop = greedy[1][3]
    want = [row[: row.index(stop)] if stop in row else row for row in greedy]
    assert any(len(row) < NEW for row in want)
    assert generate(model, PROMPTS, max_new_tokens=NEW, temperature=0, stop_tokens=[stop]) == want


def test_streaming_gives_the_same_tokens(model):
    options = dict(max_new_tokens=NEW, seed=[1, 2, 3], stop_tokens=[0, 1, 2])
    seen = []
    got = generate(model, PROMPTS, on_token=seen.append, **options)
    assert got == generate(model, PROMPTS, **options)
    assert [[t for t in column if t is not None] for column in zip(*seen, strict=True)] == got
    assert len(seen) == min(NEW, max(map(len, got)) + 1)  # it ends with the last row


def test_another_call_compiles_nothing(model, greedy):
    before = _generate._start._cache_size(), _generate._continue._cache_size()
    generate(model, [[2, 2], [4] * 16, [1]], max_new_tokens=NEW, temperature=0)
    assert (_generate._start._cache_size(), _generate._continue._cache_size()) == before


def test_padded_lengths_are_few_and_near():
    lengths = [_generate.padded_length(n) for n in range(1, 5000)]
    assert all(n <= p <= max(16, 1.25 * n + 4) for n, p in enumerate(lengths, 1))
    assert len(set(lengths)) < 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[]), "no prompts"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1, 19]]), r"prompt 0 holds \[19\], wants ids from 0 to 18"),
        (dict(stop_tokens=[-1]), "stop_tokens holds"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(temperature=0, top_p=0.5), "leave out top_k and top_p"),
        (dict(seed=[1, 2]), "2 seeds for 1 prompts"),
        (dict(seed=2**32), r"seed 4294967296, wants whole numbers from 0 to 2\^32 - 1"),
        (dict(seed=2**63), "seed 9223372036854775808"),
        (dict(seed=[2**40]), "seed 1099511627776"),
        (dict(seed=-1), "seed -1"),
        (dict(seed=[0.5]), "seed 0.5"),
    ],
)
def test_bad_arguments_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": [[1]], "max_new_tokens": 2, **change})
