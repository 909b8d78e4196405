"""What every run is made of, as frozen records: optimizer, length and batches, devices, directory."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from .. import parallel
from ..core.fields import Within, check_fields, non_finite
from ._optimizer import OptimizerConfig
from ._run_directory import Resume

Count = Annotated[int, Within("[1, inf)")]


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batches, evaluation, checkpoints."""

    steps: Count = 1000
    """Updates of the parameters."""
    max_seconds: Annotated[float, Within("(0, inf)")] | None = None
    """Seconds for the whole job: a step is timed at the start, and steps is lowered to what fits, once and for all."""
    batch_size: Count = 8
    """Rows in an update, all microbatches together."""
    microbatches: Count = 1
    """Parts of the batch, one after the other: less memory, the same update."""
    seed: Annotated[int, Within("[0, 2147483647]")] | None = 0
    """Of initialisation and data order; None: drawn, and recorded in config.json."""
    eval_every: Count | None = 100
    """Steps between evaluations on eval_rows of the held-out data; None: only the one at the end, on all of it."""
    eval_rows: Count = 16
    """Held-out rows in an evaluation during training, spread over the data."""
    checkpoint_every: Count = 100
    """Steps between checkpoints; the last step and a stop by a signal have one too."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that stay on disk."""
    log_every: Count = 1
    """Steps between records in metrics.jsonl and TensorBoard."""
    stall_seconds: Annotated[float, Within("(0, inf)")] | None = 1800.0
    """Of several processes, one that stands still for so long says what it was doing and ends; None: it waits."""
    profile_steps: str | None = None
    """FIRST:END, such as 10:15: a jax.profiler trace of steps 10 to 14, in the run directory."""

    def __post_init__(self):
        check_fields(self)
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"{type(self).__name__}: batch_size {self.batch_size} does not divide into {self.microbatches} "
                "microbatches; choose a multiple of them"
            )


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a job find each other; a cluster that JAX recognises needs none of this."""

    coordinator: str | None = None
    """HOST:PORT of the first process; None: JAX_COORDINATOR_ADDRESS, if set."""
    processes: int | None = None
    """How many processes form the job; None: JAX_NUM_PROCESSES, if set."""
    process_id: int | None = None
    """Which of them this is, from 0; None: JAX_PROCESS_ID, if set."""
    detect: Literal["auto", "always", "never"] = "auto"
    """Ask the cluster: auto where SLURM, Kubernetes or a TPU pod shows itself, always: any that JAX knows; or never."""

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run of any task. A task with settings of its own derives from this and adds them."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: str | None = None
    """Sizes of the axes data, fsdp, tensor, seq, such as data=2,seq=4, for that many devices; None: one device."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    run_dir: str | None = None
    """Folder of the run; None: one under runs/, named after the task."""
    resume: Resume = "auto"
    """auto: continue the run in run_dir if it has this configuration. must: there is one. never: there is none."""

    # What may change between the start of a run and its continuation: none of it touches the parameters.
    may_differ: ClassVar[frozenset[str]] = (
        frozenset({"run_dir", "resume", "mesh", "distributed"})
        | {
            f"training.{name}"
            for name in (
                "eval_every",
                "eval_rows",
                "checkpoint_every",
                "keep_checkpoints",
                "log_every",
                "profile_steps",
            )
        }
        | {"training.stall_seconds"}
    )

    def __post_init__(self):
        check_fields(self)
        if names := non_finite(self):
            raise ValueError(f"{type(self).__name__}: {', '.join(names)} must be finite")
        if self.mesh is None:
            return
        sizes, training = parallel.parse_mesh(self.mesh), self.training
        rows = sizes["data"] * sizes["fsdp"]
        if training.batch_size % (rows * training.microbatches):
            raise ValueError(
                f"mesh: {self.mesh} wants batches of a multiple of {rows} row shards x {training.microbatches} "
                f"microbatches, batch_size is {training.batch_size}; the next one that fits is "
                f"{-(-training.batch_size // (rows * training.microbatches)) * rows * training.microbatches}"
            )

    def check_row_length(self, name: str, length: int) -> None:
        """Refuse rows of `length` tokens, the field `name`, that the mesh does not divide."""
        shards = 1 if self.mesh is None else parallel.parse_mesh(self.mesh)["seq"]
        if length % shards:
            raise ValueError(
                f"mesh: {self.mesh} splits rows over {shards} devices, {name} is {length}; the next one that fits is "
                f"{-(-length // shards) * shards}"
            )
