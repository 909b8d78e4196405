"""Which parameter gets which update, decay and rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineax_seq.training import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
)
from lineax_seq.training._optimizer import check_kinds

PARAMS = {
    "embed": {"embedding": jnp.ones((50, 64))},
    "blocks": {
        "q_proj": {"kernel": jnp.ones((3, 64, 96)), "bias": jnp.ones((3, 96))},
        "conv": {"kernel": jnp.ones((3, 64, 64))},
        "beta_proj": {"kernel": jnp.ones((3, 64, 4))},
        "norm": {"scale": jnp.ones((3, 64))},
        "A_log": jnp.ones((3, 64)),
        "dt_bias": jnp.ones((3, 64)),
    },
    "final": {"o_proj": {"kernel": jnp.ones((96, 64))}},
    "lm_head": {"kernel": jnp.ones((64, 50))},
}
KINDS = {
    "embed": {"embedding": "embedding"},
    "blocks": {
        "q_proj": {"kernel": "matrix", "bias": "vector"},
        "conv": {"kernel": "convolution"},
        "beta_proj": {"kernel": "gate"},
        "norm": {"scale": "norm"},
        "A_log": "decay",
        "dt_bias": "vector",
    },
    "final": {"o_proj": {"kernel": "matrix"}},
    "lm_head": {"kernel": "head"},
}


def by_kind(tree):
    """(kind, leaf) of every parameter, in order."""
    return zip(jax.tree.leaves(KINDS), jax.tree.leaves(tree), strict=True)


def test_kinds_that_do_not_fit_are_refused():
    check_kinds(KINDS, PARAMS)
    with pytest.raises(ValueError, match="wanted one kind for each parameter"):
        check_kinds({"embed": "embedding"}, PARAMS)
    wrong = KINDS | {"final": {"o_proj": {"kernel": "matrx"}}, "lm_head": {"kernel": 1}}
    with pytest.raises(
        ValueError, match=r"final.o_proj.kernel is 'matrx' .did you mean 'matrix'.*lm_head.kernel is 1;"
    ):
        check_kinds(wrong, PARAMS)


@pytest.mark.parametrize("decay", ["linear", "cosine", "wsd"])
def test_schedule_shape(decay):
    config = OptimizerConfig(learning_rate=2.0, warmup=0.1, decay=decay, final_learning_rate=0.25)
    rates = learning_rate_schedule(config, 200)
    assert rates.dtype == np.float32 and rates.shape == (200,)
    np.testing.assert_allclose(rates[:20], 2.0 * np.arange(1, 21) / 20, rtol=1e-6)
    progress = np.arange(180) / 180
    expected = {
        "linear": 2.0 - 1.5 * progress,
        "cosine": 2.0 * (0.75 * 0.5 * (1 + np.cos(np.pi * progress)) + 0.25),
        "wsd": 2.0 - 1.5 * np.clip((np.arange(180) - 140) / 40, 0, 1),
    }[decay]
    np.testing.assert_allclose(rates[20:], expected, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("decay", ["linear", "cosine", "wsd"])
def test_schedule_of_a_few_steps_is_positive(steps, decay):
    rates = learning_rate_schedule(OptimizerConfig(warmup=0.4, decay=decay), steps)
    assert rates.shape == (steps,) and (rates > 0).all()


@pytest.mark.parametrize(("more", "decayed"), [(False, {"matrix"}), (True, {"matrix", "embedding", "head"})])
def test_adamw_first_update_by_hand(more, decayed):
    """After one step Adam's direction is the sign of the gradient; decay acts on the kinds that are to decay only."""
    config = OptimizerConfig(name="adamw", weight_decay=0.1, clip_norm=None, decay_embeddings=more)
    optimizer = make_optimizer(config, KINDS)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, -2.0), PARAMS)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)
    for kind, update in by_kind(updates):
        np.testing.assert_allclose(update, 0.9 if kind in decayed else 1.0, rtol=1e-5)


def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adam():
    config = OptimizerConfig(name="muon", learning_rate=0.5, adam_learning_rate=0.1, weight_decay=0.0, clip_norm=None)
    optimizer = make_optimizer(config, KINDS)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape) + 3.0, PARAMS)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)
    update, grad = updates["blocks"]["q_proj"]["kernel"], grads["blocks"]["q_proj"]["kernel"]
    for layer in range(3):
        singular = np.linalg.svd(update[layer] / (0.2 * np.sqrt(96)), compute_uv=False)
        assert 0.6 < singular.min() and singular.max() < 1.3
        assert np.vdot(update[layer], grad[layer]) < 0
    for adam in (update for kind, update in by_kind(updates) if kind != "matrix"):
        # Adam's first step is the sign of the gradient; Nesterov adds beta1 * (1 - beta1) / (1 - beta1^2) of it.
        np.testing.assert_allclose(np.abs(adam), 0.1 / 0.5 * (1 + 0.9 * 0.1 / 0.19), rtol=1e-5)


def test_clipping_is_by_the_global_norm():
    params = {"a": {"kernel": jnp.zeros((32, 32))}, "bias": jnp.zeros(7)}
    config = OptimizerConfig(name="adamw", weight_decay=0.0, clip_norm=0.5)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 3.0), params)
    optimizer = make_optimizer(config, {"a": {"kernel": "matrix"}, "bias": "vector"})
    _, state = optimizer.update(grads, optimizer.init(params), params)
    (mu,) = [x.mu for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")]
    norm = np.sqrt(sum(float((m**2).sum()) for m in jax.tree.leaves(mu)))
    np.testing.assert_allclose(norm, 0.5 * (1 - config.beta1), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamw", "adam_learning_rate": 1e-3}, "adam_learning_rate only belongs to name=muon"),
        ({"decay": "linear", "decay_fraction": 0.2}, "decay_fraction only belongs to decay=wsd"),
        ({"decay": "wsd", "decay_fraction": 0.99}, "decay_fraction is 0.99; at most 0.95 fits"),
        ({"learning_rate": 0.0, "warmup": 1.0}, r"learning_rate is 0.0; .*above 0; warmup is 1.0; .*in \[0, 1\)"),
        ({"name": "sgd"}, "one of muon, adamw"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0; it must be a finite number above 0 or None"),
        ({"beta1": 1.5, "eps": -1.0, "weight_decay": float("nan"), "beta2": 1.0}, "weight_decay.*beta1.*beta2.*eps"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"newton_schulz_steps": 2.5, "decay_embeddings": 1}, "decay_embeddings is 1.*newton_schulz_steps is 2.5"),
    ],
)
def test_bad_values_are_refused_all_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)
