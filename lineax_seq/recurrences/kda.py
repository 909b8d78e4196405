"""Kimi delta attention: S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,  o_t = q_t S_t.

The gated delta rule with one decay per key channel: g is its natural log, <= 0. Keys are the caller's to normalise.

Source: Kimi Team 2025 (Kimi Linear), arXiv:2510.26692, section 3 (our exp g is their alpha).
"""

from ..core.arguments import CHANNEL_DECAYS, QUERIES, RATES, UNIT_KEYS, VALUES
from ..core.operator import Operator
from ._delta import DELTA_DIAGONAL_DECAY

kda = Operator(
    name="kda",
    recurrence=DELTA_DIAGONAL_DECAY,
    arguments={"q": QUERIES, "k": UNIT_KEYS, "v": VALUES, "g": CHANNEL_DECAYS, "beta": RATES},
    about=__doc__,
    cpu_chunk_size=32,
)
