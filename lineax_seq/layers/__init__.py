"""Layers in Flax NNX. Every mixing layer is used in the same way, with caches that are plain pytrees:

y = layer(x, segment_ids=..., positions=...)             whole sequences [B, T, D]; with axis_name=, one shard of them
cache = layer.init_cache(batch, max_length)
y, cache = layer.prefill(x, cache, lengths=...)          a prompt, padded on the right
y_t, cache = layer.step(x_t, cache)                      one token [B, D]
"""

from ._attention import AttentionCache as AttentionCache, SoftmaxAttention as SoftmaxAttention
from ._attention_core import causal_attention as causal_attention
from ._conv import ShortConv as ShortConv
from ._delta_net import DeltaNet as DeltaNet, GatedDeltaNet as GatedDeltaNet
from ._gla import GatedLinearAttention as GatedLinearAttention
from ._linear import LinearLayer as LinearLayer, RecurrentCache as RecurrentCache
from ._mlp import SwiGLU as SwiGLU
from ._norm import GatedRMSNorm as GatedRMSNorm, RMSNorm as RMSNorm, l2_normalize as l2_normalize, rms_norm as rms_norm
from ._rotary import rotary as rotary, segment_positions as segment_positions

LINEAR_LAYERS = {
    "gla": GatedLinearAttention,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
}
