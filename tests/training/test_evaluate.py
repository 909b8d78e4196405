"""Means over batches, and the number of steps that a time budget leaves."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lineax_seq.data import ByteTokenizer, Document, PackedSource, WindowSource, eval_batches, tokenize_documents
from lineax_seq.training import Evaluator, Placement, Reading, spread
from lineax_seq.training._run import REPORT_SECONDS, steps_within

TEXTS = ["Fourscore and seven years ago", "née en 1789", "x" * 40]
TOKENS = tokenize_documents([Document(str(n), text) for n, text in enumerate(TEXTS)], ByteTokenizer())


def evaluator(loss):
    placement = Placement(None, {}, optax.identity(), length=16)
    return Evaluator(loss, placement, Reading(2))


def by_position(params, batch, rng):
    """A loss that knows which token it is asked for: nll = params * (target + 1); and how many of them are odd."""
    weights = batch["loss_weights"]
    odd = (batch["targets"] % 2 * weights).sum()
    return ((params * (batch["targets"] + 1) * weights).sum(), weights.sum()), {"odd": (odd, weights.sum())}


@pytest.mark.parametrize(("make", "skipped"), [(WindowSource, 1), (PackedSource, len(TEXTS))])
def test_every_token_is_predicted_once(make, skipped):
    source = make(TOKENS, 16)
    evaluate = evaluator(lambda params, batch, rng: ((params, batch["loss_weights"].sum()), {}))
    loss, _ = evaluate(jnp.float32(1.0), batches := eval_batches(source, 3))
    # One in sum for every batch, over all targets.
    assert loss == pytest.approx(len(batches) / source.num_targets)
    assert source.num_targets == TOKENS.num_tokens - skipped


def test_sums_are_over_tokens_not_over_batches():
    batches = eval_batches(WindowSource(TOKENS, 16), 2)
    evaluate = evaluator(by_position)
    loss, metrics = evaluate(jnp.float32(0.5), batches)
    targets = TOKENS.ids[1:].astype(float)
    np.testing.assert_allclose(loss, 0.5 * (targets + 1).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["odd"], (targets % 2).mean(), rtol=1e-6)
    assert evaluate._sums._cache_size() == 1


def test_nothing_to_predict_is_refused():
    batch = {"targets": np.zeros((1, 4), np.int32), "loss_weights": np.zeros((1, 4), np.float32)}
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluator(by_position)(jnp.float32(1), [batch])
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluator(by_position)(jnp.float32(1), [])


def test_spread_takes_both_ends():
    assert spread(range(100), 4) == [0, 33, 66, 99]
    assert spread(range(3), 10) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 1"):
        spread(range(3), 0)


def test_steps_that_fit_a_time_budget():
    budget = dict(spent=20.0, step_seconds=2.0, batch_seconds=0.5, batches_per_step=0.4, batches_at_end=60)
    # 20 s spent, 30 s for evaluation at the end, 2.2 s for a step with its share of evaluations.
    assert steps_within(50.0 + REPORT_SECONDS + 220.1, **budget, at_most=1000) == 100
    assert steps_within(50.0 + REPORT_SECONDS + 220.1, **budget, at_most=7) == 7
    with pytest.raises(ValueError, match="too few for a step.*a step 2.2"):
        steps_within(50.0 + REPORT_SECONDS, **budget, at_most=1000)
