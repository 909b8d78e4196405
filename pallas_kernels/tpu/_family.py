"""The record of a family of matrix-state kernels: the formulas of one head, without a word of grids and memory."""

import dataclasses
from collections.abc import Callable, Mapping

import jax

from ._chunk import Chunk

ENTRY = {"entry": "V K"}  # the state that entered the chunk, transposed


def _keep(chunk: Chunk, gates: dict) -> dict:
    return gates


def _as_they_are(fields: dict, reset: jax.Array) -> dict:
    return fields


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One head's formulas.

    Attributes:
        name: of the recurrence's record.
        fields: its fields, with the same dimensions: "H K", "HV V", "HV K", or "HV" for gates, one number a token.
        forward: (chunk, inputs, state^T [V, K], scratch) -> (o [C, V], state^T, what it saves for `backward`).
        backward: (chunk, inputs, entry state^T, saved, d_o, d_state^T) -> (gradients by name, d_state^T); the gradient
            of a gate is a `GateGradient`.
        gates, gates_back: the gates `[heads, C]` of all heads -> those that the formulas take, and the way back for
            their gradients.
        floor: gate -> the value below which it counts as that value.
        saves: what `forward` saves, name -> dimensions in the letters C, K, V.
        prepare: None, or (chunk, head -> inputs, heads, scratch): what is done for all heads before `forward` of each.
        scratch: what `prepare` leaves for `forward`, name -> (the dimensions for one head, as letters or numbers;
            whether it is float32 and not what products read).
        turns: how many heads take turns, where `forward` and `backward` are generators: enough to hide a product's
            latency, few enough to keep what waits in registers.
        at_starts: (fields, reset [B, T]) -> the fields, changed where a document starts.
    """

    name: str
    fields: Mapping[str, str]
    forward: Callable
    backward: Callable
    gates: Callable = _keep
    gates_back: Callable = _keep
    floor: Mapping[str, float] = dataclasses.field(default_factory=dict)
    saves: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prepare: Callable | None = None
    scratch: Mapping[str, tuple[tuple, bool]] = dataclasses.field(default_factory=dict)
    turns: int = 1
    at_starts: Callable[[dict, jax.Array], dict] = _as_they_are

    @property
    def rows(self) -> list[str]:
        """The fields that are vectors per token."""
        return [name for name, kind in self.fields.items() if kind != "HV"]

    @property
    def numbers(self) -> list[str]:
        """The fields that are one number per token: gates."""
        return [name for name, kind in self.fields.items() if kind == "HV"]

    @property
    def output_field(self) -> str:
        """The field whose shape and dtype the outputs have."""
        return next(name for name, kind in self.fields.items() if kind == "HV V")

    @property
    def saved(self) -> dict[str, str]:
        """All that the backward pass finds of a chunk and head: its entry state, and what `forward` saves."""
        return {**ENTRY, **self.saves}
