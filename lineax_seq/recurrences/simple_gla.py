"""Linear attention with one decay per head and token: S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

g is the natural log of the decay, <= 0. The core of Mamba-2 (q = C, k = B, v = dt x, g = dt A) and of gated RetNet.

Source: Dao & Gu 2024, arXiv:2405.21060, section 5 and 6 (scalar-identity SSD).
"""

from ..core.arguments import HEAD_DECAYS, KEYS, QUERIES, VALUES
from ..core.operator import Operator
from ._bidirectional import both_ways
from ._scalar import SCALAR_DECAY

simple_gla = Operator(
    name="simple_gla",
    recurrence=SCALAR_DECAY,
    arguments={"q": QUERIES, "k": KEYS, "v": VALUES, "g": HEAD_DECAYS},
    about=__doc__,
    bidirectional=both_ways(SCALAR_DECAY),
    takes_blocks=True,
)
