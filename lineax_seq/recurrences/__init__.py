"""The registry: every public recurrence, one line each. Tests, benchmarks and layers run over it."""

from .delta_rule import delta_rule
from .gated_delta_product import gated_delta_product
from .gated_delta_rule import gated_delta_rule
from .gdn2 import gdn2
from .gla import gla
from .hgrn import hgrn
from .hgrn2 import hgrn2
from .kda import kda
from .lightnet import lightnet, lightnet_2d as lightnet_2d
from .lightning_attention import lightning_attention
from .linear_attention import linear_attention
from .log_linear_attention import log_linear_attention
from .mamba import mamba
from .mlstm import mlstm
from .normalized_linear_attention import normalized_linear_attention
from .retention import retention
from .rg_lru import rg_lru
from .rwkv6 import rwkv6
from .rwkv7 import rwkv7
from .simple_gla import simple_gla
from .ssd import ssd

RECURRENCES = {
    operator.name: operator
    for operator in (
        linear_attention,
        normalized_linear_attention,
        retention,
        lightning_attention,
        simple_gla,
        ssd,
        gla,
        hgrn2,
        rwkv6,
        lightnet,
        delta_rule,
        gated_delta_rule,
        gated_delta_product,
        kda,
        gdn2,
        rwkv7,
        mlstm,
        hgrn,
        rg_lru,
        mamba,
        log_linear_attention,
    )
}
