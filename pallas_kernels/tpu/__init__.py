"""Kernels for TPUs. `MATRIX_STATE`: record -> its chunk form, of the families whose state is a matrix per head."""

import functools

from . import delta, diagonal, low_rank, scalar
from ._call import chunk_form
from .bonus import chunk_form_with_bonus
from .running_softmax import chunk_form_running_softmax
from .stabilised import chunk_form_stabilised

FAMILIES = (
    *(scalar.NO_DECAY, scalar.SCALAR_DECAY, diagonal.DIAGONAL_DECAY),
    *(delta.DELTA, delta.DELTA_SCALAR_DECAY, delta.DELTA_DIAGONAL_DECAY, delta.DELTA_CHANNEL_GATES),
    low_rank.DIAGONAL_PLUS_LOW_RANK,
)
MATRIX_STATE = {family.name: functools.partial(chunk_form, family) for family in FAMILIES}
MATRIX_STATE |= {
    "diagonal_decay_bonus": chunk_form_with_bonus,
    "running_softmax": chunk_form_running_softmax,
    "diagonal_plus_low_rank": low_rank.chunk_form_low_rank,
    "stabilised": chunk_form_stabilised,
}
