"""Which units are busy when, over one grid step of each kernel."""

from collections.abc import Sequence
from pathlib import Path

from ._aot import Compiled
from ._report import Report
from ._schedule import UNITS, Schedule

COLUMNS = 400


def bins(schedule: Schedule, columns: int = COLUMNS) -> tuple[list[list[float]], int]:
    """(for each unit its fraction busy in each of at most `columns` spans of the step, cycles of a span)."""
    rows = [row for row, weight in zip(schedule.busy, schedule.timed.weights(), strict=True) if weight]
    width = max(1, -(-len(rows) // columns))
    spans = [rows[i : i + width] for i in range(0, len(rows), width)]
    busy = [
        [sum(row[u] for row in span) / (len(span) * schedule.capacity[u]) for span in spans] for u in range(len(UNITS))
    ]
    return busy, width


def figure(compiled: Sequence[Compiled], reports: Sequence[Report], most: int = 6):
    """A matplotlib figure of the costliest parts' schedules.

    Raises:
        ValueError: nothing that was compiled has a schedule.
    """
    import matplotlib.figure

    costly = [
        (report, part, c.kernels[part.name])
        for c, report in zip(compiled, reports, strict=True)
        for part in report.parts
        if part.name in c.kernels and part.time
    ]
    costly = sorted(costly, key=lambda item: -item[1].time)[:most]
    if not costly:
        raise ValueError("picture: the compiled program has no schedule to draw, wanted a kernel or a fusion")
    drawn = matplotlib.figure.Figure(figsize=(11, 2.4 * len(costly)), layout="constrained")
    axes = drawn.subplots(len(costly), squeeze=False)[:, 0]
    for axis, (report, part, schedule) in zip(axes, costly, strict=True):
        busy, width = bins(schedule)
        end = len(busy[0]) * width
        image = axis.imshow(
            busy, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest", extent=(0, end, len(UNITS), 0)
        )
        axis.set_yticks([i + 0.5 for i in range(len(UNITS))], UNITS, fontsize=7)
        axis.set_title(
            f"{report.title}, {report.target}: {part.name}, {part.cycles} cycles a grid step, {part.binds} binds",
            fontsize=9,
        )
    axes[-1].set_xlabel("cycle of the schedule; loops are drawn once")
    drawn.colorbar(image, ax=list(axes), label="fraction of the unit's slots", shrink=0.6)
    return drawn


def draw(compiled: Sequence[Compiled], reports: Sequence[Report], path: Path) -> None:
    """Write the figure as a PNG, the whole file or none of it."""
    part = path.with_name(path.name + ".part")
    figure(compiled, reports).savefig(part, format="png", dpi=110)
    part.replace(path)
