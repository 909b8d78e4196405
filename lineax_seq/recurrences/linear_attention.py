"""Linear attention: S_t = S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

Feature maps of q and k are the caller's; there is no denominator. `causal=False` reads every token of the document.

Source: Katharopoulos et al. 2020, arXiv:2006.16236, eq. 9-12 without the normaliser; Qin et al. 2022, arXiv:2210.10340
(NormAttention).
"""

from ..core.arguments import KEYS, QUERIES, VALUES
from ..core.operator import Operator
from ._bidirectional import undecayed
from ._scalar import NO_DECAY

linear_attention = Operator(
    name="linear_attention",
    recurrence=NO_DECAY,
    arguments={"q": QUERIES, "k": KEYS, "v": VALUES},
    about=__doc__,
    bidirectional=undecayed,
    order_free=True,
    takes_blocks=True,
)
