"""lineax_seq: linear recurrences in JAX, each in every form.

>>> import lineax_seq as ls
>>> o, final_state = ls.gated_delta_rule(q, k, v, g, beta)  # doctest: +SKIP
"""

from . import parallel as parallel
from .core.operator import Operator as Operator
from .core.recurrence import Recurrence as Recurrence
from .recurrences import (
    RECURRENCES as RECURRENCES,
    delta_rule as delta_rule,
    gated_delta_product as gated_delta_product,
    gated_delta_rule as gated_delta_rule,
    gdn2 as gdn2,
    gla as gla,
    hgrn as hgrn,
    hgrn2 as hgrn2,
    kda as kda,
    lightnet as lightnet,
    lightnet_2d as lightnet_2d,
    lightning_attention as lightning_attention,
    linear_attention as linear_attention,
    log_linear_attention as log_linear_attention,
    mamba as mamba,
    mlstm as mlstm,
    normalized_linear_attention as normalized_linear_attention,
    retention as retention,
    rg_lru as rg_lru,
    rwkv6 as rwkv6,
    rwkv7 as rwkv7,
    simple_gla as simple_gla,
    ssd as ssd,
)

__version__ = "0.1.0"
