"""The delta rule: S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = q_t S_t.

Keys are the caller's to normalise: with |k| = 1 the transition's eigenvalues are 1 and 1 - beta, so beta in [0, 2]
keeps it from growing.

Source: Schlag et al. 2021, arXiv:2102.11174, eq. 24; chunk form Yang et al. 2024, arXiv:2406.06484, section 3.
"""

from ..core.arguments import QUERIES, RATES, UNIT_KEYS, VALUES
from ..core.operator import Operator
from ._delta import DELTA

delta_rule = Operator(
    name="delta_rule",
    recurrence=DELTA,
    arguments={"q": QUERIES, "k": UNIT_KEYS, "v": VALUES, "beta": RATES},
    about=__doc__,
    cpu_chunk_size=32,
)
