"""lineax_seq: linear recurrences in JAX, each in every form.

>>> import lineax_seq as ls
>>> o, final_state = ls.gated_delta_rule(q, k, v, g, beta)  # doctest: +SKIP
"""

from .operator import Operator as Operator
from .recurrence import Recurrence as Recurrence
from .recurrences import (
    RECURRENCES as RECURRENCES,
    delta_rule as delta_rule,
    gated_delta_rule as gated_delta_rule,
    gla as gla,
    linear_attention as linear_attention,
    retention as retention,
    simple_gla as simple_gla,
)

__version__ = "0.1.0"
