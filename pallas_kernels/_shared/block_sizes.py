"""The table of tuned block sizes, for the kernels of every platform.

It is `block_sizes.json` in this package's folder, written by `python -m pallas_kernels.profile --tune`: rows that name
what they were tuned for (`FACTS`), the block sizes, and under `source` where the numbers come from.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[1] / "block_sizes.json"
FACTS = ("kernel", "device", "K", "V", "dtype")


@functools.cache
def rows() -> list[dict]:
    """All rows of the table."""
    return json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else []


def tuned(facts: Mapping[str, Any]) -> list[dict]:
    """The rows that were tuned for exactly these facts, the cheapest first."""
    return [row for row in rows() if all(row[name] == facts[name] for name in FACTS)]
