"""A decoder: an embedding, stages of blocks of any layers, and a head.

The blocks of one repeat of a stage are a `Repeat`. Parameters of all its repeats are stacked on a leading axis, and a
`lax.scan` runs over it: the compiled program has the size of one repeat of every stage.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from .. import parallel
from ..layers import Context, LayerConfig, LayerNorm, RMSNorm
from ..layers._check import check_lengths, check_positive, check_tokens
from ..layers._context import padded_right
from ..layers._dense import PROJECTION
from ..parallel.varying import vary, varying
from ._config import BlockConfig, DecoderConfig, Norm, Stage
from ._hybrid import HybridConfig
from ._loss import cross_entropy

_POLICIES = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names(PROJECTION)}
_NORMS: dict[Norm, type[RMSNorm]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}

# (layer, x, its cache, shared) -> (y, cache, shared): how a layer is run, on sequences or on one token
Run = Callable[[Any, jax.Array, Any, dict], tuple[jax.Array, Any, dict]]


def _norm(config: DecoderConfig, kind: Norm) -> RMSNorm:
    return _NORMS[kind](config.d_model, eps=config.norm_eps, **_dtypes(config))


def _normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def _dtypes(config: DecoderConfig) -> dict[str, Any]:
    return dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))


class Block(nnx.Module):
    """One mixer and one feed-forward layer, each on a residual branch."""

    def __init__(self, config: DecoderConfig, block: BlockConfig, *, rngs: nnx.Rngs):
        self.config = block
        normal = jax.nn.initializers.normal
        kernel_init, out_init = normal(config.init_std), normal(config.init_std / (2 * config.num_layers) ** 0.5)

        def make(layer: LayerConfig):
            inits = dict(kernel_init=kernel_init, out_init=out_init)
            return layer.make(config.d_model, norm_eps=config.norm_eps, rngs=rngs, **inits, **_dtypes(config))

        self.mixer_norm, self.mixer = _norm(config, block.norm), make(block.mixer)
        self.feed_forward_norm = self.feed_forward = nnx.data(None)
        if block.feed_forward is not None:
            if block.residual != "parallel":
                self.feed_forward_norm = _norm(config, block.norm)
            self.feed_forward = make(block.feed_forward)

    def __call__(self, x: jax.Array, cache, shared: dict, run: Run):
        """x `[.., D]`, the block's cache (None: whole sequences) and `shared`, each after this block."""
        mixer_cache, feed_forward_cache = (None, None) if cache is None else cache
        residual, add = self.config.residual, self._add
        inner = x if residual == "post" else self.mixer_norm(x)
        y, mixer_cache, shared = run(self.mixer, inner, mixer_cache, shared)
        x = add(x, self.mixer_norm(y) if residual == "post" else y)
        if self.feed_forward is not None:
            if residual == "pre":
                inner = _normed(self.feed_forward_norm, x)
            elif residual == "post":
                inner = x
            y, feed_forward_cache, shared = run(self.feed_forward, inner, feed_forward_cache, shared)
            x = add(x, _normed(self.feed_forward_norm, y) if residual == "post" else y)
        return x, None if cache is None else (mixer_cache, feed_forward_cache), shared

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y if self.config.multiplier == 1 else x + self.config.multiplier * y

    def init_cache(self, batch: int, max_length: int):
        layers = (self.mixer, self.feed_forward)
        return tuple(None if layer is None else layer.init_cache(batch, max_length) for layer in layers)

    def init_shared(self, x: jax.Array) -> dict:
        ahead = {} if self.feed_forward is None else self.feed_forward.init_shared(x)
        return {**ahead, **self.mixer.init_shared(x)}


class Repeat(nnx.Module):
    """The blocks of one repeat of a stage."""

    def __init__(self, config: DecoderConfig, stage: Stage, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, block, rngs=rngs) for block in stage.blocks])


class DecoderCache(NamedTuple):
    """What a decoder remembers of `B` sequences."""

    stages: tuple  # per stage and block the layers' caches, leaves [repeats, B, ...]
    last: jax.Array  # [B, D] what the head reads of each row's last token, zeros before the first


class Decoder(nnx.Module):
    """Tokens to next-token logits.

    `model(tokens)` is for whole sequences; `init_cache`, `prefill` and `step` decode. Pass the model through `jax.jit`
    and `jax.grad` like any pytree, or split it with `nnx.split`. Parameters are independent of T.
    """

    def __init__(self, config: DecoderConfig | HybridConfig, *, rngs: nnx.Rngs):
        config = config.decoder() if isinstance(config, HybridConfig) else config
        normal = jax.nn.initializers.normal(config.init_std)
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=normal,
            rngs=rngs,
            embedding_metadata={"kind": "embedding"},
            **_dtypes(config),
        )
        self.embed_norm = nnx.data(None) if config.embed_norm is None else _norm(config, config.embed_norm)
        self.stages = nnx.List([_stacked(config, stage, rngs) for stage in config.stages])
        self.final_norm = _norm(config, config.final_norm)
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            shape = (config.d_model, config.vocab_size)
            self.lm_head = nnx.Param(normal(rngs.params(), shape, jnp.dtype(config.param_dtype)), kind="head")

    def __call__(self, tokens: jax.Array, *, segment_ids=None, positions=None, axis_name=None) -> jax.Array:
        """Logits of the token after each: int [B, T] -> float32 [B, T, vocab].

        Args:
            segment_ids: int [B, T]: documents packed in a row; each is computed as if it were alone.
            positions: int [B, T] or [T], for rotary embedding; None counts from the start of each document.
            axis_name: a mesh axis that T is split over, inside `jax.shard_map`; all arguments are the shard's.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """

        def run(model, tokens, segment_ids, positions):
            along = dict(segment_ids=segment_ids, positions=positions, axis_name=axis_name)
            return model.logits(model.hidden(tokens, **along))

        return parallel.by_rows(run, self, jnp.asarray(tokens), segment_ids, positions)

    def hidden(self, tokens: jax.Array, *, segment_ids=None, positions=None, axis_name=None) -> jax.Array:
        """What the head reads: int [B, T] -> [B, T, D] in the compute dtype. Arguments as in a call."""
        x = self._embed("Decoder", tokens, 2)
        check_tokens("Decoder", x, self.config.d_model, segment_ids, positions)
        if positions is None:
            positions = parallel.positions(tokens.shape[1], segment_ids, axis_name)
        run = _on_sequences(Context(segment_ids, positions, None, axis_name))
        x, _ = self._through(x, [None] * len(self.stages), run, remat=self.config.remat)
        return self.final_norm(x)

    @property
    def head(self) -> jax.Array:
        """The output head [D, vocab] in the parameters' dtype: with tied embeddings, their transpose."""
        return self.embed.embedding[...].T if self.lm_head is None else self.lm_head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., vocab]."""
        return jnp.matmul(hidden, self.head.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def loss(
        self,
        tokens,
        targets,
        weights=None,
        *,
        segment_ids=None,
        positions=None,
        axis_name: str | None = None,
        chunk_size: int | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`(sum of weight · nll in nats, sum of weights)`, see `cross_entropy`; arguments as in a call.

        With `axis_name` the sums are the shard's; `parallel.sharded_loss` adds those of all shards.
        """

        def run(model, tokens, targets, weights, segment_ids, positions):
            hidden = model.hidden(tokens, segment_ids=segment_ids, positions=positions, axis_name=axis_name)
            return cross_entropy(hidden, model.head, targets, weights, chunk_size=chunk_size)

        rows = (jnp.asarray(tokens), targets, weights, segment_ids, positions)
        return parallel.by_rows(run, self, *rows, summed=True)

    def init_cache(self, batch: int, max_length: int) -> DecoderCache:
        """A cache that has seen nothing, for sequences of at most `max_length` tokens."""
        check_positive("Decoder.init_cache", batch=batch, max_length=max_length)
        stages = tuple(
            jax.vmap(lambda repeat: tuple(block.init_cache(batch, max_length) for block in repeat.blocks))(repeats)
            for repeats in self.stages
        )
        return DecoderCache(stages, jnp.zeros((batch, self.config.d_model), jnp.dtype(self.config.dtype)))

    def prefill(self, tokens: jax.Array, cache: DecoderCache, *, lengths=None) -> tuple[jax.Array, DecoderCache]:
        """Append tokens int [B, T], of which each row's first `lengths [B]` count, to what the cache holds.

        Returns:
            Logits after each row's last token so far, float32 [B, vocab], and the cache. A row of length 0 goes no
            further: its logits are those after what the cache held, and where that was nothing they are all 0, since
            nothing is known of the first token.
        """
        x = self._embed("Decoder.prefill", tokens, 2)
        B, T = tokens.shape
        check_lengths("Decoder.prefill", lengths, B)
        x, stages = self._through(x, cache.stages, _on_sequences(Context(valid=padded_right(T, lengths))))
        if lengths is None:
            last = self.final_norm(x[:, -1])
        else:
            last = self.final_norm(x[jnp.arange(B), jnp.maximum(lengths, 1) - 1])
            last = jnp.where((jnp.asarray(lengths) > 0)[:, None], last, cache.last)
        return self.logits(last), DecoderCache(stages, last)

    def step(self, token: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        """One token int [B] further: logits float32 [B, vocab] and the cache."""
        x = self._embed("Decoder.step", token, 1)
        x, stages = self._through(x, cache.stages, lambda layer, *state: layer.run_token(*state))
        last = self.final_norm(x)
        return self.logits(last), DecoderCache(stages, last)

    def _through(self, x: jax.Array, caches, run: Run, remat: str | None = None):
        """x after all stages, and the stages' caches."""

        def body(carry, repeat):
            (x, shared), (blocks, caches) = carry, repeat
            after = []
            for n, block in enumerate(blocks.blocks):
                x, cache, shared = block(x, None if caches is None else caches[n], shared, run)
                after.append(cache)
            return (x, shared), tuple(after)

        if remat is not None:
            body = jax.checkpoint(body, prevent_cse=False, policy=_POLICIES[remat])
        shared, after = {}, []
        for repeats, cache in zip(self.stages, caches, strict=True):
            # what a layer adds to `shared` must be in it before the loop over the repeats begins
            tokens = x if x.ndim == 3 else x[:, None]
            for block in repeats.blocks:
                shared = {**block.init_shared(tokens), **shared}
            shared = vary(shared, varying(x))
            (x, shared), cache = lax.scan(body, (x, shared), (repeats, cache))
            after.append(cache)
        return x, tuple(after)

    def _embed(self, caller: str, tokens, ndim: int) -> jax.Array:
        tokens = jnp.asarray(tokens)
        if tokens.ndim != ndim or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
            wanted = "[B, T]" if ndim == 2 else "[B]"
            raise ValueError(
                f"{caller}: tokens are {tokens.dtype}{list(tokens.shape)}, wants int32{wanted}, none empty."
            )
        return _normed(self.embed_norm, self.embed(tokens))


def _stacked(config: DecoderConfig, stage: Stage, rngs: nnx.Rngs) -> Repeat:
    """The repeats of a stage, parameters stacked on a leading axis."""
    return nnx.vmap(lambda keys: Repeat(config, stage, rngs=keys))(rngs.split(stage.repeats))


def _on_sequences(context: Context) -> Run:
    return functools.partial(_run_layer, context)


def _run_layer(context: Context, layer, x: jax.Array, cache, shared: dict):
    return layer.run(x, context, cache, shared)
