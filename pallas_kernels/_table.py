"""The table that dispatch reads: every platform's list of kernels by platform, role and record."""

from collections.abc import Mapping

from . import tpu
from ._shared.kernel import Kernel, table

KERNELS: Mapping[tuple[str, str, str], Kernel] = table(*tpu.KERNELS)
