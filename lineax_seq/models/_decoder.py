"""A decoder: pre-norm blocks x + mixer(norm x), x + mlp(norm x), with any mixture of linear and softmax layers.

The layers of one repeat of the pattern are a `Repeat`. Parameters of all repeats are stacked on a leading axis, and a
`lax.scan` runs over it: the compiled program has the size of one repeat.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from .. import parallel
from ..layers import RMSNorm, SwiGLU
from ..layers._check import check_lengths, check_positive, check_tokens
from ..layers._dense import PROJECTION
from ._config import DecoderConfig, layer_class
from ._loss import cross_entropy

_POLICIES = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names(PROJECTION)}


class Block(nnx.Module):
    """One mixing layer and one MLP, each on a residual branch."""

    def __init__(self, config: DecoderConfig, layer: str, *, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal
        kernel_init, out_init = normal(config.init_std), normal(config.init_std / (2 * config.num_layers) ** 0.5)
        dtypes = dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))
        common = dict(kernel_init=kernel_init, out_init=out_init, rngs=rngs, **dtypes)
        options = config.layer_options(layer)
        self.mixer_norm = RMSNorm(config.d_model, eps=config.norm_eps, **dtypes)
        self.mixer = layer_class(layer)(config.d_model, norm_eps=config.norm_eps, **options, **common)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps, **dtypes)
        self.mlp = SwiGLU(config.d_model, config.d_ff, **common)

    def __call__(self, x, **along):
        return self._add(x, self.mixer(self.mixer_norm(x), **along))

    def prefill(self, x, cache, lengths):
        y, cache = self.mixer.prefill(self.mixer_norm(x), cache, lengths=lengths)
        return self._add(x, y), cache

    def step(self, x_t, cache):
        y, cache = self.mixer.step(self.mixer_norm(x_t), cache)
        return self._add(x_t, y), cache

    def _add(self, x, y):
        x = x + y
        return x + self.mlp(self.mlp_norm(x))


class Repeat(nnx.Module):
    """The blocks of one repeat of the pattern."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, layer, rngs=rngs) for layer in config.layers])


class Decoder(nnx.Module):
    """Tokens to next-token logits.

    `model(tokens)` is for whole sequences; `init_cache`, `prefill` and `step` decode. Pass the model through `jax.jit`
    and `jax.grad` like any pytree, or split it with `nnx.split`. Parameters are independent of T.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal(config.init_std)
        dtypes = dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.d_model, embedding_init=normal, rngs=rngs, **dtypes)
        self.repeats = nnx.vmap(lambda keys: Repeat(config, rngs=keys))(rngs.split(config.repeats))
        self.final_norm = RMSNorm(config.d_model, eps=config.norm_eps, **dtypes)
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            shape = (config.d_model, config.vocab_size)
            self.lm_head = nnx.Param(normal(rngs.params(), shape, jnp.dtype(config.param_dtype)))

    def __call__(self, tokens: jax.Array, *, segment_ids=None, positions=None, axis_name=None) -> jax.Array:
        """Logits of the token after each: int [B, T] -> float32 [B, T, vocab].

        Args:
            segment_ids: int [B, T]: documents packed in a row; each is computed as if it were alone.
            positions: int [B, T] or [T], for rotary embedding; None counts from the start of each document.
            axis_name: a mesh axis that T is split over, inside `jax.shard_map`; all arguments are the shard's.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        return self.logits(self.hidden(tokens, segment_ids=segment_ids, positions=positions, axis_name=axis_name))

    def hidden(self, tokens: jax.Array, *, segment_ids=None, positions=None, axis_name=None) -> jax.Array:
        """What the head reads: int [B, T] -> [B, T, D] in the compute dtype. Arguments as in a call."""
        x = self._embed("Decoder", tokens, 2)
        check_tokens("Decoder", x, self.config.d_model, segment_ids, positions)
        if positions is None:
            positions = parallel.positions(tokens.shape[1], segment_ids, axis_name)

        def body(x, repeat):
            for block in repeat.blocks:
                x = block(x, segment_ids=segment_ids, positions=positions, axis_name=axis_name)
            return x, None

        if self.config.remat is not None:
            body = jax.checkpoint(body, prevent_cse=False, policy=_POLICIES[self.config.remat])
        x, _ = lax.scan(body, x, self.repeats)
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
        hidden = self.hidden(tokens, segment_ids=segment_ids, positions=positions, axis_name=axis_name)
        return cross_entropy(hidden, self.head, targets, weights, chunk_size=chunk_size)

    def init_cache(self, batch: int, max_length: int):
        """Empty caches of all layers, for sequences of at most `max_length` tokens: leaves [repeats, B, ...]."""
        check_positive("Decoder.init_cache", batch=batch, max_length=max_length)
        caches = tuple(block.mixer.init_cache(batch, max_length) for block in self.repeats.blocks)
        return jax.tree.map(lambda a: jnp.zeros((self.config.repeats, *a.shape), a.dtype), caches)

    def prefill(self, tokens: jax.Array, cache, *, lengths=None):
        """Append tokens int [B, T], of which each row's first `lengths [B]` count, to what the cache holds.

        Returns:
            Logits after each row's last token, float32 [B, vocab], and the cache.
        """
        x = self._embed("Decoder.prefill", tokens, 2)
        B, T = tokens.shape
        check_lengths("Decoder.prefill", lengths, B)
        x, cache = self._through(lambda block, x, cache: block.prefill(x, cache, lengths), x, cache)
        last = x[:, -1] if lengths is None else x[jnp.arange(B), lengths - 1]
        return self.logits(self.final_norm(last)), cache

    def step(self, token: jax.Array, cache):
        """One token int [B] further: logits float32 [B, vocab] and the cache."""
        x = self._embed("Decoder.step", token, 1)
        x, cache = self._through(lambda block, x, cache: block.step(x, cache), x, cache)
        return self.logits(self.final_norm(x)), cache

    def _through(self, apply, x, cache):
        def body(x, repeat):
            blocks, caches = repeat
            after = []
            for block, cache in zip(blocks.blocks, caches, strict=True):
                x, cache = apply(block, x, cache)
                after.append(cache)
            return x, tuple(after)

        return lax.scan(body, x, (self.repeats, cache))

    def _embed(self, caller: str, tokens, ndim: int) -> jax.Array:
        tokens = jnp.asarray(tokens)
        if tokens.ndim != ndim or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
            wanted = "[B, T]" if ndim == 2 else "[B]"
            raise ValueError(
                f"{caller}: tokens are {tokens.dtype}{list(tokens.shape)}, wants int32{wanted}, none empty."
            )
        return self.embed(tokens)
