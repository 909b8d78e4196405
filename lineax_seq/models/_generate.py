"""Continuing prompts: one chunk-form prefill, then steps; linear layers take constant memory per sequence.

Prompts of different lengths are padded on the right. No token sees the padding, linear layers take it as identity
steps and caches leave it out: each prompt is continued as it would be alone, up to rounding.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import parallel
from ..layers._check import check_positive
from ._decoder import Decoder
from ._sampling import sample

_SEEDS = 2**32  # what a key tells apart


def padded_length(n: int) -> int:
    """The least length >= n of the form 4·2^a .. 7·2^a, at least 16: few lengths to compile for, a quarter of waste."""
    unit = max(4, 1 << max(0, (n - 1).bit_length() - 3))
    return max(16, -(-n // unit) * unit)


@functools.partial(jax.jit, static_argnames=("max_length",))
def _start(model: Decoder, tokens, lengths, *, max_length: int):
    return model.prefill(tokens, model.init_cache(tokens.shape[0], max_length), lengths=lengths)


@functools.partial(jax.jit, static_argnames=("steps", "greedy", "top_k"), donate_argnames=("cache",))
def _continue(model, cache, logits, done, keys, first, stop, temperature, top_p, *, steps, greedy, top_k):
    """Up to `steps` tokens, numbered from `first`: tokens [B, steps], -1 from each row's stop token on."""

    def unfinished(carry):
        n, done = carry[0], carry[3]
        return (n < steps) & ~jnp.all(done)

    def body(carry):
        n, cache, logits, done, out = carry
        if greedy:
            token = jnp.argmax(logits, -1).astype(jnp.int32)
        else:
            token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, first + n)
            token = sample(logits, token_keys, temperature=temperature, top_k=top_k, top_p=top_p)
        done = done | jnp.any(token[:, None] == stop, -1)
        out = out.at[:, n].set(jnp.where(done, -1, token))
        logits, cache = model.step(token, cache)
        return n + 1, cache, logits, done, out

    out = jnp.full((logits.shape[0], steps), -1, jnp.int32)
    _, cache, logits, done, out = lax.while_loop(unfinished, body, (jnp.int32(0), cache, logits, done, out))
    return cache, logits, done, out


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    on_token: Callable[[list[int | None]], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the prompt and without the stop token that ended them.

    A second call with as many prompts of similar length (see `padded_length`) compiles nothing. Parameters may lie over
    a mesh; of several processes, each calls this with the same arguments.

    Args:
        prompts: token ids, at least one each; their lengths may differ.
        max_new_tokens: fewer come back only where a stop token was drawn.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens.
        top_p: draw from the fewest tokens whose probabilities sum to at least this.
        stop_tokens: token ids that end a continuation.
        seed: of the draws, 0 to 2^32 - 1; one per prompt, or one for all, from which each prompt gets its own by its
            place.
        on_token: called after every token with one entry per prompt, None for those that have ended.

    Raises:
        ValueError: a prompt that is empty or holds ids outside the vocabulary; an option out of range.
    """
    prompts = [list(prompt) for prompt in prompts]
    _check(model.config.vocab_size, prompts, max_new_tokens, temperature, top_k, top_p, stop_tokens, seed)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = padded_length(int(lengths.max()))
    tokens = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    if isinstance(seed, int | np.integer):
        keys = jax.random.split(jax.random.key(np.uint32(seed)), len(prompts))
    else:
        keys = jax.vmap(jax.random.key)(np.array(seed, np.uint32))

    logits, cache = _start(model, tokens, lengths, max_length=padded + max_new_tokens)
    done = jnp.zeros((len(prompts),), bool)
    stop = np.array(sorted(stop_tokens), np.int32)
    options = dict(greedy=temperature == 0, top_k=top_k, steps=max_new_tokens if on_token is None else 1)
    numbers = np.float32(temperature), None if top_p is None else np.float32(top_p)
    outs = []
    for first in range(0, max_new_tokens, options["steps"]):
        cache, logits, done, out = _continue(model, cache, logits, done, keys, first, stop, *numbers, **options)
        outs.append(parallel.to_host(out))
        if on_token is not None:
            on_token([None if token < 0 else int(token) for token in outs[-1][:, 0]])
            if np.all(parallel.to_host(done)):
                break
    return [[int(token) for token in row if token >= 0] for row in np.concatenate(outs, 1)]


def _check(vocab_size, prompts, max_new_tokens, temperature, top_k, top_p, stop_tokens, seed) -> None:
    if not prompts:
        raise ValueError("generate: no prompts; give at least one list of token ids.")
    for n, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: prompt {n} is empty; start it with at least one token.")
    for what, ids in [*((f"prompt {n}", prompt) for n, prompt in enumerate(prompts)), ("stop_tokens", stop_tokens)]:
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"generate: {what} holds {outside[:5]}, wants ids from 0 to {vocab_size - 1}.")
    check_positive("generate", max_new_tokens=max_new_tokens, top_k=top_k)
    if not temperature >= 0:
        raise ValueError(f"generate: temperature is {temperature!r}, wants 0 (greedy) or more.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p!r}, wants a probability above 0 and at most 1.")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("generate: temperature=0 takes the most probable token; leave out top_k and top_p.")
    seeds = [seed] if isinstance(seed, int | np.integer) else list(seed)
    if len(seeds) != len(prompts) and not isinstance(seed, int | np.integer):
        raise ValueError(f"generate: {len(seeds)} seeds for {len(prompts)} prompts; give one for each, or one int.")
    wrong = [s for s in seeds if not isinstance(s, int | np.integer) or not 0 <= s < _SEEDS]
    if wrong:
        raise ValueError(f"generate: seed {wrong[0]!r}, wants whole numbers from 0 to 2^32 - 1: others have no draws.")
