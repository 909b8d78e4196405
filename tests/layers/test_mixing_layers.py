"""What every mixing layer does alike: causality, packed documents, prefill and step, dtypes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import GRADIENTS, OUTPUTS, assert_close

from lineax_seq.layers import LINEAR_LAYERS, SoftmaxAttention

B, T, D = 2, 12, 16
F32 = OUTPUTS["float32"]
COMMON = dict(num_heads=2, kernel_init=jax.nn.initializers.normal(0.4))
OPTIONS = {"gla": dict(conv_width=4), "gated_delta_net": dict(num_v_heads=4, conv_width=2)}
MAKE = {
    **{name: (layer, {"head_dim": 4, **OPTIONS.get(name, {})}) for name, layer in LINEAR_LAYERS.items()},
    "softmax": (SoftmaxAttention, dict(qk_norm=True)),
    "softmax, window": (SoftmaxAttention, dict(num_kv_heads=1, window=3)),
    "softmax, long window": (SoftmaxAttention, dict(window=9, rope_theta=None)),
}


class Case:
    """One layer, its inputs, and each of its uses jitted once."""

    def __init__(self, name):
        self.name = name
        make, options = MAKE[name]
        self.layer = make(D, rngs=nnx.Rngs(0), **{**COMMON, **options})
        self.x = jax.random.normal(jax.random.key(1), (B, T, D))
        self.apply = jax.jit(lambda layer, x: layer(x))
        self.packed = jax.jit(lambda layer, x, ids: layer(x, segment_ids=ids))
        self.prefill = jax.jit(lambda layer, x, cache, lengths: layer.prefill(x, cache, lengths=lengths))
        self.step = jax.jit(lambda layer, x, cache: layer.step(x, cache))
        self.y = self.apply(self.layer, self.x)


@pytest.fixture(scope="module", params=MAKE)
def case(request):
    return Case(request.param)


def test_future_tokens_change_nothing(case):
    changed = case.apply(case.layer, case.x.at[:, 7:].add(1.0))
    assert_close(changed[:, :7], case.y[:, :7], F32)
    assert np.abs(changed[:, 7:] - case.y[:, 7:]).min(-1).max() > 1e-3


def test_packed_documents_are_separate_runs(case):
    ids = jnp.array([[5] * 4 + [2] * 2 + [5] * 6, [0] * 11 + [1]])
    packed = case.packed(case.layer, case.x, ids)
    for row, borders in ((0, (0, 4, 6, 12)), (1, (0, 11, 12))):
        for start, end in zip(borders[:-1], borders[1:], strict=True):
            alone = case.apply(case.layer, jnp.roll(case.x, -start, 1))  # the document first, whatever follows
            assert_close(packed[row, start:end], alone[row, : end - start], F32)


def test_prefill_and_steps_are_the_whole_sequence(case):
    """Rows of different lengths, a second prefill over what the first left, then steps at different positions."""
    lengths, more = jnp.array([2, 5]), jnp.array([4, 3])
    cache = case.layer.init_cache(B, T)
    y, cache = case.prefill(
        case.layer, jnp.where(jnp.arange(5)[:, None] < lengths[:, None, None], case.x[:, :5], 9.0), cache, lengths
    )
    rows = [y[0, :2], y[1, :5]]
    following = jnp.stack([case.x[0, 2:7], case.x[1, 5:10]])
    y, cache = case.prefill(case.layer, following, cache, more)
    rows = [jnp.concatenate([row, y[b, : more[b]]]) for b, row in enumerate(rows)]
    for n in range(4):
        y, cache = case.step(case.layer, jnp.stack([case.x[0, 6 + n], case.x[1, 8 + n]]), cache)
        rows = [jnp.concatenate([row, y[b][None]]) for b, row in enumerate(rows)]
    assert [len(row) for row in rows] == [10, 12]
    for b, row in enumerate(rows):
        assert_close(row, case.y[b, : len(row)], F32, f"row {b}")


def test_bfloat16_in_bfloat16_out(case):
    make, options = MAKE[case.name]
    low = make(D, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **{**COMMON, **options})
    assert {a.dtype for a in jax.tree.leaves(nnx.state(low))} == {jnp.dtype(jnp.float32)}
    x = case.x.astype(jnp.bfloat16)
    y, cache = jax.jit(lambda layer: layer.prefill(x, layer.init_cache(B, T)))(low)
    assert y.dtype == jnp.bfloat16
    state = getattr(cache, "state", None)
    assert state is None or state.dtype == jnp.float32
    assert_close(y, case.y, GRADIENTS["bfloat16"])  # a whole layer, many roundings deep


def test_bad_inputs_are_refused(case):
    layer, x = case.layer, case.x
    with pytest.raises(ValueError, match=r"x has shape \[2, 12, 15\], wants \[B, T, 16\]"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match="segment_ids is float32.*positions has shape"):
        layer(x, segment_ids=jnp.zeros((B, T)), positions=jnp.zeros((B, T + 1), int))
    with pytest.raises(ValueError, match="lengths"):
        layer.prefill(x, layer.init_cache(B, T), lengths=jnp.zeros((B + 1,), int))
    with pytest.raises(ValueError, match="max_length=0"):
        layer.init_cache(B, 0)


@pytest.mark.parametrize("name", LINEAR_LAYERS)
def test_linear_caches_do_not_grow(name):
    layer = LINEAR_LAYERS[name](D, num_heads=2, head_dim=4, rngs=nnx.Rngs(0))
    shapes = [jax.tree.map(jnp.shape, layer.init_cache(B, n)) for n in (1, 100000)]
    assert shapes[0] == shapes[1]
