"""Kernels for TPUs. `KERNELS` is the list of all; a new kernel is one file of this folder and one line here.

A family of matrix-state kernels gets its line in `FAMILIES` instead, and with it a kernel for one token.
"""

from . import delta, diagonal, low_rank, scalar
from ._matrix_state import chunk_kernel
from .bonus import BONUS
from .decode import step_kernel
from .running_softmax import RUNNING_SOFTMAX
from .selective import SELECTIVE
from .stabilised import STABILISED
from .vector import VECTOR_DECAY

FAMILIES = (
    scalar.NO_DECAY,
    scalar.SCALAR_DECAY,
    diagonal.DIAGONAL_DECAY,
    delta.DELTA,
    delta.DELTA_SCALAR_DECAY,
    delta.DELTA_DIAGONAL_DECAY,
    delta.DELTA_CHANNEL_GATES,
    low_rank.DIAGONAL_PLUS_LOW_RANK,
)
KERNELS = (
    *(chunk_kernel(family) for family in FAMILIES),
    *(step_kernel(family) for family in FAMILIES),
    BONUS,
    RUNNING_SOFTMAX,
    STABILISED,
    VECTOR_DECAY,
    SELECTIVE,
)
