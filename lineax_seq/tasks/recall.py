"""Multi-query associative recall: pairs of keys and values, then keys again, whose values the model must give.

    k1 v1 k2 v2 ... kn vn  .  .  k2  .  k1  ...        at a key of the second part the target is its value

A state of fixed size can hold only so many pairs, so the accuracy over the number of pairs is what tells recurrences
apart. Rows are computed from their index: training never sees a row twice.

Source: Arora et al. 2023, arXiv:2312.04927, section 4 (MQAR).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from .. import parallel
from ..core.fields import Within, check_fields
from ..training import Batch, Measure, Reading, Run, RunConfig, draw, series, training_loss
from ._decoder import DecoderTask, HybridConfig

Count = Annotated[int, Within("[1, inf)")]
TRAINING_ROWS = 2**40  # more than any run reads
HELD_OUT = 0  # of the seeds of rows; those of training are above it


@dataclass(frozen=True)
class RecallData:
    """Rows of the recall task."""

    length: Count = 64
    """Tokens in a row; at least 4 for each pair."""
    vocabulary: Annotated[int, Within("[4, inf)")] = 64
    """Ids: half of them, but for the filler 0, are keys, the other half values."""
    pairs: tuple[int, ...] = (4, 8, 16)
    """Numbers of pairs that rows have, in training as often each; every one of them is evaluated by itself."""
    power: Annotated[float, Within("[0, 1]")] = 0.01
    """Queries come the sooner the smaller it is: a gap g is drawn with probability proportional to g^(power - 1)."""
    heldout_rows: Count = 256
    """Rows of each number of pairs in an evaluation of everything."""

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "pairs", tuple(self.pairs))
        most = min(self.length // 4, self.vocabulary // 2 - 1)
        wrong = [n for n in self.pairs if type(n) is not int or not 1 <= n <= most]
        if wrong or not self.pairs:
            raise ValueError(
                f"RecallData: pairs is {self.pairs}; rows of {self.length} tokens of {self.vocabulary} ids hold 1 to "
                f"{most} pairs, and there must be a number of them"
            )


@dataclass(frozen=True, kw_only=True)
class RecallConfig(RunConfig):
    """A run that trains a decoder on associative recall."""

    model: HybridConfig
    data: RecallData = field(default_factory=RecallData)
    freeze: str | None = None
    """Parameters that keep their first values, as a shell pattern of names such as "embed.*"; None: all are trained."""

    def __post_init__(self):
        super().__post_init__()
        self.check_row_length("length", self.data.length)
        if self.model.vocab_size != self.data.vocabulary:
            raise ValueError(
                f"RecallConfig: model.vocab_size is {self.model.vocab_size} and data.vocabulary "
                f"{self.data.vocabulary}; make them equal"
            )


def recall_row(data: RecallData, pairs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A row with `pairs` pairs: `inputs`, `targets` int32 [T] and `loss_weights` float32 [T], 1 at the queries."""
    half = data.vocabulary // 2
    keys = 1 + rng.choice(half - 1, pairs, replace=False)
    values = half + rng.choice(data.vocabulary - half, pairs, replace=False)
    places = (data.length - 2 * pairs) // 2  # of queries, two tokens apart
    likely = np.arange(1, places + 1) ** (data.power - 1.0)
    where = 2 * pairs + 2 * rng.choice(places, pairs, replace=False, p=likely / likely.sum())
    inputs, targets = np.zeros((2, data.length), np.int32)
    inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2] = keys, values
    inputs[where], targets[where] = keys, values
    weights = np.zeros(data.length, np.float32)
    weights[where] = 1
    return {"inputs": inputs, "targets": targets, "loss_weights": weights}


class _Rows:
    """Training rows by index, those of one process out of `count`."""

    def __init__(self, data: RecallData, seed: int, reading: Reading):
        self._data, self._seed, self._reading = data, seed, reading

    def __len__(self) -> int:
        return TRAINING_ROWS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number = index * self._reading.process_count + self._reading.process_index
        rng = np.random.default_rng((1 + self._seed, number))
        row = recall_row(self._data, int(rng.choice(self._data.pairs)), rng)
        return _stretch(row, self._reading.columns)


def _stretch(row: dict[str, np.ndarray], columns: slice | None) -> dict[str, np.ndarray]:
    return row if columns is None else {name: value[columns] for name, value in row.items()}


class RecallTask(DecoderTask):
    """The value of every key that is asked for."""

    def __init__(self, config: RecallConfig):
        super().__init__(config.model, config.freeze)
        self.config, self.data, self.row_length = config, config.data, config.data.length
        layer = f"-{config.model.linear_layer}" if "L" in config.model.pattern else ""
        self.name = f"recall-{''.join(config.model.pattern)}{layer}"
        self.evaluation_rows = len(self.data.pairs) * self.data.heldout_rows

    def loss(self, params, batch, key, axis_name=None):
        logits = self.model(params)(batch["inputs"], axis_name=axis_name)
        right = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        weights = batch["loss_weights"]
        nll, count = jnp.sum((jax.nn.logsumexp(logits, -1) - right) * weights), jnp.sum(weights)
        correct = jnp.sum((jnp.argmax(logits, -1) == batch["targets"]) * weights)
        return (nll, count), {"accuracy": (correct, count)}

    def batches(self, seed: int, reading: Reading):
        rows = grain.MapDataset.source(_Rows(self.data, seed, reading)).batch(reading.batch_size)
        return iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def evaluate(self, params, measure: Measure, rows: int | None = None) -> dict[str, float]:
        rows = self.data.heldout_rows if rows is None else -(-min(rows, self.evaluation_rows) // len(self.data.pairs))
        found = {}
        for pairs in self.data.pairs:
            _, metrics = measure(params, list(self._heldout(pairs, rows, measure.reading)))
            found[f"eval_accuracy_{pairs}"] = metrics["accuracy"]
        return {"eval_accuracy": float(np.mean(list(found.values())))} | found

    def report(self, run: Run, params, found: dict[str, float]) -> dict[str, Any]:
        if parallel.is_main():
            plot_accuracy(run.path, self.data.pairs)
        return {"accuracy": {str(n): found[f"eval_accuracy_{n}"] for n in self.data.pairs}}

    def describe(self, steps: int) -> str:
        model = self.config.model
        return (
            f"pattern {model.pattern} of {model.linear_layer} (L) and softmax attention (N); recall of "
            f"{', '.join(map(str, self.data.pairs))} pairs in {self.data.length} tokens"
        )

    def _heldout(self, pairs: int, rows: int, reading: Reading) -> Iterator[Batch]:
        """Batches of at least `rows` rows with `pairs` pairs, this process's part of each."""
        size = reading.batch_size * reading.process_count
        for first in range(0, rows, size):
            mine = range(first + reading.process_index * reading.batch_size, first + size)[: reading.batch_size]
            made = [recall_row(self.data, pairs, np.random.default_rng((HELD_OUT, pairs, number))) for number in mine]
            cut = [_stretch(row, reading.columns) for row in made]
            yield {name: np.stack([row[name] for row in cut]) for name in cut[0]}


def plot_accuracy(directory: str | Path, pairs: Sequence[int]) -> Path:
    """Draw `directory`/recall.png from its metrics: training loss, accuracy over steps, accuracy over pairs."""
    directory = Path(directory)
    curves = {n: series(directory, f"eval_accuracy_{n}") for n in pairs}

    def over_steps(axes) -> None:
        for n, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{n} pairs")
        axes.set(xlabel="step", ylabel="accuracy on unseen rows", ylim=(-0.02, 1.02))
        axes.legend()

    def over_pairs(axes) -> None:
        axes.plot(pairs, [points[-1][1] for points in curves.values()], marker="o")
        axes.set(xlabel="pairs to remember", ylabel="accuracy at the end", ylim=(-0.02, 1.02), xticks=list(pairs))

    return draw(directory / "recall.png", [training_loss(directory, "nats per query"), over_steps, over_pairs])
