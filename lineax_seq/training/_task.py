"""What training knows of what is trained: the `Task`.

A task says what the parameters are, what their loss on a batch is and where batches come from. Everything else that a
run does is the same for all tasks; what a task may add has a default here. This one fits a line:

    class Line(Task):
        name = "line"

        def init(self, key):
            return {"slope": jnp.zeros(()), "height": jnp.zeros(())}

        def loss(self, params, batch, key, axis_name=None):
            error = params["slope"] * batch["x"] + params["height"] - (2 * batch["x"] + 1)
            return (jnp.sum(error**2), jnp.float32(error.size)), {}

        def batches(self, seed, reading):
            x = grain.MapDataset.range(256).shuffle(seed).map(lambda n: {"x": np.float32(n / 256)})
            return iter(x.repeat().batch(reading.batch_size).to_iter_dataset())

    config = RunConfig(optimizer=OptimizerConfig(learning_rate=0.2), training=TrainingConfig(steps=50))
    result = Run(config, Line()).train()
"""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax

if TYPE_CHECKING:
    from ._run import Run

PyTree = Any
Batch = Mapping[str, Any]  # of arrays [B, ...], on the host or on devices
Sums = tuple[jax.Array, jax.Array]  # sum of weight * loss, sum of weights: float32 scalars
Metrics = Mapping[str, Sums]  # each metric likewise


class Reading(NamedTuple):
    """Which part of every batch this process reads: the arguments of `lineax_seq.data.train_iterator` of these names.

    `batch_size` rows: the share of process `process_index` of the `process_count` that read a batch together.
    Of each row the stretch `columns`; None: all of it.
    """

    batch_size: int
    process_index: int = 0
    process_count: int = 1
    columns: slice | None = None


class BatchIterator(Protocol):
    """What Grain's iterators are: endless batches, and a position that JSON holds."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class Measure(Protocol):
    """The task's loss over given batches: (its mean, the mean of every metric); `reading` is how to read them."""

    reading: Reading

    def __call__(self, params: PyTree, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]: ...


class Task(abc.ABC):
    """What is trained. `init`, `loss` and `batches` must be given, the rest may be.

    Attributes:
      name: of the run's folder, where the configuration gives none.
      row_length: T of batches whose arrays are all [B, T]; None: of other shapes, which no mesh can split.
      evaluation_rows: how many rows an evaluation on everything reads, for the time that a run has to keep for it.
    """

    name: str = "run"
    row_length: int | None = None
    evaluation_rows: int = 0

    @abc.abstractmethod
    def init(self, key: jax.Array) -> PyTree:
        """New parameters: nested dictionaries of arrays."""

    @abc.abstractmethod
    def loss(self, params: PyTree, batch: Batch, key: jax.Array, axis_name: str | None = None) -> tuple[Sums, Metrics]:
        """`((sum of weight * loss, sum of weights), {metric: (sum of weight * value, sum of weights)})`.

        Sums, so that a mean never depends on how a batch was cut into microbatches, shards and processes. `axis_name`
        is the mesh axis that the rows' tokens are split over: the batch is then one shard, and so are the sums.
        """

    @abc.abstractmethod
    def batches(self, seed: int, reading: Reading) -> BatchIterator:
        """Endless training batches in an order that `seed` decides; one made anew goes on from any saved position."""

    def kinds(self) -> PyTree:
        """The kind of every parameter, one of `KINDS`: what the optimizer does with it. Default: arrays of at least
        two axes are matrices, the others vectors."""
        params = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree.map(lambda x: "matrix" if x.ndim >= 2 else "vector", params)

    def trainable(self, path: str) -> bool:
        """Whether the parameter at `path`, such as "embed.embedding", changes. One that does not has neither gradient
        nor optimizer state."""
        return True

    def evaluate(self, params: PyTree, measure: Measure, rows: int | None = None) -> dict[str, float]:
        """Numbers about the parameters, from some `rows` of the data that is not trained on; None: from all of it."""
        return {}

    def report(self, run: "Run", params: PyTree, found: dict[str, float]) -> dict[str, Any]:
        """Write what a finished run leaves to look at, and return what results.json holds beside steps and times.

        Every process calls it; one, `parallel.is_main()`, writes to `run.path`. `found` is the last `evaluate`.
        """
        return dict(found)

    def identity(self) -> dict[str, Any]:
        """What tells the data apart from other data of the same configuration, as JSON: a run goes on with the same."""
        return {}

    def save(self, directory: Path) -> None:
        """Write what the run directory must hold beside its configuration for others to use the parameters."""
        return

    def describe(self, steps: int) -> str:
        """What a run of `steps` says of the task in its first line."""
        return self.name
