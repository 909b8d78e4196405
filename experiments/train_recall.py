"""How many pairs of key and value does a small recurrence of fixed size remember?

Question   Accuracy of multi-query associative recall over the number of pairs, for a two-layer decoder.
Data       Made as it is read: pairs of random keys and values, then the keys again in another order.
Command    python -m experiments.train_recall
           python -m experiments.train_recall --model.linear-layer gla
           python -m experiments.train_recall --model.pattern N          (softmax attention, the comparison)
           python -m experiments.train_recall --help                     (everything that can be changed)
Hardware   2 CPU cores, about a minute.
Expected   The delta rule, which overwrites what a key held before, learns it first; accuracy falls with the pairs.
Measured   4 / 8 / 16 pairs after 200 steps: delta_net 100.0 / 98.1 / 86.7 %. In as many steps the others had not
           begun to recall: gla 11.1 / 7.7 / 5.0, gated_delta_net 4.5 / 4.4 / 3.9, softmax attention 21.9 / 12.8 /
           8.0 %. One seed, nothing tuned for any but the first; 1:24 in all on two cores that other work shared,
           jax 0.12.0.1.

Leaves runs/recall-PATTERN-LAYER: config.json, metrics.jsonl, tensorboard/, checkpoints/, recall.png, results.json.
"""

import sys
from collections.abc import Sequence

from lineax_seq.tasks import HybridConfig, RecallConfig, RecallTask
from lineax_seq.training import OptimizerConfig, Result, Run, TrainingConfig, clock, run_command

DEFAULT = RecallConfig(
    model=HybridConfig(
        vocab_size=64, d_model=64, num_layers=2, pattern="L", linear_layer="delta_net", num_heads=2, head_dim=8
    ),
    optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.0),
    training=TrainingConfig(steps=200, batch_size=32, eval_every=50, eval_rows=96, checkpoint_every=100),
)


def main(args: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished or saved on SIGTERM, 1 could not go on, 2 refused, 130 saved on Ctrl-C."""
    program, description = "python -m experiments.train_recall", __doc__.splitlines()[0]
    return run_command(DEFAULT, RecallTask, report, args, program=program, description=description)


def report(run: Run, result: Result) -> None:
    print("pairs  accuracy")
    for pairs, accuracy in result.measured["accuracy"].items():
        print(f"{pairs:>5}  {accuracy:>8.1%}")
    print(f"{result.parameters:,} parameters, {result.steps} steps, {clock(result.seconds)} in all: {run.path}")


if __name__ == "__main__":
    sys.exit(main())
