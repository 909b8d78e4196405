"""The shape of a decoder: frozen records that compose, are checked when made and travel as JSON.

A model is an embedding, stages of blocks, and a head. The blocks of a stage are repeated; parameters are stacked over
the repeats, so what is compiled is one repeat of every stage.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..layers import FEED_FORWARDS, MIXERS, Config, LayerConfig, SoftmaxAttentionConfig, SwiGLUConfig
from ..layers._config import named

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["full", "dots"]
Norm = Literal["rms_norm", "layer_norm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(Config):
    """A mixer and a feed-forward layer, each on a residual branch.

    Attributes:
        mixer: a configuration of `layers.MIXERS`.
        feed_forward: one of `layers.FEED_FORWARDS`; None leaves it out.
        norm: of each branch.
        residual: "pre" x + f(norm(x)), one branch after the other; "post" x + norm(f(x)) likewise; "parallel"
            x + mixer(norm(x)) + feed_forward(norm(x)) with one norm.
        multiplier: of what each branch adds.
    """

    mixer: LayerConfig
    feed_forward: LayerConfig | None = SwiGLUConfig()
    norm: Norm = "rms_norm"
    residual: Literal["pre", "parallel", "post"] = "pre"
    multiplier: float = 1.0

    readers = {
        "mixer": named(MIXERS, "BlockConfig.mixer"),
        "feed_forward": lambda v: None if v is None else named(FEED_FORWARDS, "BlockConfig.feed_forward")(v),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, table in (("mixer", MIXERS), ("feed_forward", FEED_FORWARDS)):
            got = getattr(self, name)
            if not isinstance(got, LayerConfig) and not (name == "feed_forward" and got is None):
                raise ValueError(
                    f"BlockConfig: {name} is {got!r}, wants a configuration such as "
                    f"{next(iter(table.values())).__name__}()."
                )

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return (self.mixer,) if self.feed_forward is None else (self.mixer, self.feed_forward)


@dataclasses.dataclass(frozen=True)
class Stage(Config):
    """Blocks from bottom to top, `repeats` times."""

    blocks: tuple[BlockConfig, ...]
    repeats: int = 1

    readers = {"blocks": lambda values: tuple(BlockConfig.from_dict(block) for block in values)}

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        super().__post_init__()
        if not self.blocks or not all(isinstance(block, BlockConfig) for block in self.blocks):
            raise ValueError(f"Stage: blocks is {self.blocks!r}, wants at least one BlockConfig.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """The shape of a `Decoder`.

    Attributes:
        vocab_size, d_model: sizes.
        stages: from bottom to top.
        embed_norm: a norm right after the embedding; None leaves it out.
        final_norm: ahead of the head.
        tie_embeddings: the output head is the embedding, transposed.
        norm_eps: of every norm.
        init_std: of embeddings and projections; those that end a residual branch are divided by the root of the number
            of branches, sqrt(2·layers).
        dtype: of computation ("bfloat16"); recurrences' states, decays, norms, scores and logits stay float32.
        param_dtype: of parameters.
        remat: what the backward pass recomputes: None nothing, "full" all but each repeat's input, "dots" all but
            that and the results of matrix products with parameters.
    """

    vocab_size: int
    d_model: int
    stages: tuple[Stage, ...]
    embed_norm: Norm | None = None
    final_norm: Norm = "rms_norm"
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: Remat | None = None

    readers = {"stages": lambda values: tuple(Stage.from_dict(stage) for stage in values)}

    def __post_init__(self) -> None:
        """Check the fields, and that every layer has whole sizes at this width.

        Raises:
            ValueError: what does not fit.
        """
        object.__setattr__(self, "stages", tuple(self.stages))
        super().__post_init__()
        if not self.stages or not all(isinstance(stage, Stage) for stage in self.stages):
            raise ValueError(f"DecoderConfig: stages is {self.stages!r}, wants at least one Stage.")
        problems = []
        for layer in dict.fromkeys(layer for stage in self.stages for block in stage.blocks for layer in block.layers):
            try:
                layer.check(self.d_model)
            except ValueError as problem:
                problems.append(str(problem))
        if problems:
            raise ValueError(f"DecoderConfig: {' '.join(problems)}")

    @property
    def num_layers(self) -> int:
        """Blocks, all repeats counted."""
        return sum(len(stage.blocks) * stage.repeats for stage in self.stages)

    @classmethod
    def hybrid(
        cls,
        pattern: str,
        *,
        linear: LayerConfig | None = None,
        attention: LayerConfig | None = None,
        num_layers: int,
        block: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> "DecoderConfig":
        """A decoder whose layers repeat a pattern of L (`linear`) and N (`attention`), from bottom to top.

        >>> DecoderConfig.hybrid("LLLN", linear=GLA, num_layers=8, vocab_size=256, d_model=64)  # doctest: +SKIP

        Args:
            attention: None is `SoftmaxAttentionConfig()`.
            num_layers: blocks, a multiple of the pattern's length.
            block: further fields of every `BlockConfig`, such as {"norm": "layer_norm"}.
            rest: the other fields of the decoder.

        Raises:
            ValueError: another letter, L without `linear`, a number of layers that the pattern does not divide.
        """
        letters = {"L": linear, "N": attention or SoftmaxAttentionConfig()}
        blocks = []
        for letter in pattern:
            mixer = letters.get(letter)
            if mixer is None:
                raise ValueError(
                    f"DecoderConfig.hybrid: {letter!r} in pattern {pattern!r}, wants letters L, with linear=, and N."
                )
            blocks.append(BlockConfig(mixer=mixer, **block or {}))
        return cls(stages=repeated("DecoderConfig.hybrid", blocks, num_layers), **rest)


def repeated(caller: str, blocks: Sequence[BlockConfig], num_layers: int) -> tuple[Stage, ...]:
    """Stages of `num_layers` blocks that repeat `blocks`.

    One stage that repeats the shortest period; ahead of it, where the lowest layer of some kind differs from those
    above it (`LayerConfig.first`), one with the first period alone.

    Raises:
        ValueError: no blocks; a number of layers that the blocks do not divide.
    """
    n = len(blocks)
    if n == 0:
        raise ValueError(f"{caller}: pattern is empty; give letters L and N, or names of layers.")
    blocks = tuple(blocks)
    size = next(p for p in range(1, n + 1) if n % p == 0 and blocks[:p] * (n // p) == blocks)
    period = blocks[:size]
    if type(num_layers) is not int or num_layers < 1 or num_layers % size:
        raise ValueError(
            f"{caller}: num_layers={num_layers!r} is no multiple of the pattern's {size} layers; change one."
        )
    lowest, seen = [], set()
    for block in period:
        lowest.append(block if block.mixer in seen else dataclasses.replace(block, mixer=block.mixer.first()))
        seen.add(block.mixer)
    repeats = num_layers // size
    if tuple(lowest) == period:
        return (Stage(period, repeats),)
    return (Stage(tuple(lowest), 1), *([Stage(period, repeats - 1)] if repeats > 1 else []))
