"""Layers in Flax NNX. A configuration makes a layer, and every layer is used in the same way:

layer = GatedDeltaNetConfig(num_heads=4).make(512, rngs=nnx.Rngs(0))
y = layer(x, segment_ids=..., positions=...)             whole sequences [B, T, D]; with axis_name=, one shard of them
cache = layer.init_cache(batch, max_length)
y, cache = layer.prefill(x, cache, lengths=...)          a prompt, padded on the right
y_t, cache = layer.step(x_t, cache)                      one token [B, D]

`MIXERS` and `FEED_FORWARDS` list them by name. A recurrence becomes a layer through `OperatorMixerConfig`, or with an
architecture of its own by subclassing `Mixer`.
"""

from ._attention import (
    AttentionCache as AttentionCache,
    SoftmaxAttention as SoftmaxAttention,
    SoftmaxAttentionConfig as SoftmaxAttentionConfig,
)
from ._attention_core import causal_attention as causal_attention
from ._config import Config as Config, LayerConfig as LayerConfig, RecurrentConfig as RecurrentConfig
from ._context import Context as Context
from ._conv import ShortConv as ShortConv
from ._delta_net import (
    DeltaNet as DeltaNet,
    DeltaNetConfig as DeltaNetConfig,
    GatedDeltaNet as GatedDeltaNet,
    GatedDeltaNetConfig as GatedDeltaNetConfig,
)
from ._feed_forward import FeedForward as FeedForward, SwiGLU as SwiGLU, SwiGLUConfig as SwiGLUConfig
from ._gla import (
    GatedLinearAttention as GatedLinearAttention,
    GatedLinearAttentionConfig as GatedLinearAttentionConfig,
)
from ._kinds import KINDS as KINDS, Kind as Kind, parameter_kinds as parameter_kinds
from ._layer import Layer as Layer
from ._mixer import Mixer as Mixer, MixerCache as MixerCache
from ._mlstm import MLSTM as MLSTM, MLSTMConfig as MLSTMConfig
from ._norm import (
    GatedRMSNorm as GatedRMSNorm,
    LayerNorm as LayerNorm,
    RMSNorm as RMSNorm,
    l2_normalize as l2_normalize,
    rms_norm as rms_norm,
)
from ._operator_mixer import OperatorMixer as OperatorMixer, OperatorMixerConfig as OperatorMixerConfig
from ._parts import Parts as Parts
from ._rotary import rotary as rotary, segment_positions as segment_positions
from ._rwkv7 import (
    RWKV7 as RWKV7,
    RWKV7ChannelMix as RWKV7ChannelMix,
    RWKV7ChannelMixConfig as RWKV7ChannelMixConfig,
    RWKV7Config as RWKV7Config,
)
from ._tap import Tap as Tap, Taps as Taps, TokenShift as TokenShift

MIXERS: dict[str, type[LayerConfig]] = {
    config.name: config
    for config in (
        GatedLinearAttentionConfig,
        DeltaNetConfig,
        GatedDeltaNetConfig,
        MLSTMConfig,
        RWKV7Config,
        OperatorMixerConfig,
        SoftmaxAttentionConfig,
    )
}
FEED_FORWARDS: dict[str, type[LayerConfig]] = {config.name: config for config in (SwiGLUConfig, RWKV7ChannelMixConfig)}
