"""A layer over any recurrence, made from the recurrence's own declaration.

Every argument per token is a projection of x, brought into its domain (log-decays <= 0, rates in (0, 1), unit keys);
arguments that all tokens share are parameters. y = (RMSNorm(o) ⊙ silu(x W_g)) W_o, per head where there are heads.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from ..core import arguments as domains, checks
from ..core.arguments import Argument
from ..core.operator import Operator
from ..recurrences import RECURRENCES
from ._config import RecurrentConfig, channels
from ._context import Context
from ._mixer import Mixer
from ._norm import l2_normalize, wide
from ._parts import Parts, merged
from ._tap import Taps

# From any number (float32) into a domain. The constants put what a new layer gives near the middle of the examples.
INTO: dict[Callable, Callable[[jax.Array], jax.Array]] = {
    domains.normal: lambda z: z,
    domains.unit: l2_normalize,
    domains.log_decay: lambda z: jax.nn.log_sigmoid(z) / 16,
    domains.rate: jax.nn.sigmoid,
    domains.wide_rate: lambda z: 2 * jax.nn.sigmoid(z),
    domains.step_size: lambda z: jax.nn.softplus(z - 4.6),
}
_NARROW = (domains.normal, domains.unit)  # in the dtype of computation; gates and decays stay float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatorMixerConfig(RecurrentConfig):
    """A layer over any recurrence.

    Attributes:
        operator: a name of `RECURRENCES` or, in code, a recurrence of one's own.
        num_heads: H.
        num_v_heads: value heads HV, a multiple of H; None is H.
        expand_k, expand_v: width of all keys over D, and of as many values as there are key heads.
        num_states: N, where the recurrence has such.
        micro_steps: NH, where the recurrence has such.
    """

    name: ClassVar[str] = "recurrence"
    operator: Operator | str = "kda"
    num_heads: int = 4
    num_v_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    num_states: int = 16
    micro_steps: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.operator, str):
            checks.one_of("OperatorMixerConfig", "operator", self.operator, tuple(RECURRENCES))
        elif not isinstance(self.operator, Operator):
            raise ValueError(f"OperatorMixerConfig: operator is {self.operator!r}, wants a name or an Operator.")
        super().__post_init__()
        unknown = [name for name, argument in self.given.items() if argument.draw not in INTO]
        if unknown:
            raise ValueError(
                f"OperatorMixerConfig: {self.resolved.name}: no way from any number into the domain of "
                f"{', '.join(unknown)}; write a layer of its own, a subclass of Mixer."
            )

    @property
    def resolved(self) -> Operator:
        return RECURRENCES[self.operator] if isinstance(self.operator, str) else self.operator

    @property
    def given(self) -> dict[str, Argument]:
        """The arguments that the layer gives: all that may not be left out."""
        return {name: a for name, a in self.resolved.arguments.items() if not a.optional}

    def sizes(self, d_model: int) -> dict[str, int]:
        H, caller = self.num_heads, type(self).__name__
        HV = self.num_v_heads or H
        if HV % H:
            raise ValueError(f"{caller}: num_v_heads={HV} is no multiple of num_heads={H}; change one.")
        width = lambda expand: channels(  # noqa: E731
            caller, f"{expand} of d_model={d_model} over num_heads={H}", expand * d_model / H
        )
        others = {"D": d_model, "N": self.num_states, "NH": self.micro_steps}
        sizes = {"H": H, "HV": HV, "K": width(self.expand_k), "V": width(self.expand_v), **others}
        letters = {letter for a in self.given.values() for letter in a.letters} - {"B", "T"}
        unknown = sorted(letters - sizes.keys())
        if unknown:
            raise ValueError(f"{caller}: {self.resolved.name} has sizes {', '.join(unknown)}, which no field gives.")
        return {letter: size for letter, size in sizes.items() if letter in letters}

    def to_dict(self) -> dict[str, Any]:
        if not isinstance(self.operator, str) and RECURRENCES.get(self.operator.name) is not self.operator:
            raise ValueError(f"{type(self).__name__}: {self.operator!r} is not in RECURRENCES: JSON cannot hold it.")
        return {**super().to_dict(), "operator": self.resolved.name}

    def build(self, parts: Parts) -> "OperatorMixer":
        return OperatorMixer(self, parts)


class OperatorMixer(Mixer):
    """A layer over any recurrence, `[B, T, D] -> [B, T, D]`."""

    def __init__(self, config: OperatorMixerConfig, parts: Parts):
        super().__init__(config, parts)
        self.operator, sizes = config.resolved, config.sizes(parts.d_model)  # pyrefly: ignore
        projections, shared = {}, {}
        for name, argument in config.given.items():
            if not argument.per_token:
                shape = tuple(sizes[letter] for letter in argument.letters)
                shared[name] = parts.param(jax.random.normal(parts.rngs.params(), shape))
                continue
            width = math.prod(self._shape(argument, sizes))
            per_head = argument.letters[2:] in (["H"], ["HV"])
            projections[name] = parts.gate(width) if per_head else parts.project(width)
        self.projections, self.parameters = nnx.Dict(projections), nnx.Dict(shared)
        record = self.operator.recurrence
        *heads, channels = (sizes[letter] for letter in record.fields[record.output_field].split())
        self.gate_proj = parts.project(math.prod((*heads, channels)))
        self.o_norm = parts.gated_norm(channels)
        self.o_proj = parts.out(math.prod((*heads, channels)))

    @staticmethod
    def _shape(argument: Argument, sizes: dict[str, int]) -> tuple[int, ...]:
        """The argument's dimensions after B and T."""
        return tuple(sizes[letter] for letter in argument.letters[2:])

    def arguments(self, x: jax.Array, taps: Taps, context: Context, shared):
        sizes, given = self.config.sizes(self.d_model), {}
        for name, project in self.projections.items():
            argument = self.config.given[name]
            z = project(x).reshape(*x.shape[:2], *self._shape(argument, sizes))
            value = INTO[argument.draw](wide(z))
            given[name] = value.astype(self.dtype) if argument.draw in _NARROW else value
        for name, value in self.parameters.items():
            given[name] = INTO[self.config.given[name].draw](wide(value[...]))
        return given, shared

    def output(self, o: jax.Array, x: jax.Array, arguments: dict[str, jax.Array]) -> jax.Array:
        y = self.o_norm(o, self.gate_proj(x).reshape(o.shape))
        return self.o_proj(merged(y) if y.ndim == 4 else y)
