"""A decoder's shape as one flat record with short names: what a command line sets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..core import checks
from ..layers import MIXERS, Config, LayerConfig, RecurrentConfig, SoftmaxAttentionConfig, SwiGLUConfig
from ._config import BlockConfig, DecoderConfig, Dtype, Remat, repeated

SOFTMAX = SoftmaxAttentionConfig.name
LINEAR = tuple(name for name, config in MIXERS.items() if issubclass(config, RecurrentConfig))


@dataclasses.dataclass(frozen=True)
class HybridConfig(Config):
    """A `DecoderConfig` of linear layers of one kind and softmax attention, with SwiGLU and RMSNorm.

    Attributes:
        vocab_size, d_model, num_layers: sizes; num_layers is a multiple of the pattern's length.
        pattern: the mixers from bottom to top, repeated: a string of L (`linear_layer`) and N (softmax attention), such
            as "LLLN", or a sequence of those letters and names of `lineax_seq.layers.MIXERS`.
        linear_layer: a name of `lineax_seq.layers.MIXERS`.
        num_heads: of every mixer.
        head_dim: key channels per head of every mixer; None is each one's own default.
        num_v_heads: value heads of the linear layers, where they may differ from num_heads.
        num_kv_heads: key and value heads of softmax attention.
        window: tokens that softmax attention sees; None is all.
        conv_width: of the linear layers' short convolutions; None is each layer's own default.
        d_ff: hidden channels of the MLPs; None is 8/3·d_model, rounded up to a multiple of 64.
        rope_theta: of softmax attention; None leaves positions out.
        tie_embeddings, norm_eps, init_std, dtype, param_dtype, remat: as in `DecoderConfig`.
        linear_options, attention_options: further fields of the mixers' configurations, such as {"expand_v": 1.0}; they
            come last, so {"num_heads": 8} gives softmax attention heads of its own.
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
            ValueError: a value that does not fit, in this record or in the decoder it stands for.
        """
        if not isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        for name in ("linear_options", "attention_options"):
            object.__setattr__(self, name, tuple(sorted(dict(getattr(self, name)).items())))
        super().__post_init__()
        checks.one_of("HybridConfig", "linear_layer", self.linear_layer, LINEAR)
        self._check_used(self.layers)
        self.decoder()

    def decoder(self) -> DecoderConfig:
        """The configuration that this one stands for."""
        feed_forward = SwiGLUConfig(d_ff=self.d_ff)
        blocks = [BlockConfig(mixer=self.mixer(name), feed_forward=feed_forward) for name in self.layers]
        same = ("vocab_size", "d_model", "tie_embeddings", "norm_eps", "init_std", "dtype", "param_dtype", "remat")
        stages = repeated("HybridConfig", blocks, self.num_layers)
        return DecoderConfig(stages=stages, **{name: getattr(self, name) for name in same})

    def mixer(self, name: str) -> LayerConfig:
        """The configuration of the mixer `name` with the fields that are set for it.

        Raises:
            ValueError: a field that the mixer does not have, a value that does not fit it.
        """
        attention = name == SOFTMAX
        own = ("num_kv_heads", "window") if attention else ("num_v_heads", "conv_width")
        options = {f: getattr(self, f) for f in ("num_heads", "head_dim", *own) if getattr(self, f) is not None}
        if attention:
            options["rope_theta"] = self.rope_theta
        options |= dict(self.attention_options if attention else self.linear_options)
        for option in options:
            checks.one_of("HybridConfig", f"an option of layer {name}", option, MIXERS[name].field_names())
        return MIXERS[name](**options)

    @property
    def layers(self) -> tuple[str, ...]:
        """The pattern as names of mixers."""
        letters = {"L": self.linear_layer, "N": SOFTMAX}
        names = tuple(letters.get(entry, entry) for entry in self.pattern)
        for name in names:
            if name not in MIXERS:
                checks.one_of("HybridConfig", "an entry of pattern", name, (*MIXERS, *letters))
        return names

    def _check_used(self, names: tuple[str, ...]) -> None:
        """What is set must have a layer that it is set for."""
        for kind, fields in (
            ("softmax attention", ("num_kv_heads", "window", "attention_options")),
            ("linear", ("num_v_heads", "conv_width", "linear_options")),
        ):
            if any((name == SOFTMAX) == (kind != "linear") for name in names):
                continue
            idle = [f for f in fields if getattr(self, f) not in (None, ())]
            if idle:
                raise ValueError(
                    f"HybridConfig: {', '.join(idle)} set, but pattern {self.pattern!r} has no {kind} layer."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds; `from_dict` makes the same configuration of them."""
        options = {name: dict(getattr(self, name)) for name in ("linear_options", "attention_options")}
        return {**super().to_dict(), **options}
