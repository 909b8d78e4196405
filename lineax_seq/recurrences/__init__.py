"""The registry: every public recurrence, one line each. Tests, benchmarks and layers run over it."""

from .delta_rule import delta_rule
from .gated_delta_rule import gated_delta_rule
from .gla import gla
from .linear_attention import linear_attention
from .retention import retention
from .simple_gla import simple_gla

RECURRENCES = {
    operator.name: operator
    for operator in (
        linear_attention,
        retention,
        simple_gla,
        gla,
        delta_rule,
        gated_delta_rule,
    )
}
