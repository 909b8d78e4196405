"""Every law of a task finds the task that breaks it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineax_seq.testing import check_task, task_laws


class Reading(NamedTuple):
    batch_size: int
    process_index: int = 0
    process_count: int = 1


class Batches:
    """Rows of x, drawn anew for every batch."""

    def __init__(self, seed, reading):
        self.seed, self.reading, self.step = seed, reading, 0

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng((self.seed, self.step))
        self.step += 1
        rows = self.reading.batch_size
        whole = rng.random((rows * self.reading.process_count, 2), np.float32)
        return {"x": whole[rows * self.reading.process_index :][:rows]}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


class Line:
    """Fits y = 2 x_0 + 1 where x_1 < 1/2."""

    def init(self, key):
        return {"slope": jax.random.normal(key, ()), "height": jnp.zeros(())}

    def kinds(self):
        return {"slope": "vector", "height": "vector"}

    def trainable(self, path):
        return path == "slope"

    def batches(self, seed, reading):
        return Batches(seed, reading)

    def loss(self, params, batch, key):
        x, weight = batch["x"][:, 0], (batch["x"][:, 1] < 0.5).astype(jnp.float32)
        error = params["slope"] * x + params["height"] - (2 * x + 1)
        return (jnp.sum(weight * error**2), jnp.sum(weight)), {"error": (jnp.sum(jnp.abs(error)), jnp.float32(x.size))}


class DrawsItsOwnParameters(Line):
    def init(self, key):
        return {**super().init(key), "height": jnp.asarray(np.random.random())}


class KindOfOne(Line):
    def kinds(self):
        return {"slope": "vector"}


class Mean(Line):
    def loss(self, params, batch, key):
        (total, weight), metrics = super().loss(params, batch, key)
        return (total / weight, weight), metrics


class MetricMean(Line):
    def loss(self, params, batch, key):
        sums, metrics = super().loss(params, batch, key)
        return sums, {"error": (metrics["error"][0] / metrics["error"][1], metrics["error"][1])}


class Infinite(Line):
    def loss(self, params, batch, key):
        (total, weight), metrics = super().loss(params, batch, key)
        return (total + jnp.sqrt(0 * params["slope"]), weight), metrics


class Frozen(Line):
    def trainable(self, path):
        return False


class SeedIgnored(Line):
    def batches(self, seed, reading):
        return Batches(0, reading)


class ForgetsThePlace(Line):
    def batches(self, seed, reading):
        batches = Batches(seed, reading)
        batches.set_state = lambda state: None
        return batches


class PlaceInAnArray(Line):
    def batches(self, seed, reading):
        batches = Batches(seed, reading)
        batches.get_state = lambda: {"step": np.int64(2)}
        return batches


class AllReadTheSame(Line):
    def batches(self, seed, reading):
        return Batches(seed, reading._replace(process_index=0))


BROKEN = {
    "parameters": (DrawsItsOwnParameters, "a key decides the parameters", "height"),
    "kinds": (KindOfOne, "a key decides the parameters", "(?i)struct"),
    "mean": (Mean, "the loss is a sum over rows", r"two halves added against the whole \[0\]\[0\]"),
    "metric": (MetricMean, "the loss is a sum over rows", r"\[1\]\['error'\]\[0\]"),
    "infinite": (Infinite, "gradients are finite", "Nonfinite"),
    "frozen": (Frozen, "gradients are finite", r"none of the parameters \['height', 'slope'\] is trainable"),
    "seed": (SeedIgnored, "a seed decides the batches", "another seed gives the same batches"),
    "place": (ForgetsThePlace, "batches go on from a position", "x"),
    "place in JSON": (PlaceInAnArray, "batches go on from a position", "which JSON does not"),
    "processes": (AllReadTheSame, "processes share a batch", "other rows than one"),
}


def test_a_right_task_obeys_all_laws():
    check_task(Line(), Reading(8))


@pytest.mark.parametrize(("kind", "law", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_task_is_found(kind, law, message):
    with pytest.raises(AssertionError, match=message) as error:
        check_task(kind(), Reading(8), laws=[law])
    assert f"{kind.__name__} breaks 1 of 1 laws.\nlaw {law!r} is broken" in str(error.value)


def test_every_law_has_a_task_that_breaks_it():
    assert {law for _, law, _ in BROKEN.values()} == set(task_laws(Line(), Reading(8)))


def test_readings_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match="batch_size=3 rows for 1 processes, wants an even number for one"):
        task_laws(Line(), Reading(3))
