"""What a compiled program will cost on its target: cycles, bytes, what binds, and how far that is from the least.

A part's time is its cycles or its transfers from and to HBM, whichever is longer: a kernel's pipeline does both at
once. Cycles come from the schedule with its waits; `bundles`, those that are issued, are kept for comparison with
counts that leave the waits out.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from ._aot import Compiled
from ._hlo import Use
from ._schedule import UNITS
from ._targets import TARGETS

# The busiest unit below this fraction of a kernel's cycles: what it waits for is latency, not the unit.
BUSY = 0.6


@dataclasses.dataclass(frozen=True)
class Part:
    """One kernel or fusion of the program; cycles, bundles, units and spills are of one grid step."""

    name: str
    kind: str
    runs: int
    steps: int
    cycles: int
    bundles: int
    total_cycles: float
    total_bundles: float
    hbm_bytes: int
    hbm_cycles: float
    vmem_bytes: int
    utilisation: dict[str, float]
    least_matrix_cycles: float
    spills: int
    fills: int
    unknown_loops: int

    @property
    def time(self) -> float:
        """Cycles of all runs; a transfer that the compiler lets run beside others takes none of its own."""
        return 0.0 if self.kind.endswith("-start") else max(self.total_cycles, self.hbm_cycles)

    @property
    def binds(self) -> str:
        if self.hbm_cycles > self.total_cycles:
            return "HBM"
        unit = max(self.utilisation, key=self.utilisation.__getitem__, default="")
        return unit if unit and self.utilisation[unit] >= BUSY else "latency"


@dataclasses.dataclass(frozen=True)
class Report:
    """The cost of one program on one target.

    Attributes:
        title: what was compiled.
        target: its name.
        per: what costs are divided by, and how many there are.
        parts: in the order they run.
        memory: bytes of arguments, outputs, temporaries and code.
        least_hbm_cycles: to read every argument and write every output once.
        measured_ms: device time of one call, where there was a device.
        versions: of jax and of the compiler.
    """

    title: str
    target: str
    per: tuple[int, str]
    parts: tuple[Part, ...]
    memory: dict[str, int]
    least_hbm_cycles: float
    measured_ms: float | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def time(self) -> float:
        """Cycles of one call."""
        return max(self._sum("time"), self._sum("hbm_cycles"))

    def _sum(self, of: str) -> float:
        return sum(getattr(part, of) for part in self.parts)

    @property
    def totals(self) -> dict[str, Any]:
        clock = TARGETS[self.target].clock
        time = self.time
        floor = max(self._sum("least_matrix_cycles"), self.least_hbm_cycles)
        binding: dict[str, float] = {}
        for part in self.parts:
            binding[part.binds] = binding.get(part.binds, 0) + part.time
        return {
            "cycles_each": self._sum("total_cycles") / self.per[0],
            "bundles_each": self._sum("total_bundles") / self.per[0],
            "time_cycles_each": time / self.per[0],
            "hbm_bytes": self._sum("hbm_bytes"),
            "hbm_cycles_each": self._sum("hbm_cycles") / self.per[0],
            "least_matrix_cycles_each": self._sum("least_matrix_cycles") / self.per[0],
            "least_hbm_cycles_each": self.least_hbm_cycles / self.per[0],
            "milliseconds": time / clock * 1e3,
            "binds": "HBM" if time > self._sum("time") else max(binding, key=binding.__getitem__, default="nothing"),
            "times_the_roofline": time / floor if floor else float("inf"),
            "spills": sum(part.spills for part in self.parts if part.kind == "kernel"),
            "fills": sum(part.fills for part in self.parts if part.kind == "kernel"),
            "vmem_bytes": max((part.vmem_bytes for part in self.parts), default=0),
            "temp_bytes": self.memory["temp"],
        }

    def to_json(self) -> dict[str, Any]:
        parts = [{**dataclasses.asdict(part), "binds": part.binds} for part in self.parts]
        return {**dataclasses.asdict(self), "per": list(self.per), "parts": parts, "totals": self.totals}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Report":
        """Raises ValueError if this is no report."""
        try:
            kept: dict[str, Any] = {f.name: data[f.name] for f in dataclasses.fields(cls)}
            names = [f.name for f in dataclasses.fields(Part)]
            parts = tuple(Part(**{name: part[name] for name in names}) for part in data["parts"])
        except (KeyError, TypeError) as missing:
            raise ValueError(f"report: no profile written by this version ({missing}); write it again") from missing
        kept |= {"per": tuple(kept["per"]), "parts": parts}
        return cls(**kept)

    def table(self, least: float = 0.01) -> str:
        """For a terminal; parts that take less than a fraction `least` of the time share a line."""
        whole, total, (count, unit) = self.time, self.totals, self.per
        lines = [
            f"{self.title} on {self.target}",
            f"  {'':30}{'runs':>6}{'steps':>7}  {'each grid step':>16}  {'each ' + unit:>26}  {'busy':>27}",
            f"  {'':30}{'':6}{'':7}  {'cycles':>8}{'bundles':>8}  {'cycles':>10}{'HBM':>8}{'time':>8}  "
            f"{'MXU':>5}{'VALU':>5}{'EUP':>5}{'XLU':>4}{'ld':>4}{'st':>4}  {'spill/fill':>10}{'VMEM kB':>9}  binds",
        ]
        rest = []
        for part in self.parts:
            if max(part.time, part.hbm_cycles) < least * whole:
                rest.append(part)
                continue
            busy = [f"{part.utilisation.get(u, 0):.0%}" for u in ("MXU", "VALU", "EUP", "XLU", "VLOAD", "VSTORE")]
            lines.append(
                f"  {part.name[:29]:30}{part.runs:6}{part.steps:7}  {part.cycles:8}{part.bundles:8}  "
                f"{part.total_cycles / count:10.2f}{part.hbm_cycles / count:8.2f}{part.time / count:8.2f}  "
                f"{busy[0]:>5}{busy[1]:>5}{busy[2]:>5}{busy[3]:>4}{busy[4]:>4}{busy[5]:>4}  "
                f"{part.spills:>5}/{part.fills:<4}{part.vmem_bytes / 1024:9.0f}  {part.binds}"
                + (f", {part.unknown_loops} loops counted once" if part.unknown_loops else "")
            )
        if rest:
            cycles = [sum(getattr(p, of) for p in rest) / count for of in ("total_cycles", "hbm_cycles", "time")]
            label = f"{len(rest)} smaller parts"
            lines.append(f"  {label:30}{'':6}{'':7}  {'':16}  {cycles[0]:10.2f}{cycles[1]:8.2f}{cycles[2]:8.2f}")
        lines += [
            f"  each {unit}: {total['time_cycles_each']:.2f} cycles ({total['bundles_each']:.2f} bundles issued, "
            f"{total['cycles_each']:.2f} cycles with their waits, {total['hbm_cycles_each']:.2f} for HBM); "
            f"{total['binds']} binds",
            f"  least: {total['least_matrix_cycles_each']:.2f} cycles on the matrix units, "
            f"{total['least_hbm_cycles_each']:.2f} to move arguments and results; "
            f"{total['times_the_roofline']:.2f} times the larger",
            f"  one call: {total['milliseconds']:.3f} ms predicted"
            + (f", {self.measured_ms:.3f} ms measured" if self.measured_ms is not None else "")
            + f"; {total['hbm_bytes'] / 1e6:.1f} MB through HBM, {total['temp_bytes'] / 1e6:.1f} MB temporary, "
            f"{total['vmem_bytes'] / 1e6:.2f} MB of vector memory; {total['spills']:.0f} spills and "
            f"{total['fills']:.0f} fills in the kernels",
        ]
        return "\n".join(lines)


def report(title: str, compiled: Compiled, per: tuple[int, str] = (1, "call")) -> Report:
    """The cost of a compiled program."""
    parts = tuple(part for use in compiled.uses() if (part := _part(compiled, use)) is not None)
    memory, target = compiled.memory, compiled.target
    moved = memory["argument"] + memory["output"]  # what is updated in place is read and written too
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return Report(title, target.name, per, parts, memory, moved / target.bytes_per_cycle, versions=versions)


def _part(compiled: Compiled, use: Use) -> Part | None:
    target, schedule = compiled.target, compiled.kernels.get(use.name)
    call = compiled.call(use)
    moved = compiled.hbm_bytes(use) * use.count
    if schedule is None:
        if not moved:
            return None
        # a transfer that the compiler starts by itself
        empty = dict.fromkeys(UNITS, 0.0)
        wait = moved / target.bytes_per_cycle
        return Part(use.name, use.instruction.opcode, use.count, 1, 0, 0, 0, 0, moved, wait, 0, empty, 0, 0, 0, 0)
    grid = schedule.timed.grid
    steps = call.steps if call else (grid.trips or 1) if grid else 1
    # a grid that is split over the cores of a device runs on them at once
    turns = -(-steps // target.cores) if call and grid and grid.trips is None else steps
    used = schedule.unit_cycles()
    return Part(
        name=use.name,
        kind="kernel" if use.is_kernel else use.instruction.opcode,
        runs=use.count,
        steps=steps,
        cycles=schedule.cycles,
        bundles=schedule.bundles,
        total_cycles=float(use.count * schedule.timed.total(turns)),
        total_bundles=float(use.count * schedule.issued.total(turns)),
        hbm_bytes=moved,
        hbm_cycles=moved / target.bytes_per_cycle,
        vmem_bytes=use.vmem_bytes,
        utilisation={unit: round(value, 4) for unit, value in schedule.utilisation().items()},
        least_matrix_cycles=use.count * turns * used["MXU"] / schedule.capacity[0],
        spills=used["SPILL"],
        fills=used["FILL"],
        unknown_loops=schedule.unknown_loops,
    )


def compare(new: Report, old: Report) -> str:
    """Both totals side by side, and how many times the old one is the new one's."""
    if new.per[1] != old.per[1]:
        raise ValueError(f"against: costs per {old.per[1]}, wanted per {new.per[1]}: profile the same recurrence")
    rows = [f"  {'':28}{new.title[:26]:>28}{old.title[:26]:>28}{'ratio':>8}"]
    for key in ("time_cycles_each", "cycles_each", "bundles_each", "hbm_cycles_each", "milliseconds", "temp_bytes"):
        a, b = float(new.totals[key]), float(old.totals[key])
        ratio = f"{b / a:.2f}" if a else "-"
        rows.append(f"  {key:28}{a:28.3f}{b:28.3f}{ratio:>8}")
    for name, report_ in (("this", new), ("against", old)):
        rows.append(f"  {name + ' on':28}{report_.target} {json.dumps(report_.versions)}")
    return "\n".join(rows)
