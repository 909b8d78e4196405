"""The compiler's schedule of one kernel or fusion, read from what it dumps.

A TPU core issues one bundle of instructions a cycle and the compiler knows every latency, so a schedule is a cycle
count. It is dumped twice. Before the last pass (`packed-bundles-post-ra`, and `pre-delay_..._utilization` with the
units that are busy in each cycle) a cycle in which nothing can start is an empty bundle: its length is the time. The
last pass (`final_bundles`) drops the empty ones, as the hardware waits by itself: its length is the number of bundles
issued, which says nothing of a product's latency or of a busy matrix unit. Both are kept: `cycles` and `bundles`.

Waits for HBM are in neither; they are the profiler's other column.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2}(?:\s+[A-Z]{2})*)?\s*:\s*>*\s*\{")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?%p\d+\w*)\) )?target (?:bundleno = (\d+)|= \$region(\d+))")
_EXIT_TEST = re.compile(
    r"(%p\w+) = scmp\.(\w+)\.[su]32\.totalorder (%s\w+|-?\d+), (%s\w+|-?\d+) /\*[^*]*loop exit test"
)
_PHI = re.compile(r"(%s\w+) = sphi (%s\w+|-?\d+), (%s\w+|-?\d+)")
_MOVE = re.compile(r"(%s\w+) = smov (?:\([^)]*\), )?(-?\d+|%s\w+)")
_ADD = re.compile(r"(%s\w+) = sadd\.s32 (-?\d+|%s\w+), (-?\d+|%s\w+)")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")


@dataclasses.dataclass(frozen=True)
class Loop:
    """Bundles [start, stop) run `trips` times; None where the compiler does not know how often."""

    start: int
    stop: int
    trips: int | None
    grid: bool = False


@dataclasses.dataclass(frozen=True)
class Code:
    """A sequence of bundles with its control flow.

    Attributes:
        length: bundles.
        loops: outermost first.
        skipped: spans [start, stop) that a forward branch jumps over at times.
    """

    length: int
    loops: tuple[Loop, ...]
    skipped: tuple[tuple[int, int], ...]

    @property
    def grid(self) -> Loop | None:
        return next((loop for loop in self.loops if loop.grid), None)

    def weights(self) -> list[int]:
        """How often each bundle runs in one step of the grid, its inner loops unrolled; 0 outside the grid's loop."""
        start, stop = (self.grid.start, self.grid.stop) if self.grid else (0, self.length)
        weights = [0] * start + [1] * (stop - start) + [0] * (self.length - stop)
        for loop in self.loops:
            if not loop.grid and loop.trips is not None:
                for i in range(loop.start, loop.stop):
                    weights[i] *= loop.trips
        return weights

    @property
    def per_step(self) -> int:
        return sum(self.weights())

    def total(self, steps: int) -> int:
        """Of a call with so many grid steps. The grid's loop turns a few times more, to fill and to empty its
        pipeline; these turns jump over the kernel's own code."""
        if self.grid is None:
            return self.per_step * steps
        weights = self.weights()
        body = max(
            (sum(weights[a:b]) for a, b in self.skipped if b <= self.grid.stop and a >= self.grid.start), default=0
        )
        extra = max(0, (self.grid.trips or steps) - steps)
        outside = self.length - (self.grid.stop - self.grid.start)
        return steps * self.per_step + extra * (self.per_step - body) + outside


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel's or fusion's schedule.

    Attributes:
        name: the instruction's name in the compiled program.
        timed: the code with its waits: one bundle a cycle.
        issued: the code without them.
        busy: for each cycle of `timed` how many of each of UNITS are busy.
        capacity: how many of each of UNITS there are.
    """

    name: str
    timed: Code
    issued: Code
    busy: tuple[tuple[int, ...], ...]
    capacity: tuple[int, ...]

    @property
    def cycles(self) -> int:
        """Of one grid step."""
        return self.timed.per_step

    @property
    def bundles(self) -> int:
        """Issued in one grid step."""
        return self.issued.per_step

    def unit_cycles(self) -> dict[str, int]:
        """Busy units of each kind, summed over one grid step; over `capacity` it is the least time they need."""
        weights = self.timed.weights()
        totals = [sum(w * row[u] for w, row in zip(weights, self.busy, strict=True)) for u in range(len(UNITS))]
        return dict(zip(UNITS, totals, strict=True))

    def utilisation(self) -> dict[str, float]:
        """Fraction of a grid step's cycles that each kind of unit is busy."""
        used = self.unit_cycles()
        return {unit: used[unit] / (self.cycles * c) for unit, c in zip(UNITS, self.capacity, strict=True)}

    @property
    def unknown_loops(self) -> int:
        """Loops whose trip count the program decides; they are counted once."""
        return sum(loop.trips is None and not loop.grid for loop in self.timed.loops)


def _bundles(text: str) -> list[str]:
    """Each bundle's text with the comments that follow it."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            found.append([line])
        elif found:
            found[-1].append(line)
    return ["\n".join(lines) for lines in found]


def _trips(test: re.Match, values: "_Scalars") -> int | None:
    """How often a loop runs whose exit test is `counter >= limit` or the like, on the counter after its increment."""
    _, relation, counter, limit = test.groups()
    end, increment = values.constant(limit), values.additions.get(counter)
    before = counter
    if increment:
        before, step = increment
    else:  # the counter is tested before its increment
        advances = [(new, step) for new, (old, step) in values.additions.items() if old == counter]
        step = advances[0][1] if len(advances) == 1 else None
    start = values.constant(values.entry.get(before, before))
    if end is None or start is None or not step:
        return None
    leaves = {"ge": lambda i: i >= end, "gt": lambda i: i > end, "eq": lambda i: i == end}
    leaves |= {"le": lambda i: i <= end, "lt": lambda i: i < end}
    if relation not in leaves:
        return None
    trips, i = 1, start + step if increment else start
    while not leaves[relation](i):
        trips, i = trips + 1, i + step
        if trips > 1 << 24:
            return None
    return trips


class _Scalars:
    """What is known of the scalar registers: constants, loop counters' first values and their increments."""

    def __init__(self, text: str):
        self.moves = dict(_MOVE.findall(text))
        self.entry = {name: first for name, first, _ in _PHI.findall(text)}
        self.additions: dict[str, tuple[str, int]] = {}
        for name, a, b in _ADD.findall(text):
            constant, other = (a, b) if not a.startswith("%") else (b, a)
            if not constant.startswith("%") and other.startswith("%"):
                value = int(constant)
                self.additions[name] = other, value - (1 << 32) if value >= 1 << 31 else value

    def constant(self, name: str) -> int | None:
        for _ in range(8):
            if not name.startswith("%"):
                value = int(name)
                return value - (1 << 32) if value >= 1 << 31 else value
            if name not in self.moves:
                return None
            name = self.moves[name]
        return None


def parse_code(text: str, branch_delay: int) -> Code:
    """The control flow of a dump of bundles, with or without the waits."""
    bundles = _bundles(text)
    starts: dict[str, int] = {}
    for i, bundle in enumerate(bundles):
        for region in _START.findall(bundle):
            starts.setdefault(region, i)
    values = _Scalars(text)
    tests = {m.group(1): m for m in _EXIT_TEST.finditer(text)}
    loops, skipped = [], []
    for i, bundle in enumerate(bundles):
        for branch in _BRANCH.finditer(bundle):
            predicate, number, region = branch.groups()
            goal = int(number) if number else starts.get(region)
            if goal is None:
                continue
            after = min(i + 1 + branch_delay, len(bundles))
            if goal <= i:
                test = tests.get((predicate or "").lstrip("!"))
                grid = "iteration index, stage" in bundles[goal]
                loops.append(Loop(goal, after, _trips(test, values) if test else None, grid))
            elif goal > after:
                skipped.append((after, goal))
    loops.sort(key=lambda loop: (loop.start, -loop.stop))
    return Code(len(bundles), tuple(loops), tuple(skipped))


def parse_utilisation(text: str) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(capacity, busy units of each cycle)."""
    lines = text.splitlines()
    names = tuple(name.strip().split(":")[-1] for name in lines[1].split(","))
    if names != UNITS:
        raise ValueError(f"utilisation: the compiler wrote the units {names}, this profiler knows {UNITS}")
    numbers = [tuple(int(n) for n in line.split()) for line in lines[2:] if line[:1].isdigit() or line[:1] == " "]
    return numbers[0], tuple(numbers[1:])


def read(folder: Path, branch_delay: int) -> Iterator[Schedule]:
    """The schedules in a dump, by instruction; the programs' own prologues are left out."""
    found: dict[str, dict[str, Path]] = {}
    kinds = {
        "packed-bundles-post-ra": "timed",
        "pre-delay_hlo-static-per-bundle-utilization": "busy",
        "final_bundles": "issued",
    }
    for path in sorted(folder.rglob("*.txt")):
        match = re.match(r"\d+-(.+?)-\d+-(.+)\.txt$", path.name)
        if match and match.group(2) in kinds and not match.group(1).startswith(("<", "TLP")):
            found.setdefault(match.group(1), {})[kinds[match.group(2)]] = path
    for name, paths in found.items():
        if len(paths) != len(kinds):
            continue
        capacity, busy = parse_utilisation(paths["busy"].read_text())
        timed = parse_code(paths["timed"].read_text(), branch_delay)
        if timed.length != len(busy):
            raise ValueError(f"{name}: {timed.length} bundles in the schedule, {len(busy)} rows of utilisation")
        yield Schedule(name, timed, parse_code(paths["issued"].read_text(), branch_delay), busy, capacity)
