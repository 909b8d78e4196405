"""Text: a decoder that predicts the next token, judged in bits per byte of text it has not seen.

bits per byte = (mean nll in nats) / (ln 2 * UTF-8 bytes per predicted token): every token is predicted once, whatever
the tokenizer, so the number compares with a compressor's output size.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from .. import parallel
from ..data import Tokenizer, compression_bits_per_byte, eval_batches, load_tokenizer, train_iterator
from ..models import Decoder, generate
from ..training import (
    Measure,
    Reading,
    Run,
    draw,
    load_params,
    load_run,
    series,
    spread,
    training_loss,
    write_atomically,
)
from ._corpus import heldout_texts, open_corpus, rows
from ._decoder import DecoderTask, abstract_decoder
from ._text_config import TextConfig

PROMPT_TOKENS = 32


class TextTask(DecoderTask):
    """Next tokens of the text that `config` names.

    Raises:
      ValueError: text or tokenizer that cannot be read, or that does not fit the model.
    """

    def __init__(self, config: TextConfig):
        super().__init__(config.model, config.freeze)
        self.config, self.name, self.row_length = config, run_name(config), config.data.context
        with parallel.main_first():
            corpus = open_corpus(config)
        self._corpus, self.tokenizer = corpus, corpus.tokenizer
        self._rows = rows(corpus.train, config.data)
        self._heldout = rows(corpus.heldout, config.data)
        self.evaluation_rows = len(self._heldout)
        self._bytes_per_target = corpus.heldout.num_bytes / self._heldout.num_targets

    def loss(self, params, batch, key, axis_name=None):
        # Rows that are one text each do without segment ids and positions.
        names = () if self.config.data.rows == "windows" else ("segment_ids", "positions")
        given = {name: batch[name] for name in names}
        options = dict(chunk_size=self.config.training.loss_chunk, axis_name=axis_name)
        model = self.model(params)
        return model.loss(batch["inputs"], batch["targets"], batch["loss_weights"], **given, **options), {}

    def batches(self, seed: int, reading: Reading):
        return train_iterator(self._rows, seed=seed, **reading._asdict())

    def evaluate(self, params, measure: Measure, rows: int | None = None) -> dict[str, float]:
        batches = eval_batches(self._heldout, **measure.reading._asdict())
        if rows is not None:
            batches = spread(batches, math.ceil(rows / (measure.reading.batch_size * measure.reading.process_count)))
        loss, _ = measure(params, batches)
        return {"eval_loss": loss, "eval_bits_per_byte": loss / (math.log(2.0) * self._bytes_per_target)}

    def report(self, run: Run, params, found: dict[str, float]) -> dict[str, Any]:
        samples = self._samples(self.model(params), run.resolved["seed"])
        if not parallel.is_main():
            return {}
        compressors = compression_bits_per_byte(heldout_texts(self.config.data))
        plot_loss(run.path, compressors)
        if samples:
            write_atomically(run.path / "samples.txt", samples)
            run.log.note(samples)
        return {"bits_per_byte": found["eval_bits_per_byte"], "compressors": compressors}

    def identity(self) -> dict[str, Any]:
        return {"text": {name: self._corpus.recipe[name] for name in ("source", "heldout_source")}}

    def save(self, directory: Path) -> None:
        self.tokenizer.save(directory / "tokenizer.json")

    def describe(self, steps: int) -> str:
        model, tokens = self.config.model, self._corpus.train.num_tokens
        per_step = self.config.training.batch_size * self.config.data.context
        return (
            f"pattern {model.pattern} of {model.linear_layer} (L) and softmax attention (N); {tokens:,} training "
            f"tokens, {per_step:,} a step, {steps * per_step / tokens:.2f} epochs"
        )

    def _samples(self, model: Decoder, seed: int) -> str:
        """Continuations of the beginnings of held-out documents, spread over them."""
        tokens, wanted = self._corpus.heldout, self.config.training.samples
        documents = spread(range(tokens.num_documents), wanted) if wanted else []
        prompts = [tokens.ids[tokens.offsets[d] : tokens.offsets[d + 1]][:PROMPT_TOKENS].tolist() for d in documents]
        if not prompts:
            return ""
        continuations = generate(
            model,
            prompts,
            max_new_tokens=self.config.training.sample_tokens,
            temperature=0.8,
            top_p=0.95,
            stop_tokens=[self.tokenizer.bos_id],
            seed=seed,
        )
        decode = self.tokenizer.decode
        return "\n".join(
            f"--- held-out text {number}, then the model\n{decode(prompt)} >>>{decode(continuation)}\n"
            for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True), 1)
        )


def load_language_model(run_dir: str | Path, step: int | None = None) -> tuple[Decoder, Tokenizer, int]:
    """Model, tokenizer and step of a run's checkpoint `step` (None: the newest whole one), on the first device.

    Raises:
      ValueError: no such run, or no such checkpoint in it.
    """
    run = load_run(run_dir, TextConfig)
    graphdef, like = abstract_decoder(run.config.model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    step, params = load_params(run.checkpoints, like, step)
    return nnx.merge(graphdef, params), load_tokenizer(run.path / "tokenizer.json"), step


def run_name(config: TextConfig) -> str:
    """DATA-PATTERN-LAYER: runs to be compared get folders of their own."""
    model = config.model
    pattern = model.pattern if isinstance(model.pattern, str) else "-".join(model.pattern)
    layer = f"-{model.linear_layer}" if set(model.layers) != {"softmax_attention"} else ""
    return re.sub(r"[^\w.-]+", "-", f"{Path(config.data.path).stem}-{pattern}{layer}")


def comparison_table(ours: Mapping[str, float], compressors: Mapping[str, float]) -> str:
    """Bits per byte of models and compressors on the same text, best first.

    >>> print(comparison_table({"this model": 1.9}, {"gzip -9": 2.87, "bzip2 -9": 2.05}))
    held-out text  bits per byte
    this model             1.900
    bzip2 -9               2.050
    gzip -9                2.870
    """
    rows = sorted([*ours.items(), *compressors.items()], key=lambda row: row[1])
    width = max(len("held-out text"), *(len(name) for name, _ in rows))
    lines = [f"{'held-out text':<{width}}  {'bits per byte':>13}"]
    return "\n".join(lines + [f"{name:<{width}}  {value:>13.3f}" for name, value in rows])


def plot_loss(directory: str | Path, compressors: Mapping[str, float] | None = None) -> Path:
    """Draw `directory`/loss.png from its metrics.jsonl: training loss, and held-out bits per byte with compressors.

    Raises:
      ValueError: the run has no metrics yet.
    """
    directory = Path(directory)
    held_out = series(directory, "eval_bits_per_byte")

    def bits(axes) -> None:
        if held_out:
            axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="model")
        for number, (name, value) in enumerate((compressors or {}).items()):
            axes.axhline(value, linestyle="--", linewidth=0.9, color=f"C{number + 1}", label=name)
        axes.set(xlabel="step", ylabel="held-out text (bits per byte)")
        if held_out or compressors:
            axes.legend()

    return draw(directory / "loss.png", [training_loss(directory, "nats per token"), bits])
