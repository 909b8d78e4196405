"""Gated linear attention: S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

g is the natural log of the decay of each key channel, <= 0.

Source: Yang et al. 2023, arXiv:2312.06635, eq. 3 (our g is the log of their alpha).
"""

from ..core.arguments import CHANNEL_DECAYS, KEYS, QUERIES, VALUES
from ..core.operator import Operator
from ._diagonal import DIAGONAL_DECAY

gla = Operator(
    name="gla",
    recurrence=DIAGONAL_DECAY,
    arguments={"q": QUERIES, "k": KEYS, "v": VALUES, "g": CHANNEL_DECAYS},
    about=__doc__,
)
