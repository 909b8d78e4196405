"""mLSTM: C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,  o_t = q_t C_t / max(|q_t · n_t|, 1).

The gates are given as logarithms: `i` is the log of the input gate, of any size; `f` the log of the forget gate, <= 0
(logsigmoid of its pre-activation). The state is the triple (C, n, m) whose true value is (C exp m, n exp m): m is the
largest log-weight so far, -1e30 where nothing was seen. It is a constant to gradients, which is exact for whatever
depends on the true state only, such as the outputs.

Source: Beck et al. 2024 (xLSTM), arXiv:2405.04517, section 2.3, stabilised as in eq. 15.
"""

from ..core.arguments import HEAD_DECAYS, KEYS, QUERIES, VALUES, Argument
from ..core.operator import Operator
from ._normalised import STABILISED

mlstm = Operator(
    name="mlstm",
    recurrence=STABILISED,
    arguments={"q": QUERIES, "k": KEYS, "v": VALUES, "i": Argument("B T HV"), "f": HEAD_DECAYS},
    about=__doc__,
    logs=("i", "f"),
    zero_is_identity=False,  # i = 0 is an open gate
    state="(C [B, HV, K, V], n [B, HV, K], m [B, HV])",
)
