"""The kit's cases, under the name that the suite's own tests import."""

from lineax_seq.testing import (
    CHUNK as CHUNK,
    SIZES as SIZES,
    Case as Case,
    evaluate as evaluate,
    reference as reference,
)
