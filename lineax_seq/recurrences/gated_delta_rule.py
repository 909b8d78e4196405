"""The gated delta rule: S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = q_t S_t.

g is the natural log of the head's decay, <= 0. Keys are the caller's to normalise.

Source: Yang et al. 2024, arXiv:2412.06464, eq. 10 (our exp g is their alpha).
"""

from ..core.arguments import HEAD_DECAYS, QUERIES, RATES, UNIT_KEYS, VALUES
from ..core.operator import Operator
from ._delta import DELTA_SCALAR_DECAY

gated_delta_rule = Operator(
    name="gated_delta_rule",
    recurrence=DELTA_SCALAR_DECAY,
    arguments={"q": QUERIES, "k": UNIT_KEYS, "v": VALUES, "g": HEAD_DECAYS, "beta": RATES},
    about=__doc__,
    cpu_chunk_size=32,
)
