"""The laws of this library as a kit for your own recurrence, kernel, layer or task.

>>> import lineax_seq as ls
>>> from lineax_seq.testing import check_recurrence
>>> check_recurrence(ls.linear_attention, laws=["associative and an action", "causality"])

A check returns nothing when all laws hold. Otherwise it raises an AssertionError that names every broken law, the
arrays that are wrong, what was got and wanted in the worst place, and the call that shows it again.
"""

from ._case import CHUNK as CHUNK, SIZES as SIZES, Case as Case, evaluate as evaluate, reference as reference
from ._closeness import (
    GRADIENTS as GRADIENTS,
    OUTPUTS as OUTPUTS,
    assert_close as assert_close,
    relative_rms as relative_rms,
)
from ._kernel import check_kernel as check_kernel, kernel_laws as kernel_laws
from ._layer import check_layer as check_layer, layer_laws as layer_laws
from ._recurrence import check_recurrence as check_recurrence, recurrence_laws as recurrence_laws
from ._task import check_task as check_task, task_laws as task_laws
