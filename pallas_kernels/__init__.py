"""Pallas kernels for the recurrences, and a profiler of them; imports only jax.

KERNELS: (implementation, record) -> `(scale, chunk_size, fields, reset, state) -> (final state, o)`, in place of a
record's chunk form. STEPS: the same key -> `(scale, fields, state) -> (new state, o)`, in place of one token. They
raise NotImplementedError, with the reason, for platforms, shapes and dtypes that they do not support.
"""

from ._platform import interpret as interpret
from .tpu import MATRIX_STATE
from .tpu.decode import step
from .tpu.selective import selective
from .tpu.vector import vector_decay

KERNELS = {
    **{("mosaic_tpu", record): kernel for record, kernel in MATRIX_STATE.items()},
    ("mosaic_tpu", "vector_decay"): vector_decay,
    ("mosaic_tpu", "selective"): selective,
}
_STEPS = (
    *("no_decay", "scalar_decay", "diagonal_decay", "diagonal_plus_low_rank"),
    *("delta", "delta_scalar_decay", "delta_diagonal_decay", "delta_channel_gates"),
)
STEPS = {("mosaic_tpu", record): step for record in _STEPS}
