"""Every matrix-state kernel in every shape, against the token scan and by the real compiler."""

import kernel_cases
import pytest

import lineax_seq as ls
from pallas_kernels import KERNELS

NAMES = (
    *("linear_attention", "retention", "lightning_attention", "simple_gla", "ssd", "mlstm"),
    *("gla", "hgrn2", "rwkv6", "lightnet"),
    *("delta_rule", "gated_delta_rule", "gated_delta_product", "kda", "gdn2", "rwkv7"),
)
TWICE = {"mlstm"}  # its kernel runs for the numerators and for the denominators
QUICK = ("simple_gla", "linear_attention", "gla", "rwkv6", "lightnet", "gated_delta_rule", "kda", "rwkv7")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [64, 128])
@pytest.mark.parametrize("width", [(64, 256), (128, 128), (256, 64)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_product(name, dtype, chunk_size, width):
    sizes = dict(T=chunk_size + 33, K=width[0], V=width[1], N=width[0], D=width[1], L=2)
    kernel_cases.check(ls.RECURRENCES[name], dtype, chunk_size, starts=(7, chunk_size), H=2, HV=4, **sizes)


@kernel_cases.compiler
def test_compiles_for_a_tpu():
    kernel_cases.assert_compiles([(name, "v5e") for name in QUICK])


@pytest.mark.slow
@kernel_cases.compiler
@pytest.mark.parametrize("target", kernel_cases.TARGETS)
def test_compiles_in_all_shapes(target):
    names = [name for name in NAMES if name not in TWICE]
    kernel_cases.assert_compiles([(name, target) for name in names], kernel_cases.SHAPES)


def test_names_are_all_that_have_a_kernel():
    """All but those of elementwise recurrences, whose state is no matrix."""
    kernels = {record for _, role, record in KERNELS if role == "chunk"} - {"vector_decay", "selective"}
    assert set(NAMES) == {name for name, op in ls.RECURRENCES.items() if op.recurrence.name in kernels}
