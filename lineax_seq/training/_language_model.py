"""The main job: a decoder trained on text, from files to a run directory with checkpoints, plot and samples.

job = LanguageModelRun(config)      # what can be refused is refused here, before anything is computed
result = job.train()                # None if a signal ended it: everything is saved, the same again continues
"""

import dataclasses
import json
import math
import re
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from .. import parallel
from ..data import compression_bits_per_byte, eval_batches, train_iterator
from ..models import Decoder, generate
from ._checkpoint import Checkpoints, latest_step
from ._config import MAY_DIFFER, LanguageModelConfig
from ._decoder import decoder_loss, init_params
from ._evaluate import Evaluator, spread
from ._loop import Profile, seconds_per_step, train
from ._metrics import RunLog
from ._optimizer import learning_rate_schedule, make_optimizer
from ._placement import Placement
from ._report import plot_loss
from ._run_directory import open_run, write_atomically
from ._step import TrainState, make_train_step
from ._text import heldout_texts, open_corpus, rows

PyTree = Any

PROMPT_TOKENS = 32
REPORT_SECONDS = 30.0  # kept free of max_seconds: samples and their compilation, compressors, plot


@dataclass(frozen=True)
class Result:
    """What a finished run measured; also in its results.json. Seconds are of the last process that worked on it."""

    steps: int
    parameters: int
    bits_per_byte: float
    compressors: dict[str, float]
    tokens_per_second: float
    seconds: float


class LanguageModelRun:
    """A run in its directory, ready to train from the start or from its newest checkpoint.

    `begin` is the `time.monotonic()` from which `max_seconds` counts; None: now. Over several processes, each makes
    one with the same configuration, after `parallel.initialize`.

    Raises:
      ValueError: a configuration that does not fit the text, the model, the time or the run directory. A new run
        leaves nothing on disk then.
    """

    def __init__(self, config: LanguageModelConfig, *, begin: float | None = None):
        self._begin = time.monotonic() if begin is None else begin
        self.config = config
        self.stopped_by: signal.Signals | None = None
        mesh = None if config.mesh is None else parallel.make_mesh(config.mesh)
        with parallel.main_first():
            corpus = open_corpus(config)
        self._rows = rows(corpus.train, config.data)
        self._heldout_rows = rows(corpus.heldout, config.data)
        self._corpus, self.tokenizer = corpus, corpus.tokenizer
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config.model, rngs=nnx.Rngs(0))))
        self.parameters = sum(x.size for x in jax.tree.leaves(params))

        training, length = config.training, config.data.context
        batch, shards = min(training.batch_size // training.microbatches, training.eval_rows), parallel.row_shards(mesh)
        batch = -(-batch // shards) * shards
        self._optimizer = make_optimizer(config.optimizer)
        self._placement = placement = Placement(
            mesh, nnx.to_pure_dict(params), self._optimizer, batches=(training.batch_size, batch), length=length
        )
        loss = placement.loss(
            decoder_loss(
                graphdef,
                segments=config.data.rows != "windows",
                chunk_size=training.loss_chunk,
                axis_name=placement.time_axis,
            )
        )
        self._step = make_train_step(
            loss, self._optimizer, microbatches=training.microbatches, shardings=placement.shardings
        )
        self._evaluate = Evaluator(
            loss,
            bytes_per_target=corpus.heldout.num_bytes / self._heldout_rows.num_targets,
            place=placement.batch,
        )
        self._heldout = eval_batches(self._heldout_rows, **placement.reading(batch))
        self._some_heldout = spread(self._heldout, math.ceil(training.eval_rows / batch))

        directory = config.run_dir or default_run_directory(config)
        self.run = open_run(
            directory,
            config,
            resolve=lambda: parallel.broadcast(self._resolve()),
            resume=config.resume,
            may_differ=MAY_DIFFER,
            writes=parallel.is_main(),
        )
        if self.run.resolved["text"] != self._text():
            raise ValueError(
                f"{self.run.path}: the text under {config.data.path!r} has changed since this run began; bring it "
                "back to continue, or choose another run directory"
            )
        self.run.resolve()
        if parallel.is_main():
            self.tokenizer.save(self.run.path / "tokenizer.json")
        self._profile = None
        if config.training.profile_steps is not None:
            start, steps = latest_step(self.run.checkpoints) or 0, self.run.resolved["steps"]
            folder = self.run.path / "profile"
            self._profile = Profile.parse(config.training.profile_steps, folder, start=start, steps=steps)

    def train(self) -> Result | None:
        """Train to the last step and report; None if a signal (`stopped_by`) ended it, with everything saved.

        Raises:
          NonFiniteError: see `train`; the last good checkpoint stays.
        """
        training, seed, steps = self.config.training, self.run.resolved["seed"], self.run.resolved["steps"]
        state = self._new_state(seed)
        batches = train_iterator(self._rows, seed=seed, **self._placement.reading(training.batch_size))
        with Checkpoints(
            self.run.checkpoints, every=training.checkpoint_every, keep=training.keep_checkpoints
        ) as checkpoints:
            if checkpoints.latest is not None:
                state = checkpoints.restore(state, batches)
            start = int(state.step)
            if start == steps and (found := self.run.path / "results.json").exists():
                return Result(**json.loads(found.read_text(encoding="utf-8")))
            shown = dict(log_every=training.log_every, enabled=parallel.is_main())
            with RunLog(self.run.path, steps=steps, start=start, **shown) as log:
                log.note(self._introduction(start, steps))
                state, self.stopped_by = train(
                    state,
                    self._step,
                    batches,
                    learning_rates=learning_rate_schedule(self.config.optimizer, steps),
                    log=log,
                    checkpoints=checkpoints,
                    evaluate=lambda params: self._evaluate(params, self._some_heldout),
                    eval_every=training.eval_every,
                    profile=self._profile,
                    place=self._placement.batch,
                )
                if self.stopped_by is not None:
                    return None
                return self._report(state.params, steps, log)

    def _report(self, params, steps: int, log: RunLog) -> Result:
        """Evaluate on all held-out text, draw samples, compress it, plot, and write results.json last."""
        log.note(f"evaluating on all {self._corpus.heldout.num_bytes:,} bytes of held-out text")
        found = self._evaluate(params, self._heldout)
        log.record(steps, found)
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(self.config.model, rngs=nnx.Rngs(0))))
        samples = self._samples(nnx.merge(graphdef, params))
        result = self._written(samples, steps, found, log) if parallel.is_main() else None
        return Result(**parallel.broadcast(result and dataclasses.asdict(result)))

    def _written(self, samples: str, steps: int, found: dict[str, float], log: RunLog) -> Result:
        compressors = compression_bits_per_byte(heldout_texts(self.config.data))
        plot_loss(self.run.path, compressors)
        if samples:
            write_atomically(self.run.path / "samples.txt", samples)
            log.note(samples)
        result = Result(
            steps=steps,
            parameters=self.parameters,
            bits_per_byte=found["eval_bits_per_byte"],
            compressors=compressors,
            tokens_per_second=log.tokens_per_second,
            seconds=time.monotonic() - self._begin,
        )
        write_atomically(self.run.path / "results.json", json.dumps(dataclasses.asdict(result), indent=2) + "\n")
        return result

    def _samples(self, model: Decoder) -> str:
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
            seed=self.run.resolved["seed"],
        )
        decode = self.tokenizer.decode
        return "\n".join(
            f"--- held-out text {number}, then the model\n{decode(prompt)} >>>{decode(continuation)}\n"
            for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True), 1)
        )

    def _new_state(self, seed: int) -> TrainState:
        return self._placement.new_state(init_params(self.config.model, seed), self._optimizer, seed)

    def _text(self) -> dict[str, Any]:
        return {name: self._corpus.recipe[name] for name in ("source", "heldout_source")}

    def _resolve(self) -> dict[str, Any]:
        """What a new run settles once and for all."""
        training = self.config.training
        return {
            "seed": secrets.randbits(31) if training.seed is None else training.seed,
            "steps": training.steps if training.max_seconds is None else self._steps_in_time(training.max_seconds),
            "text": self._text(),
        }

    def _steps_in_time(self, max_seconds: float) -> int:
        """The steps asked for, or as many as `max_seconds` leaves time for."""
        training, state = self.config.training, self._new_state(0)
        batch = eval_batches(self._rows, **self._placement.reading(training.batch_size))[0]
        step_seconds = seconds_per_step(self._step, state, self._placement.batch(batch))
        self._evaluate(state.params, self._some_heldout[:1])  # compiles
        begin = time.monotonic()
        self._evaluate(state.params, self._some_heldout[:1])
        end = time.monotonic()
        return steps_within(
            max_seconds,
            spent=end - self._begin,
            step_seconds=step_seconds,
            batch_seconds=end - begin,
            batches_per_step=len(self._some_heldout) / training.eval_every if training.eval_every else 0.0,
            batches_at_end=len(self._heldout),
            at_most=training.steps,
        )

    def _introduction(self, start: int, steps: int) -> str:
        config, train_tokens = self.config, self._corpus.train.num_tokens
        per_step = config.training.batch_size * config.data.context
        return (
            f"{self.run.path}: {self.parameters:,} parameters, pattern {config.model.pattern} of "
            f"{config.model.linear_layer} (L) and softmax attention (N); {train_tokens:,} training tokens, "
            f"{per_step:,} a step, {steps * per_step / train_tokens:.2f} epochs; "
            + (f"continuing after step {start} of {steps}" if start else f"{steps} steps")
        )


def steps_within(
    max_seconds: float,
    *,
    spent: float,
    step_seconds: float,
    batch_seconds: float,
    batches_per_step: float,
    batches_at_end: int,
    at_most: int,
) -> int:
    """Steps that fit in `max_seconds` of which `spent` are gone, with evaluation batches of `batch_seconds` and report.

    Raises:
      ValueError: not one step fits.
    """
    end = REPORT_SECONDS + batch_seconds * batches_at_end
    per_step = step_seconds + batch_seconds * batches_per_step
    steps = min(at_most, int((max_seconds - spent - end) / per_step))
    if steps < 1:
        raise ValueError(
            f"max_seconds is {max_seconds:g}, too few for a step: preparation took {spent:.0f}, evaluation and report "
            f"will take {end:.0f}, a step {per_step:.1f}; give more, or None"
        )
    return steps


def default_run_directory(config: LanguageModelConfig) -> Path:
    """runs/DATA-PATTERN-LAYER: runs to be compared get folders of their own."""
    pattern = config.model.pattern if isinstance(config.model.pattern, str) else "-".join(config.model.pattern)
    layer = f"-{config.model.linear_layer}" if set(config.model.layers) != {"softmax_attention"} else ""
    return Path("runs") / re.sub(r"[^\w.-]+", "-", f"{Path(config.data.path).stem}-{pattern}{layer}")
