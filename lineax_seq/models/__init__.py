"""Models in Flax NNX: a decoder over stages of any layers, its loss and its decoding."""

from ._config import BlockConfig as BlockConfig, DecoderConfig as DecoderConfig, Stage as Stage
from ._decoder import Block as Block, Decoder as Decoder, DecoderCache as DecoderCache
from ._generate import generate as generate
from ._hybrid import HybridConfig as HybridConfig
from ._loss import cross_entropy as cross_entropy
from ._sampling import filter_top_k as filter_top_k, filter_top_p as filter_top_p, sample as sample
