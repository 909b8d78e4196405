"""Models in Flax NNX: a decoder over any mixture of linear and softmax layers, its loss and its decoding."""

from ._config import DecoderConfig as DecoderConfig
from ._decoder import Block as Block, Decoder as Decoder
from ._generate import generate as generate
from ._loss import cross_entropy as cross_entropy
from ._sampling import filter_top_k as filter_top_k, filter_top_p as filter_top_p, sample as sample
