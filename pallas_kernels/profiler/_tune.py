"""Block sizes by predicted cost: every choice is compiled for the target, the cheapest go to the table.

The table is what `_shared.block_sizes` reads. For each chunk size the best number of heads is kept, cheapest first.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._shared import block_sizes
from . import _aot, _programs, _targets
from ._report import Report, report


def tune(
    name: str,
    target: str,
    sizes: Mapping[str, int],
    dtype: str = "bfloat16",
    *,
    chunk_size: int | None = None,
    backward: bool = True,
    table: Path = block_sizes.TABLE,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Compile a recurrence's kernel with every block size for `target` and keep the cheapest in `table`.

    Returns:
        The rows that were written, cheapest first.

    Raises:
        ValueError: a recurrence whose kernel has no block sizes, or none of which compiles.
    """
    facts, args = _programs.kernel_arguments(name, sizes, dtype, backward)
    kernel = _programs.tunable(facts["record"])
    assert kernel.block_sizes is not None
    choices = kernel.block_sizes(sizes if chunk_size is None else {**sizes, "C": chunk_size})
    scale = sizes["K"] ** -0.5
    jobs = [
        (functools.partial(_programs.run_kernel, facts["record"], scale, choice, backward), args, target)
        for choice in choices
    ]
    costs: list[tuple[float, Any, Report]] = []
    per = _programs.token_heads(sizes, has_heads=True)
    for number, (choice, compiled) in enumerate(zip(choices, _aot.compile_all(jobs), strict=True), 1):
        label = f"{number}/{len(choices)}: {name} on {target}, {choice}"
        if isinstance(compiled, _aot.CompileError):
            say(f"{label}: refused: {str(compiled).splitlines()[0][:160]}")
            continue
        found = report(label, compiled, per)
        cost = found.totals["time_cycles_each"]
        say(f"{label}: {cost:.2f} cycles a token-head, {found.totals['spills']} spills")
        costs.append((cost, choice, found))
    if not costs:
        raise ValueError(f"--tune: none of {len(choices)} block sizes of {name} compiles for {target}")
    rows = _rows(facts, target, sizes, backward, sorted(costs, key=lambda item: item[0]))
    _merge(table, rows)
    return rows


def _rows(facts, target: str, sizes, backward: bool, costs: Sequence[tuple[float, Any, Report]]) -> list[dict]:
    rows: dict[int, dict] = {}
    for cost, choice, found in costs:
        source = {
            "predicted_cycles_per_token_head": round(cost, 3),
            "by": "the compiler's schedule and HBM bandwidth, of every choice",
            "passes": "forward+backward" if backward else "forward",
            "sizes": dict(sizes),
            "choices": len(costs),
            "versions": found.versions,
            "date": datetime.date.today().isoformat(),
        }
        known = {"kernel": facts["record"], "device": _targets.target(target).kind, "dtype": facts["dtype"]}
        chosen = dataclasses.asdict(choice)
        rows.setdefault(choice.chunk, {**known, "K": sizes["K"], "V": sizes["V"], **chosen, "source": source})
    return list(rows.values())


def _merge(table: Path, rows: Sequence[dict]) -> None:
    """The new rows before the old ones of other facts or chunks; the file is replaced at once."""
    key = lambda row: tuple(row[name] for name in (*block_sizes.FACTS, "chunk"))  # noqa: E731
    old = json.loads(table.read_text("utf-8")) if table.exists() else []
    new = {key(row) for row in rows}
    part = table.with_name(table.name + ".part")
    part.write_text(json.dumps([*rows, *(row for row in old if key(row) not in new)], indent=1) + "\n", "utf-8")
    part.replace(table)
