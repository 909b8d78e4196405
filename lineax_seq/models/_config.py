"""The shape of a decoder: a frozen record that is checked when made and travels as JSON."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..layers import LINEAR_LAYERS, SoftmaxAttention
from ..layers._check import check_positive, unknown_name

SOFTMAX = "softmax_attention"
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["full", "dots"]
# what the decoder itself hands to every mixing layer
_GIVEN = ("self", "d_model", "norm_eps", "kernel_init", "out_init", "dtype", "param_dtype", "rngs")


def layer_class(name: str) -> type:
    return SoftmaxAttention if name == SOFTMAX else LINEAR_LAYERS[name]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a `Decoder`.

    Attributes:
        vocab_size, d_model, num_layers: sizes; num_layers is a multiple of the pattern's length.
        pattern: the mixing layers from bottom to top, repeated: a string of L (`linear_layer`) and N (softmax
            attention), such as "LLLN", or a sequence of those letters and layer names.
        linear_layer: a key of `lineax_seq.layers.LINEAR_LAYERS`.
        num_heads: of every mixing layer.
        head_dim: key channels per head of every mixing layer; None is each layer's own default.
        num_v_heads: value heads of the linear layers, where they may differ from num_heads.
        num_kv_heads: key and value heads of softmax attention.
        window: tokens that softmax attention sees; None is all.
        conv_width: of the linear layers' short convolutions; None is each layer's own default.
        d_ff: hidden channels of the MLPs; None is 8/3·d_model, rounded up to a multiple of 64.
        rope_theta: of softmax attention; None leaves positions out.
        tie_embeddings: the output head is the embedding, transposed.
        norm_eps: of every norm.
        init_std: of embeddings and projections; those that end a residual branch are divided by sqrt(2·num_layers).
        dtype: of computation ("bfloat16"); recurrences' states, decays, norms, scores and logits stay float32.
        param_dtype: of parameters.
        remat: what the backward pass recomputes: None nothing, "full" all but each repeat's input, "dots" all but
            that and the results of matrix products with parameters.
        linear_options, attention_options: further arguments of the layers, such as {"expand_v": 1.0}; they come last,
            so {"num_heads": 8} gives softmax attention heads of its own.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    pattern: str | tuple[str, ...] = "LLLN"
    linear_layer: str = "gated_delta_net"
    num_heads: int = 4
    head_dim: int | None = None
    num_v_heads: int | None = None
    num_kv_heads: int | None = None
    window: int | None = None
    conv_width: int | None = None
    d_ff: int | None = None
    rope_theta: float | None = 10000.0
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: Remat | None = None
    linear_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Freeze what came as lists and dictionaries, and check.

        Raises:
            ValueError: a value that does not fit; layers check their own sizes when they are made.
        """
        if not isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        for name in ("linear_options", "attention_options"):
            object.__setattr__(self, name, tuple(sorted(dict(getattr(self, name)).items())))
        caller = "DecoderConfig"
        optional = ("head_dim", "num_v_heads", "num_kv_heads", "window", "conv_width", "d_ff")
        sizes = ("vocab_size", "d_model", "num_layers", "num_heads", *optional)
        for name in ("vocab_size", "d_model", "num_layers", "num_heads"):
            if getattr(self, name) is None:
                raise ValueError(f"{caller}: {name} is None, wants a whole number of at least 1.")
        check_positive(caller, **{name: getattr(self, name) for name in sizes})
        for name in ("norm_eps", "init_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{caller}: {name} is {getattr(self, name)!r}, wants a number above 0.")
        if self.linear_layer not in LINEAR_LAYERS:
            raise unknown_name(caller, "linear_layer", self.linear_layer, LINEAR_LAYERS)
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in get_args(Dtype):
                raise unknown_name(caller, name, getattr(self, name), get_args(Dtype))
        if self.remat is not None and self.remat not in get_args(Remat):
            raise unknown_name(caller, "remat (or None)", self.remat, get_args(Remat))
        layers = self.layers  # checks the pattern
        if self.num_layers % len(layers):
            raise ValueError(
                f"{caller}: num_layers={self.num_layers} is no multiple of the pattern's {len(layers)} layers "
                f"({self.pattern!r}); change one."
            )
        for name in set(layers):
            self.layer_options(name)
        self._check_used(layers)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names of one repeat, the shortest that the pattern consists of."""
        letters = {"L": self.linear_layer, "N": SOFTMAX}
        known = {*LINEAR_LAYERS, SOFTMAX}
        names = tuple(letters.get(entry, entry) for entry in self.pattern)
        if not names:
            raise ValueError("DecoderConfig: pattern is empty; give letters L and N, or layer names.")
        for name in names:
            if name not in known:
                raise unknown_name("DecoderConfig", "an entry of pattern", name, {*known, *letters})
        n = len(names)
        period = next(p for p in range(1, n + 1) if n % p == 0 and names[:p] * (n // p) == names)
        return names[:period]

    @property
    def repeats(self) -> int:
        return self.num_layers // len(self.layers)

    def layer_options(self, name: str) -> dict[str, Any]:
        """The arguments of layer `name` beyond the decoder's own.

        Raises:
            ValueError: an option that the layer does not take.
        """
        attention = name == SOFTMAX
        common = (
            "num_heads",
            "head_dim",
            *(("num_kv_heads", "window") if attention else ("num_v_heads", "conv_width")),
        )
        options = {field: getattr(self, field) for field in common if getattr(self, field) is not None}
        if attention:
            options["rope_theta"] = self.rope_theta
        options |= dict(self.attention_options if attention else self.linear_options)
        known = [p for p in inspect.signature(layer_class(name).__init__).parameters if p not in _GIVEN]
        for option in options:
            if option not in known:
                raise unknown_name("DecoderConfig", f"an option of layer {name}", option, known)
        return options

    def _check_used(self, layers: tuple[str, ...]) -> None:
        """What is set must have a layer that it is set for."""
        for kind, fields in (
            ("softmax attention", ("num_kv_heads", "window", "attention_options")),
            ("linear", ("num_v_heads", "conv_width", "linear_options")),
        ):
            if any((name == SOFTMAX) == (kind != "linear") for name in layers):
                continue
            idle = [f for f in fields if getattr(self, f) not in (None, ())]
            if idle:
                raise ValueError(
                    f"DecoderConfig: {', '.join(idle)} set, but pattern {self.pattern!r} has no {kind} layer."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds; `from_dict` makes the same configuration of them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["linear_options"], values["attention_options"] = dict(self.linear_options), dict(self.attention_options)
        if not isinstance(self.pattern, str):
            values["pattern"] = list(self.pattern)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DecoderConfig":
        """The configuration that `to_dict` wrote.

        Raises:
            ValueError: an unknown field, with the nearest known one; a missing one.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise unknown_name("DecoderConfig.from_dict", "a field", name, fields)
        missing = [name for name in ("vocab_size", "d_model", "num_layers") if name not in values]
        if missing:
            raise ValueError(f"DecoderConfig.from_dict: missing {', '.join(missing)}.")
        return cls(**values)
