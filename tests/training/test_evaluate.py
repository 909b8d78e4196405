"""Bits per byte, the report's plot and table, the number of steps that a time budget leaves."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lineax_seq.data import ByteTokenizer, Document, PackedSource, WindowSource, eval_batches, tokenize_documents
from lineax_seq.training import Evaluator, bits_per_byte, comparison_table, plot_loss
from lineax_seq.training._evaluate import spread
from lineax_seq.training._language_model import REPORT_SECONDS, steps_within

TEXTS = ["Fourscore and seven years ago", "née en 1789", "x" * 40]
TOKENS = tokenize_documents([Document(str(n), text) for n, text in enumerate(TEXTS)], ByteTokenizer())


def by_position(params, batch, rng):
    """A loss that knows which token it is asked for: nll = params * (target + 1)."""
    return (params * (batch["targets"] + 1) * batch["loss_weights"]).sum(), batch["loss_weights"].sum()


@pytest.mark.parametrize(("make", "skipped"), [(WindowSource, 1), (PackedSource, len(TEXTS))])
def test_every_token_is_predicted_once(make, skipped):
    source = make(TOKENS, 16)
    # 1 nat for every target, wherever rows and batches end.
    evaluate = Evaluator(
        lambda params, batch, rng: (params * batch["loss_weights"].sum(), batch["loss_weights"].sum()),
        bytes_per_target=TOKENS.num_bytes / source.num_targets,
    )
    found = evaluate(jnp.float32(1.0), eval_batches(source, 3))
    assert source.num_targets == TOKENS.num_tokens - skipped
    assert found["eval_loss"] == pytest.approx(1.0)
    assert found["eval_bits_per_byte"] == pytest.approx(source.num_targets / math.log(2) / TOKENS.num_bytes)


def test_sums_are_over_tokens_not_over_batches():
    batches = eval_batches(WindowSource(TOKENS, 16), 2)
    evaluate = Evaluator(by_position, bytes_per_target=1.0)
    found = evaluate(jnp.float32(0.5), batches)
    np.testing.assert_allclose(found["eval_loss"], 0.5 * (TOKENS.ids[1:].astype(float) + 1).mean(), rtol=1e-6)
    assert evaluate._sums._cache_size() == 1


def test_a_uniform_byte_model_has_8_bits_per_byte():
    assert bits_per_byte(nll=1000 * math.log(256), num_bytes=1000) == pytest.approx(8.0)


def test_nothing_to_predict_is_refused():
    batch = {"targets": np.zeros((1, 4), np.int32), "loss_weights": np.zeros((1, 4), np.float32)}
    with pytest.raises(ValueError, match="no token to predict"):
        Evaluator(by_position, bytes_per_target=1.0)(jnp.float32(1), [batch])


def test_spread_takes_both_ends():
    assert spread(range(100), 4) == [0, 33, 66, 99]
    assert spread(range(3), 10) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 1"):
        spread(range(3), 0)


def test_table_is_sorted_and_aligned():
    lines = comparison_table({"ours": 1.9}, {"gzip -9": 2.87, "bzip2 -9": 1.5}).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["bzip2", "ours", "gzip"]
    assert len({len(line) for line in lines}) == 1


def test_plot_needs_metrics_and_is_whole(tmp_path):
    with pytest.raises(ValueError, match="no training metrics"):
        plot_loss(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "eval_bits_per_byte": 3.0}\n')
    assert plot_loss(tmp_path, {"gzip -9": 2.87}).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_steps_that_fit_a_time_budget():
    budget = dict(spent=20.0, step_seconds=2.0, batch_seconds=0.5, batches_per_step=0.4, batches_at_end=60)
    # 20 s spent, 30 s for evaluation at the end, 2.2 s for a step with its share of evaluations.
    assert steps_within(50.0 + REPORT_SECONDS + 220.1, **budget, at_most=1000) == 100
    assert steps_within(50.0 + REPORT_SECONDS + 220.1, **budget, at_most=7) == 7
    with pytest.raises(ValueError, match="too few for a step.*a step 2.2"):
        steps_within(50.0 + REPORT_SECONDS, **budget, at_most=1000)
