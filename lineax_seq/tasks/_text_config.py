"""What a run that trains a decoder on text is made of, as frozen records."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ..core.fields import Within, check_fields
from ..models import HybridConfig
from ..training import RunConfig, TrainingConfig

Count = Annotated[int, Within("[1, inf)")]


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
    files: str | None = None
    """Pattern of the files to take from a folder, such as '*.py'; None: all .txt, .jsonl and .parquet files."""
    unreadable: Literal["refuse", "pass"] = "refuse"
    """What is done about files and lines that cannot be read: refuse to begin, or pass over them, counted and said."""
    tokenizer: str = "bpe"
    """bpe (trained on the training text, model.vocab-size ids), bytes (258 ids), or the path of a tokenizer.json."""
    context: Count = 2048
    """Tokens in a row."""
    rows: Literal["windows", "documents", "packed"] = "windows"
    """windows: end to end over the text. documents: so too, none seeing another. packed: whole documents, best fit."""
    cache_dir: str = ".cache/corpora"
    """Folder for tokenised text, which later runs reuse."""

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class TextTrainingConfig(TrainingConfig):
    """Length, batches, evaluation, checkpoints, samples."""

    loss_chunk: Count | None = 256
    """Tokens of each row whose logits exist at a time; None: all."""
    samples: Annotated[int, Within("[0, inf)")] = 4
    """Continuations of held-out text to write at the end."""
    sample_tokens: Count = 128
    """New tokens in each of them."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(RunConfig):
    """A run that trains a decoder on text."""

    model: HybridConfig
    data: DataConfig = field(default_factory=DataConfig)
    training: TextTrainingConfig = field(default_factory=TextTrainingConfig)
    freeze: str | None = None
    """Parameters that keep their first values, as a shell pattern of names such as "embed.*"; None: all are trained."""

    may_differ = RunConfig.may_differ | {"data.cache_dir", "training.samples", "training.sample_tokens"}

    def __post_init__(self):
        super().__post_init__()
        self.check_row_length("context", self.data.context)
