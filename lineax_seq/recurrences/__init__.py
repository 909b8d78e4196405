"""The registry: every public recurrence, one line each. Tests, benchmarks and layers run over it."""

from .delta_rule import delta_rule
from .gated_delta_product import gated_delta_product
from .gated_delta_rule import gated_delta_rule
from .gdn2 import gdn2
from .gla import gla
from .hgrn2 import hgrn2
from .kda import kda
from .lightning_attention import lightning_attention
from .linear_attention import linear_attention
from .retention import retention
from .rwkv6 import rwkv6
from .rwkv7 import rwkv7
from .simple_gla import simple_gla
from .ssd import ssd

RECURRENCES = {
    operator.name: operator
    for operator in (
        linear_attention,
        retention,
        lightning_attention,
        simple_gla,
        ssd,
        gla,
        hgrn2,
        rwkv6,
        delta_rule,
        gated_delta_rule,
        gated_delta_product,
        kda,
        gdn2,
        rwkv7,
    )
}
