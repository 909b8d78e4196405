"""What a finished run leaves to look at: loss.png and a table beside the compressors."""

import os
from collections.abc import Mapping
from pathlib import Path

from ._metrics import read_metrics


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
    # The object interface: no global state, no display, whatever backend the caller has chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directory = Path(directory)
    records = read_metrics(directory)
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["eval_bits_per_byte"]) for r in records if "eval_bits_per_byte" in r]
    if not training:
        raise ValueError(f"plot_loss: {directory} has no training metrics yet; train at least one step")
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*training, strict=True), linewidth=0.8)
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    if held_out:
        right.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="model")
    for number, (name, value) in enumerate((compressors or {}).items()):
        right.axhline(value, linestyle="--", linewidth=0.9, color=f"C{number + 1}", label=name)
    right.set(xlabel="step", ylabel="held-out text (bits per byte)")
    if held_out or compressors:
        right.legend()
    temporary = directory / f".loss.{os.getpid()}.png"
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, directory / "loss.png")
    finally:
        temporary.unlink(missing_ok=True)
    return directory / "loss.png"
