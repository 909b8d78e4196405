"""float32 over long sequences: rounding does not pile up over the chunks."""

import pytest
from cases import Case, evaluate, reference
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls

LENGTH = 65_536
SMALL = dict(B=1, H=1, HV=1, K=8, V=8, D=4, N=4, NH=2, L=LENGTH.bit_length())
QUICK = ("simple_gla", "gated_delta_rule", "mlstm")  # one of each kind of state; the others under `slow`


@pytest.mark.parametrize(
    "operator",
    [
        pytest.param(operator, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, operator in ls.RECURRENCES.items()
    ],
)
def test_long_sequences(operator):
    case = Case(operator, T=LENGTH, **SMALL).packed(LENGTH // 3).rounded("float32")
    out, grads = reference(operator, case)
    got, got_grads = evaluate(operator, "chunk", case, "float32", chunk_size=None)
    assert_close(got, out, OUTPUTS["float32"], "outputs")
    assert_close(got_grads, grads, GRADIENTS["float32"], "gradients")
