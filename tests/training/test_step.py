"""One update: accumulation, metrics, donation, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import stand_in

from lineax_seq.training import init_state, make_optimizer, make_train_step, state_leaf_names
from lineax_seq.training._step import split_batch, trained_part


def batch():
    return next(stand_in.iterator())


def new_state():
    return init_state(stand_in.init_params(), stand_in.TRANSFORM, seed=0)


def test_accumulated_microbatches_equal_the_big_batch():
    """Rows differ in their number of weighted tokens, so a mean of microbatch means would be another number."""
    one = make_train_step(stand_in.loss, stand_in.TRANSFORM)
    four = make_train_step(stand_in.loss, stand_in.TRANSFORM, microbatches=4)
    weights = batch()["loss_weights"].sum(1)
    assert len(set(weights.tolist())) > 1
    a, metrics_a = one(new_state(), batch(), np.float32(0.1))
    b, metrics_b = four(new_state(), batch(), np.float32(0.1))
    assert metrics_a["tokens"] == metrics_b["tokens"] == weights.sum()
    for name in ("loss", "grad_norm", "update_norm", "param_norm", "accuracy"):
        np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=1e-5, err_msg=name)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_metrics_by_hand():
    state = new_state()
    before = jax.tree.map(np.asarray, state.params)
    (nll, weight), own = stand_in.loss(before, batch(), None)
    grads = jax.jit(jax.grad(lambda p: stand_in.loss(p, batch(), None)[0][0] / weight))(before)
    state, metrics = stand_in.STEP(state, batch(), np.float32(0.1))
    norm = lambda tree: np.sqrt(sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree)))  # noqa: E731
    expected = {
        "loss": nll / weight,
        "accuracy": own["accuracy"][0] / weight,
        "grad_norm": norm(grads),
        "param_norm": norm(state.params),
        "update_norm": norm(jax.tree.map(lambda a, b: a - b, state.params, before)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert int(state.step) == 1 and not metrics["nonfinite"].any()


def test_one_compilation_and_the_old_state_is_donated():
    step = make_train_step(stand_in.loss, stand_in.TRANSFORM)
    first = new_state()
    second, _ = step(first, batch(), np.float32(0.1))
    step(second, batch(), np.float32(0.2))
    assert step._cache_size() == 1
    assert first.params["lm_head"]["kernel"].is_deleted()


@pytest.mark.parametrize("where", ["parameter", "gradient"])
def test_first_bad_leaf_is_flagged(where):
    state = new_state()
    names = state_leaf_names(state.params)
    if where == "parameter":
        kernel = state.params["layers"]["kernel"].at[1, 2, 3].set(jnp.inf)
        state.params["layers"]["kernel"] = kernel
        step, wanted = stand_in.STEP, "parameter layers.kernel"
    else:

        def loss(params, batch, rng):  # finite value, infinite slope at 0
            (nll, weight), own = stand_in.loss(params, batch, rng)
            return (nll + jnp.sqrt(jnp.abs(params["lm_head"]["kernel"][0, 0]) * 0), weight), own

        step, wanted = make_train_step(loss, stand_in.TRANSFORM), "gradient of lm_head.kernel"
    _, metrics = step(state, batch(), np.float32(0.1))
    assert names[int(metrics["nonfinite"].argmax())] == wanted


def test_rows_must_divide_into_microbatches():
    with pytest.raises(ValueError, match="4 rows.*3 microbatches"):
        split_batch(batch(), 3)
    with pytest.raises(ValueError, match="at least 1"):
        make_train_step(stand_in.loss, stand_in.TRANSFORM, microbatches=0)


def test_frozen_parameters_have_no_gradient_no_optimizer_state_and_do_not_change():
    params = stand_in.init_params()
    trainable = jax.tree.map(lambda _: False, params) | {"lm_head": {"kernel": True}}
    optimizer = make_optimizer(stand_in.OPTIMIZER, trained_part(stand_in.KINDS, trainable))
    step = make_train_step(stand_in.loss, optimizer, microbatches=2, trainable=trainable)
    state = init_state(params, optimizer, 0, trainable)
    head, before = params["lm_head"]["kernel"], jax.tree.map(np.asarray, params)
    sizes = {x.shape for x in jax.tree.leaves(state.opt_state)}
    assert head.shape in sizes
    assert not sizes & {params["embed"]["embedding"].shape, params["layers"]["kernel"].shape}

    # The gradients are what the scan over microbatches carries: the two sums, those of the accuracy, and one array.
    (scan,) = [
        e for e in jax.make_jaxpr(step)(state, batch(), 0.1).eqns[0].params["jaxpr"].eqns if e.primitive.name == "scan"
    ]
    carried = [v.aval.shape for v in scan.outvars]
    assert sorted(carried) == sorted([(), (), (), (), head.shape])

    after, metrics = step(state, batch(), np.float32(0.1))
    for name in ("embed", "layers"):
        jax.tree.map(np.testing.assert_array_equal, after.params[name], before[name])
    assert not np.array_equal(after.params["lm_head"]["kernel"], before["lm_head"]["kernel"])
    assert len(metrics["nonfinite"]) == len(state_leaf_names(params, trainable)) == 4 + 1 + 1

    def head_only(head):
        (nll, weight), _ = stand_in.loss(before | {"lm_head": {"kernel": head}}, batch(), None)
        return nll / weight

    gradient = jax.grad(head_only)(before["lm_head"]["kernel"])
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
