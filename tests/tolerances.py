"""The one table of tolerances and the comparison, which the kit holds."""

from lineax_seq.testing import (
    GRADIENTS as GRADIENTS,
    OUTPUTS as OUTPUTS,
    assert_close as assert_close,
    relative_rms as relative_rms,
)
