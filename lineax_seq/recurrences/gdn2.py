"""The gated delta rule 2: S_t = (I - k_t (b_t * k_t)^T) diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T,  o_t = q_t S_t.

Erasing and writing have gates of their own: b per key channel, w per value channel; b = w = beta is Kimi delta
attention. g is the natural log of each key channel's decay, <= 0. Keys are the caller's to normalise; with |k| = 1 and
b in [0, 1] the transition's eigenvalues stay in [0, 1], but it is not symmetric and may lengthen a vector for a while.

Source: Hatamizadeh et al. 2026 (Gated DeltaNet-2), arXiv:2605.22791, the Gated Delta Rule-2 recurrence (our exp g is
the diagonal of their D).
"""

from ..core.arguments import CHANNEL_DECAYS, QUERIES, UNIT_KEYS, VALUES, Argument, rate
from ..core.operator import Operator
from ._delta import DELTA_CHANNEL_GATES

gdn2 = Operator(
    name="gdn2",
    recurrence=DELTA_CHANNEL_GATES,
    arguments={
        "q": QUERIES,
        "k": UNIT_KEYS,
        "v": VALUES,
        "g": CHANNEL_DECAYS,
        "b": Argument("B T HV K", rate),
        "w": Argument("B T HV V", rate),
    },
    about=__doc__,
    cpu_chunk_size=32,
)
