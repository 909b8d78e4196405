"""HGRN: h_t = exp(g_t) h_{t-1} + x_t, elementwise, and the output is h_t.

g is the natural log of the decay of each channel, <= 0. HGRN's input is x_t = (1 - exp g_t) i_t; any other gives any
elementwise recurrence.

Source: Qin et al. 2023, arXiv:2311.04823, section 3 (our exp g is their forget gate; real-valued).
"""

from ..core.arguments import Argument, log_decay
from ..core.operator import Operator
from ._vector import VECTOR_DECAY

hgrn = Operator(
    name="hgrn",
    recurrence=VECTOR_DECAY,
    arguments={"x": Argument("B T D"), "g": Argument("B T D", log_decay)},
    about=__doc__,
    scaled=False,
    state="[B, D]",
)
