"""The decoder: a hybrid for what every model must do, small models for remat, depth and learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tolerances import GRADIENTS, OUTPUTS, assert_close

from lineax_seq.layers import (
    GatedDeltaNetConfig,
    MLSTMConfig,
    RWKV7ChannelMixConfig,
    RWKV7Config,
    SoftmaxAttentionConfig,
    SwiGLUConfig,
    parameter_kinds,
)
from lineax_seq.models import BlockConfig, Decoder, DecoderConfig, HybridConfig, Stage

B, T, VOCAB = 2, 12, 19
F32 = OUTPUTS["float32"]
PATTERN = ("gla", "gated_delta_net", "softmax_attention")
SIZES = dict(vocab_size=VOCAB, d_model=16, num_heads=2, head_dim=4, d_ff=24)
HYBRID = HybridConfig(**SIZES, num_layers=2 * len(PATTERN), pattern=PATTERN, window=5, init_std=0.3)
SMALL = HybridConfig(**SIZES, num_layers=4, pattern="LN", linear_layer="delta_net")
RWKV = dict(feed_forward=RWKV7ChannelMixConfig(d_ff=24), norm="layer_norm")
RANKS = dict(num_heads=2, decay_rank=3, rate_rank=3, value_rank=3, gate_rank=3)
STAGES = DecoderConfig(
    vocab_size=VOCAB,
    d_model=16,
    stages=(
        Stage((BlockConfig(mixer=RWKV7Config(**RANKS).first(), **RWKV),)),
        Stage((BlockConfig(mixer=RWKV7Config(**RANKS), **RWKV),), repeats=2),
        Stage(
            (
                BlockConfig(mixer=MLSTMConfig(num_heads=2), feed_forward=None, multiplier=0.5),
                BlockConfig(
                    mixer=SoftmaxAttentionConfig(num_heads=2), feed_forward=SwiGLUConfig(d_ff=24), residual="parallel"
                ),
                BlockConfig(
                    mixer=GatedDeltaNetConfig(num_heads=2, head_dim=4),
                    feed_forward=SwiGLUConfig(d_ff=24),
                    residual="post",
                ),
            )
        ),
    ),
    embed_norm="layer_norm",
    tie_embeddings=False,
    init_std=0.3,
)


class Case:
    """The hybrid, tokens, and each of its uses jitted once."""

    def __init__(self, model):
        self.model = model
        self.tokens = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
        self.apply = jax.jit(lambda model, tokens: model(tokens))
        self.packed = jax.jit(lambda model, tokens, ids: model(tokens, segment_ids=ids))
        self.prefill = jax.jit(lambda model, tokens, cache, lengths: model.prefill(tokens, cache, lengths=lengths))
        self.step = jax.jit(lambda model, token, cache: model.step(token, cache))
        self.logits = self.apply(self.model, self.tokens)


@pytest.fixture(scope="module", params=[HYBRID, STAGES], ids=["hybrid", "stages"])
def hybrid(request, filled):
    return Case(filled(request.param))


def test_logits_are_float32_and_no_call_retraces(hybrid):
    assert hybrid.logits.shape == (B, T, VOCAB) and hybrid.logits.dtype == jnp.float32
    hybrid.apply(hybrid.model, hybrid.tokens + 0)
    assert hybrid.apply._cache_size() == 1


def test_future_tokens_change_no_earlier_logits(hybrid):
    changed = hybrid.apply(hybrid.model, hybrid.tokens.at[:, 7].add(1) % VOCAB)
    assert_close(changed[:, :7], hybrid.logits[:, :7], F32)  # gates choose between forms that round differently
    assert (np.abs(changed - hybrid.logits)[:, 7:].max((0, 2)) > 1e-3).all()  # and later ones depend on it


def test_packed_documents_are_separate_runs(hybrid):
    ids = jnp.array([[5] * 4 + [2] * 2 + [5] * 6, [0] * 11 + [1]])
    packed = hybrid.packed(hybrid.model, hybrid.tokens, ids)
    for row, borders in ((0, (0, 4, 6, 12)), (1, (0, 11, 12))):
        for start, end in zip(borders[:-1], borders[1:], strict=True):
            alone = hybrid.apply(hybrid.model, jnp.roll(hybrid.tokens, -start, 1))  # the document comes first
            assert_close(packed[row, start:end], alone[row, : end - start], GRADIENTS["float32"])


def test_prefill_and_steps_are_the_forward_pass(hybrid):
    lengths = jnp.array([3, 7])  # on both sides of the window of 5
    cache = hybrid.model.init_cache(B, T)
    logits, cache = hybrid.prefill(hybrid.model, hybrid.tokens[:, :8], cache, lengths)
    for n in range(5):
        if n == 2:  # rows of length 0 go no further: whatever stands in the padding, the same logits again
            again, cache = hybrid.prefill(hybrid.model, hybrid.tokens[:, :8], cache, jnp.zeros_like(lengths))
            assert_close(again, logits, F32)
        at = lengths + n
        assert_close(logits, hybrid.logits[jnp.arange(B), at - 1], GRADIENTS["float32"], f"after {n} steps")
        logits, cache = hybrid.step(hybrid.model, hybrid.tokens[jnp.arange(B), at], cache)


def test_an_empty_prompt_knows_nothing_of_the_first_token(hybrid):
    cache = hybrid.model.init_cache(B, T)
    lengths = jnp.array([0, 3])
    logits, cache = hybrid.prefill(hybrid.model, hybrid.tokens[:, :8], cache, lengths)
    assert not np.any(logits[0])
    assert_close(logits[1], hybrid.logits[1, 2], GRADIENTS["float32"])
    logits, _ = hybrid.step(hybrid.model, hybrid.tokens[jnp.arange(B), lengths], cache)
    assert_close(logits, hybrid.logits[jnp.arange(B), lengths], GRADIENTS["float32"])


def test_loss_is_that_of_the_logits_and_every_parameter_has_a_gradient(hybrid):
    targets, weights = jnp.roll(hybrid.tokens, -1, 1), jnp.arange(B * T, dtype=jnp.float32).reshape(B, T)

    @jax.jit
    def loss(model):
        total = lambda model: model.loss(hybrid.tokens, targets, weights, chunk_size=5)  # noqa: E731
        return jax.value_and_grad(total, has_aux=True)(model)

    got, gradient = loss(hybrid.model)
    nll = optax.softmax_cross_entropy_with_integer_labels(hybrid.logits, targets)
    assert_close(got, (jnp.sum(nll * weights), jnp.sum(weights)), F32)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(gradient)))
    bad = [jax.tree_util.keystr(p) for p, g in leaves if not np.isfinite(g).all() or not np.any(g)]
    assert len(leaves) > 30 and bad == []


def test_untrained_loss_is_that_of_a_uniform_guess():
    model = Decoder(dataclasses.replace(SMALL, pattern="N", vocab_size=500, tie_embeddings=False), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (4, 65), 0, 500)
    total, count = jax.jit(lambda model: model.loss(tokens[:, :-1], tokens[:, 1:]))(model)
    assert abs(total / count - np.log(500)) < 0.1
    assert model.lm_head.shape == (16, 500) and model.embed.embedding.shape == (500, 16)


def test_bfloat16_compute_with_float32_parameters(filled):
    model = filled(dataclasses.replace(SMALL, dtype="bfloat16"))
    assert {a.dtype for a in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    tokens = jnp.arange(2 * 9).reshape(2, 9) % VOCAB
    hidden, logits = jax.jit(lambda m: (m.hidden(tokens), m(tokens)))(model)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    want = jax.jit(lambda m: m(tokens))(filled(SMALL))
    assert_close(logits, want, GRADIENTS["bfloat16"])


def test_remat_changes_memory_but_no_gradient(filled):
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 0, VOCAB)

    def loss(model):
        return model.loss(tokens, tokens)[0]

    def make(remat, **change):
        return filled(dataclasses.replace(SMALL, remat=remat, **change))

    def kept(model):
        return sum(r.size for r in jax.tree.leaves(jax.eval_shape(lambda m: jax.vjp(loss, m)[1], model)))

    gradients = [jax.tree.leaves(jax.jit(jax.grad(loss))(make(remat, pattern="N"))) for remat in (None, "dots", "full")]
    assert_close(gradients[1], gradients[0], GRADIENTS["float32"])
    assert_close(gradients[2], gradients[0], GRADIENTS["float32"])
    everything, dots, full = (kept(make(remat, num_layers=16)) for remat in (None, "dots", "full"))
    assert full < dots < everything
    repeat = sum(a.size for a in jax.tree.leaves(make("full").stages)) // 2
    assert full - kept(make("full")) == 6 * (repeat + tokens.size * 16)  # a repeat more: its parameters and its input


@pytest.mark.parametrize("use", ["gradient", "decode"])
def test_program_does_not_grow_with_depth(use):
    tokens = jnp.zeros((1, 8), int)

    def program(num_layers):
        config = dataclasses.replace(SMALL, num_layers=num_layers)
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        if use == "gradient":
            f = lambda m: jax.grad(lambda m: m.loss(tokens, tokens)[0])(m)  # noqa: E731
        else:
            f = lambda m: m.step(tokens[:, 0], m.prefill(tokens, m.init_cache(1, 9))[1])  # noqa: E731
        return jax.jit(f).lower(model).as_text()

    few, many = program(4), program(40)
    assert abs(many.count("\n") - few.count("\n")) <= 0.01 * few.count("\n")


def test_a_tiny_batch_is_learnt(filled):
    model = filled(dataclasses.replace(SMALL, num_layers=2))
    tokens = jax.random.randint(jax.random.key(0), (2, 17), 0, VOCAB)
    graphdef, params = nnx.split(model)
    optimizer = optax.adam(2e-2)

    def update(_, carry):
        params, state, _ = carry

        def mean(params):
            total, count = nnx.merge(graphdef, params).loss(tokens[:, :-1], tokens[:, 1:])
            return total / count

        loss, gradient = jax.value_and_grad(mean)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    start = params, optimizer.init(params), jnp.zeros(())
    *_, loss = jax.jit(lambda carry: jax.lax.fori_loop(0, 40, update, carry))(start)
    assert loss < 0.1  # from log 19 = 2.9


def test_bad_inputs_are_refused(hybrid):
    model = hybrid.model
    with pytest.raises(ValueError, match=r"tokens are float32\[2, 3\], wants int32\[B, T\]"):
        model(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"tokens are int32\[3\], wants int32\[B, T\]"):
        model(jnp.zeros(3, int))
    with pytest.raises(ValueError, match="segment_ids has shape"):
        model(hybrid.tokens, segment_ids=jnp.zeros((B, T + 1), int))
    with pytest.raises(ValueError, match="lengths"):
        model.prefill(hybrid.tokens, model.init_cache(B, T), lengths=jnp.zeros((B, 1), int))
    with pytest.raises(ValueError, match="batch=0"):
        model.init_cache(0, T)


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_bfloat16_gradients(filled, chunk_size):
    """With all logits at once too, where sums over rows and tokens once had no kernel on a CPU."""
    graphdef, params = nnx.split(filled(dataclasses.replace(SMALL, dtype="bfloat16")))
    tokens = jnp.zeros((2, 16), jnp.int32)
    gradients = jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p).loss(tokens, tokens, chunk_size=chunk_size)[0]))(
        params
    )
    assert all(jnp.isfinite(g).all() and g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("config", [HYBRID, STAGES], ids=["hybrid", "stages"])
def test_one_shard_in_eight_computes_its_part(config, filled):
    """Loss and gradients over the whole row; values and token shifts cross the borders of shards."""
    graphdef, params = nnx.split(filled(dataclasses.replace(config, init_std=0.1)))  # rounding is amplified less
    params, length = nnx.to_pure_dict(params), 32
    tokens = jax.random.randint(jax.random.key(2), (B, length), 0, VOCAB)
    ids = jnp.array([[0] * 9 + [1] * 23, [4] * 32])

    def loss(params, tokens, ids, axis_name=None):
        total, _ = nnx.merge(graphdef, params).loss(tokens, tokens, segment_ids=ids, axis_name=axis_name)
        return total[None]

    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("seq",))
    shard = lambda *xs: loss(*xs, axis_name="seq")  # noqa: E731
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(P(), P(None, "seq"), P(None, "seq")), out_specs=P("seq"))
    got, want = (
        jax.jit(jax.value_and_grad(lambda params, f=f: jnp.sum(f(params, tokens, ids))))(params)
        for f in (sharded, loss)
    )
    assert_close(got, want, GRADIENTS["float32"])


def test_post_and_parallel_branches_are_their_equations(filled):
    mixer, feed_forward = SoftmaxAttentionConfig(num_heads=2), SwiGLUConfig(d_ff=24)
    x = jax.random.normal(jax.random.key(0), (B, T, 16))
    for residual in ("pre", "post", "parallel"):
        block = BlockConfig(mixer=mixer, feed_forward=feed_forward, residual=residual, multiplier=0.5)
        config = DecoderConfig(vocab_size=VOCAB, d_model=16, stages=(Stage((block,)),), init_std=0.3)
        model = filled(config)
        block = jax.tree.map(lambda a: a[0], model.stages[0]).blocks[0]
        got = block(x, None, {}, _whole)[0]
        norms = block.mixer_norm, block.feed_forward_norm
        if residual == "pre":
            want = x + block.mixer(norms[0](x)) / 2
            want = want + block.feed_forward(norms[1](want)) / 2
        elif residual == "post":
            want = x + norms[0](block.mixer(x)) / 2
            want = want + norms[1](block.feed_forward(want)) / 2
        else:
            want = x + block.mixer(norms[0](x)) / 2 + block.feed_forward(norms[0](x)) / 2
        assert_close(got, want, F32, residual)


def _whole(layer, x, cache, shared):
    return layer(x), cache, shared


def test_kinds_are_the_classes_that_names_gave():
    """Projections are matrices, token embeddings and the head are not, and all else is small."""
    config = HybridConfig(vocab_size=50, d_model=64, num_layers=4, pattern=["gla", "L", "delta_net", "N"], conv_width=4)
    model = nnx.eval_shape(lambda: Decoder(dataclasses.replace(config, tie_embeddings=False), rngs=nnx.Rngs(0)))
    kinds = jax.tree_util.tree_leaves_with_path(parameter_kinds(model))
    shapes = jax.tree.leaves(nnx.to_pure_dict(nnx.split(model)[1]))
    for (path, kind), leaf in zip(kinds, shapes, strict=True):
        names = jax.tree_util.keystr(path, simple=True, separator=".")
        if "embed" in names or "lm_head" in names:
            assert kind == ("embedding" if "embed" in names else "head")
        else:
            projects = names.endswith("kernel") and "taps" not in names and min(leaf.shape[-2:]) >= 32
            assert (kind == "matrix") == projects, names


def test_rows_over_explicit_axes(filled):
    """What `jax.make_mesh` gives: logits are split as the tokens are, loss and gradients are those of one device."""
    model, spec = filled(dataclasses.replace(SMALL, num_layers=2)), P(("data", "more"))
    tokens = jax.random.randint(jax.random.key(0), (4, 16), 0, VOCAB)

    def loss(model, tokens):
        total, weight = model.loss(tokens, tokens, segment_ids=jnp.cumsum(tokens == 0, 1))
        return total / weight

    want = model(tokens), jax.value_and_grad(loss)(model, tokens)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "more"))):
        placed = jax.device_put(tokens, P()), jax.device_put(model, P())
        rows = jax.sharding.reshard(placed[0], spec)
        logits = jax.jit(lambda model, tokens: model(tokens))(placed[1], rows)
        got = logits, jax.jit(jax.value_and_grad(loss))(placed[1], rows)
    assert jax.typeof(logits).sharding.spec[0] == spec[0]
    assert_close(jax.tree.leaves(got), jax.tree.leaves(want), GRADIENTS["float32"])
