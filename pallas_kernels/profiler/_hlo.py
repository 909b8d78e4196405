"""What a compiled program runs and how often, read from its HLO text.

Loops are multiplied by their trip counts; of a conditional's branches the costlier one is taken. Bytes are those that
an instruction moves from and to HBM: its operands and results that do not already live in vector memory, of a sliced
operand the slice.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_TYPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-<>]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*[a-z\d]*)\(")
_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
VMEM = "S(1)"


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    types: str
    operands: tuple[str, ...]
    rest: str  # attributes
    root: bool

    def calls(self, attribute: str) -> str:
        """The computation that an attribute names, or nothing."""
        match = re.search(rf"\b{attribute}=%?([\w.\-<>]+)", self.rest)
        return match.group(1) if match else ""

    def is_parameter(self, number: int) -> bool:
        return self.opcode == "parameter" and self.rest.startswith(f"{number})")

    def number(self, key: str) -> int | None:
        match = re.search(rf'"{key}":(?:\{{"n":)?"?(\d+)"?', self.rest)
        return int(match.group(1)) if match else None


@dataclasses.dataclass(frozen=True)
class Use:
    """An instruction that does something, how often it runs and the bytes one run moves."""

    instruction: Instruction
    count: int
    hbm_bytes: int
    in_hbm: tuple[bool, ...] = ()  # operands, then results

    @property
    def is_transfer(self) -> bool:
        """Whether the compiler lets it run beside what follows."""
        return self.instruction.opcode.endswith("-start")

    @property
    def name(self) -> str:
        return self.instruction.name

    @property
    def is_kernel(self) -> bool:
        return 'custom_call_target="tpu_custom_call"' in self.instruction.rest

    @property
    def vmem_bytes(self) -> int:
        """Scratch and windows of a kernel in vector memory."""
        found = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', self.instruction.rest)
        sizes = re.findall(r'"memory_space":"1"[^}]*"size":"(\d+)"', found.group(1)) if found else []
        return sum(map(int, sizes))


def type_bytes(types: str, *, hbm_only: bool = True) -> int:
    total = 0
    for dtype, dims, layout in _TYPE.findall(types):
        if hbm_only and VMEM in layout:
            continue
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or [0])[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


class Program:
    """The computations of an HLO module by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        here: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                here = self.computations.setdefault(header.group(2), {})
                if header.group(1):
                    self.entry = header.group(2)
            elif here is not None and (match := _INSTRUCTION.match(line)):
                instruction = _instruction(bool(match.group(1)), match.group(2), match.group(3))
                if instruction:
                    here[instruction.name] = instruction
        if not self.entry:
            raise ValueError("program: the text has no ENTRY computation, wanted a compiled HLO module")

    def uses(self, cost: Callable[[Use], float]) -> list[Use]:
        """Everything that runs, in order; `cost` decides which branch of a conditional counts."""
        return list(self._uses(self.entry, 1, cost))

    def _uses(self, name: str, count: int, cost) -> Iterator[Use]:
        computation = self.computations[name]
        for i in computation.values():
            if i.opcode in _NOTHING:
                continue
            if i.opcode == "while":
                yield from self._uses(i.calls("body"), count * self._trips(i), cost)
            elif i.opcode == "conditional":
                branches = [list(self._uses(b, count, cost)) for b in self._branches(i)]
                yield from max(branches, key=lambda uses: sum(use.count * cost(use) for use in uses))
            elif i.opcode in ("call", "async-start") and (inner := i.calls("to_apply") or i.calls("calls")):
                yield from self._uses(inner, count, cost)
            elif not i.opcode.endswith(("-done", "-update")):
                operands = [computation[name].types for name in i.operands if name in computation]
                places = [VMEM not in layout for types in (*operands, i.types) for _, _, layout in _TYPE.findall(types)]
                yield Use(i, count, self._bytes(computation, i), tuple(places))

    def _branches(self, i: Instruction) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
        if listed:
            return [b.strip().lstrip("%") for b in listed.group(1).split(",")]
        return [b for b in (i.calls("true_computation"), i.calls("false_computation")) if b]

    def _trips(self, i: Instruction) -> int:
        if known := i.number("known_trip_count"):
            return known
        condition = self.computations[i.calls("condition")]
        limits = [re.match(r"(\d+)\)", c.rest) for c in condition.values() if c.opcode == "constant"]
        found = [int(m.group(1)) for m in limits if m]
        return max(found, default=1)

    def _bytes(self, computation: dict[str, Instruction], i: Instruction) -> int:
        operands = [computation[name] for name in i.operands if name in computation]
        body = self.computations.get(i.calls("calls"), {}) if i.opcode == "fusion" else {}
        if not body:
            if i.opcode == "dynamic-update-slice" and len(operands) > 1:
                return 2 * type_bytes(operands[1].types)
            if i.opcode in ("dynamic-slice", "slice"):
                return type_bytes(i.types) * (2 if operands and VMEM not in operands[0].types else 1)
            return type_bytes(i.types) + sum(type_bytes(o.types) for o in operands)
        total, results = type_bytes(i.types), _results(body)
        written = _TYPE.findall(i.types)
        if len(written) == len(results):  # else one instruction has them all, as a sort does
            for result, (dtype, dims, layout) in zip(results, written, strict=True):
                if result.opcode == "dynamic-update-slice" and VMEM not in layout:  # in place: only the slice
                    total += type_bytes(body[result.operands[1]].types, hbm_only=False)
                    total -= type_bytes(f"{dtype}[{dims}]")
        for number, operand in enumerate(operands):
            parameter = next((b.name for b in body.values() if b.is_parameter(number)), "")
            total += min(type_bytes(operand.types), _read(body, parameter)) if parameter else type_bytes(operand.types)
        return total


def _origin(body: dict[str, Instruction], name: str) -> Instruction:
    """What an operand is, beneath changes of its type alone."""
    while body[name].opcode == "bitcast":
        name = body[name].operands[0]
    return body[name]


def _read(body: dict[str, Instruction], parameter: str) -> int:
    """Bytes that a fusion reads of an operand: slices, or all of it; nothing of what it only updates in place."""
    total = 0
    for user in body.values():
        if user.opcode in ("bitcast", "tuple") or parameter not in (_origin(body, name).name for name in user.operands):
            continue
        first = _origin(body, user.operands[0]).name == parameter
        if user.opcode == "dynamic-slice" and first:
            total += type_bytes(user.types, hbm_only=False)
        elif not (user.opcode == "dynamic-update-slice" and first):
            return type_bytes(body[parameter].types, hbm_only=False)
    return total or (0 if _updated(body, parameter) else type_bytes(body[parameter].types, hbm_only=False))


def _updated(body: dict[str, Instruction], parameter: str) -> bool:
    updates = [b for b in body.values() if b.opcode == "dynamic-update-slice"]
    return any(_origin(body, b.operands[0]).name == parameter for b in updates)


def _results(body: dict[str, Instruction]) -> list[Instruction]:
    root = _origin(body, next(b.name for b in body.values() if b.root))
    return [_origin(body, name) for name in root.operands] if root.opcode == "tuple" else [root]


def _instruction(root: bool, name: str, text: str) -> Instruction | None:
    match = _OPCODE.search(text)
    if not match:
        return None
    types, rest = text[: match.start(1)], text[match.end() :]
    depth, end = 1, 0
    while end < len(rest) and depth:
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    operands = tuple(re.findall(r"%([\w.\-<>]+)", rest[: end - 1]))
    return Instruction(name, match.group(1), types, operands, rest, root)
