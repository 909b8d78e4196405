"""Pictures of a run, drawn from its metrics and complete or absent."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._metrics import read_metrics

Axes = Any  # of matplotlib


def draw(file: Path, panels: Sequence[Callable[[Axes], None]]) -> Path:
    """Write `file`, panels side by side; each is drawn by a function of its axes."""
    # The object interface: no global state, no display, whatever backend the caller has chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        panel(axes)
    temporary = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def series(directory: Path, name: str) -> list[tuple[float, float]]:
    """(step, value) of every record of a run that has the metric `name`."""
    return [(record["step"], record[name]) for record in read_metrics(directory) if name in record]


def training_loss(directory: Path, unit: str) -> Callable[[Axes], None]:
    """The panel of a run's training loss over its steps; `unit` is the loss's.

    Raises:
      ValueError: the run has no metrics yet.
    """
    points = series(directory, "loss")
    if not points:
        raise ValueError(f"training_loss: {directory} has no training metrics yet; train at least one step")

    def panel(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), linewidth=0.8)
        axes.set(xlabel="step", ylabel=f"training loss ({unit})")

    return panel
