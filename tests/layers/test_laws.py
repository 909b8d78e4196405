"""What every layer does alike: causality, packed documents, prefill and steps, padding, shards, gradients, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tolerances import GRADIENTS, OUTPUTS, assert_close

from lineax_seq import layers
from lineax_seq.layers import FEED_FORWARDS, MIXERS, Context

B, T, D = 2, 16, 16
F32 = OUTPUTS["float32"]
IDS = np.array([[5] * 5 + [2] * 2 + [5] * 9, [0] * 15 + [1]])  # borders inside and at the ends of the 8 shards
DOCUMENTS = [(0, 0, 5), (0, 5, 7), (0, 7, 16), (1, 0, 15), (1, 15, 16)]  # row, start, end
FIRST, SECOND, STEPS = np.array([2, 5]), np.array([4, 0]), 4
SMALL = dict(num_heads=2, head_dim=4, conv_width=3, decay_rank=3, rate_rank=3, value_rank=3, gate_rank=3, d_ff=24)


def small(config, **options):
    """The configuration with small sizes, for whatever fields it has; of a model's lowest such layer."""
    known = {name: size for name, size in SMALL.items() if name in config.field_names()}
    return config(**{**known, **options}).first()


CONFIGS = {
    **{name: small(config) for name, config in {**MIXERS, **FEED_FORWARDS}.items()},
    "gla, no convolution": small(MIXERS["gla"], conv_width=None),
    "gated_delta_net, grouped heads": small(MIXERS["gated_delta_net"], num_v_heads=4),
    "softmax_attention, window": small(MIXERS["softmax_attention"], num_kv_heads=1, window=3, qk_norm=True),
    "softmax_attention, long window": small(MIXERS["softmax_attention"], window=9, rope_theta=None),
}


def uses(graphdef, params, x, weights):
    """Every use of a layer, as one program."""
    layer = nnx.merge(graphdef, params)
    alone = [jnp.roll(x[row], -start, 0) for row, start, _ in DOCUMENTS]  # the document first, whatever follows
    whole = layer(jnp.concatenate([x, x.at[:, 7:].add(1.0), jnp.stack(alone)]))

    def loss(params, x):
        y = nnx.merge(graphdef, params)(x, segment_ids=jnp.asarray(IDS))
        return jnp.sum(y * weights), y

    def sharded_loss(params, x):
        shard = lambda params, x, ids: nnx.merge(graphdef, params)(x, segment_ids=ids, axis_name="seq")  # noqa: E731
        specs = (P(), P(None, "seq"), P(None, "seq"))
        y = jax.shard_map(
            shard, mesh=jax.sharding.Mesh(np.array(jax.devices()), ("seq",)), in_specs=specs, out_specs=specs[1]
        )(params, x, jnp.asarray(IDS))
        return jnp.sum(y * weights), y

    packed, sharded = (jax.value_and_grad(f, (0, 1), has_aux=True)(params, x) for f in (loss, sharded_loss))
    cache = layer.init_cache(B, T)
    padded = jnp.where(np.arange(5)[:, None] < FIRST[:, None, None], x[:, :5], 9.0)
    first, cache = layer.prefill(padded, cache, lengths=FIRST)
    second, cache = layer.prefill(x[np.arange(B)[:, None], FIRST[:, None] + np.arange(5)], cache, lengths=SECOND)

    def step(cache, tokens):
        y, cache = layer.step(tokens, cache)
        return cache, y

    steps = x[np.arange(B)[:, None], (FIRST + SECOND)[:, None] + np.arange(STEPS)]
    _, steps = jax.lax.scan(step, cache, jnp.moveaxis(steps, 1, 0))
    return dict(whole=whole, packed=packed, sharded=sharded, pieces=(first, second, jnp.moveaxis(steps, 0, 1)))


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, filled):
    """The layer and what its uses give."""
    layer = filled(CONFIGS[request.param], D)
    graphdef, state = nnx.split(layer)
    x, weights = jax.random.normal(jax.random.key(1), (2, B, T, D))
    got = jax.jit(uses, static_argnums=0)(graphdef, nnx.to_pure_dict(state), x, weights)
    return layer, x, got


def test_future_tokens_change_nothing_and_present_ones_do(case):
    y, changed = case[2]["whole"][:B], case[2]["whole"][B : 2 * B]
    assert_close(changed[:, :7], y[:, :7], F32)
    assert np.abs(changed[:, 7:] - y[:, 7:]).min(-1).max() > 1e-3


def test_packed_documents_are_separate_runs(case):
    packed, alone = case[2]["packed"][0][1], case[2]["whole"][2 * B :]
    for (row, start, end), want in zip(DOCUMENTS, alone, strict=True):
        assert_close(packed[row, start:end], want[: end - start], F32, f"row {row} from {start}")


def test_padded_pieces_and_steps_are_the_whole_sequence(case):
    """Rows of different lengths, one of which a second prefill leaves alone, then steps at different positions."""
    first, second, steps = case[2]["pieces"]
    for b in range(B):
        got = np.concatenate([first[b, : FIRST[b]], second[b, : SECOND[b]], steps[b]])
        assert_close(got, case[2]["whole"][b, : len(got)], F32, f"row {b}")


def test_eight_shards_are_one(case):
    (_, got), got_gradients = case[2]["sharded"]
    (_, want), want_gradients = case[2]["packed"]
    assert_close(got, want, F32)
    assert_close(got_gradients, want_gradients, GRADIENTS["float32"])


def test_every_parameter_has_a_finite_gradient(case):
    leaves = jax.tree_util.tree_leaves_with_path(case[2]["packed"][1])
    assert [jax.tree_util.keystr(p) for p, g in leaves if not np.isfinite(g).all() or not np.any(g)] == []


def test_caches_keep_their_form_and_grow_only_with_keys(case):
    layer, x, _ = case
    cache = layer.init_cache(B, T)
    after = jax.eval_shape(lambda x, cache: layer.step(x[:, 0], layer.prefill(x[:, :3], cache)[1])[1], x, cache)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), cache)
    shapes = [jax.tree.map(jnp.shape, jax.eval_shape(lambda n=n: layer.init_cache(B, n))) for n in (1, 100_000)]
    assert (shapes[0] == shapes[1]) == (not isinstance(layer, layers.SoftmaxAttention))


@pytest.mark.parametrize("name", [*MIXERS, *FEED_FORWARDS])
def test_bfloat16_in_bfloat16_out(name, filled):
    exact = filled(CONFIGS[name], D)
    low = filled(CONFIGS[name], D, dtype=jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(nnx.state(low))} == {jnp.dtype(jnp.float32)}
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    y, cache = jax.jit(lambda low, x: low.prefill(x, low.init_cache(B, T)))(low, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(getattr(cache, "state", None))} <= {jnp.dtype(jnp.float32)}
    assert_close(y, jax.jit(lambda layer, x: layer(x))(exact, x), GRADIENTS["bfloat16"])  # many roundings deep


def test_bad_inputs_are_refused(case):
    layer, x, _ = case
    cache = layer.init_cache(B, T)
    with pytest.raises(ValueError, match=r"x has shape \[2, 16, 15\], wants \[B, T, 16\]"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match="segment_ids is float32.*positions has shape"):
        layer(x, segment_ids=jnp.zeros((B, T)), positions=jnp.zeros((B, T + 1), int))
    with pytest.raises(ValueError, match="lengths"):
        layer.prefill(x, cache, lengths=jnp.zeros((B + 1,), int))
    with pytest.raises(ValueError, match="max_length=0"):
        layer.init_cache(B, 0)
    with pytest.raises(ValueError, match="a cache with segment_ids or axis_name"):
        layer.run(x, Context(segment_ids=jnp.zeros((B, T), int)), cache, {})


@pytest.mark.parametrize("name", [*MIXERS, *FEED_FORWARDS])
def test_configurations_travel_as_json_and_name_what_is_unknown(name):
    config = CONFIGS[name]
    values = config.to_dict()
    assert values.pop("name") == name and type(config).from_dict(values) == config
    assert type(config)(**{f.name: f.default for f in dataclasses.fields(config)}) == type(config)()
    longest = max(values, key=len)
    with pytest.raises(ValueError, match=f"did you mean '{longest}'"):
        type(config).from_dict({**values, longest[:-1] + "q": 1})
