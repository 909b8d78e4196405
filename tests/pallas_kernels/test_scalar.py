"""Kernels of one decay per head, or none: linear_attention, retention, lightning_attention, simple_gla, ssd, mlstm."""

import kernel_cases
import numpy as np
import pytest

import lineax_seq as ls


@pytest.mark.parametrize("operator", [ls.linear_attention, ls.simple_gla], ids=lambda operator: operator.name)
def test_float32(operator):
    """A tail, documents that start inside, at the start and at the end of chunks, value heads that share a key head."""
    kernel_cases.check(operator, "float32", starts=(5, 64, 99), H=1, V=128)


def test_bfloat16():
    kernel_cases.check(ls.simple_gla, "bfloat16", chunk_size=128, T=140)


def test_an_odd_number_of_wide_heads():
    kernel_cases.check(ls.simple_gla, "bfloat16", H=1, HV=3, K=256, T=20)


def test_strong_and_weak_gates():
    """A gate that forgets everything costs the tokens after it no digits."""

    def change(args):
        g = args["g"].copy()
        g[:, 20::7], g[:, 70:80] = -1e4, -30.0
        return {**args, "g": g}

    kernel_cases.check(ls.simple_gla, "float32", change=change)


def test_an_infinite_gate_forgets():
    case = kernel_cases.Case(ls.simple_gla, **kernel_cases.SIZES).rounded("float32")
    g = np.asarray(case.args["g"]).copy()
    g[:, 30] = -np.inf
    case.args = {**case.args, "g": g}
    (o, final), grads = kernel_cases.through_kernel(case, ls.simple_gla, "float32")
    apart = kernel_cases.Case(ls.simple_gla, **kernel_cases.SIZES).rounded("float32").packed(30)
    (want, want_final), _ = kernel_cases.through_kernel(apart, ls.simple_gla, "float32")
    kernel_cases.assert_close((o, final), (want, want_final), kernel_cases.OUTPUTS["float32"])
    assert all(np.isfinite(x).all() for x in (*grads[0].values(), grads[1]))


def test_stabilised_inputs():
    """mLSTM's state is a triple, the third of which no gradient reaches."""
    kernel_cases.check(ls.mlstm, "float32", starts=(5, 64), T=70)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [64, 128])
@pytest.mark.parametrize("width", [(64, 256), (128, 128), (256, 64)], ids=str)
@pytest.mark.parametrize("name", ["linear_attention", "retention", "lightning_attention", "simple_gla", "ssd", "mlstm"])
def test_product(name, dtype, chunk_size, width):
    sizes = dict(T=chunk_size + 33, K=width[0], V=width[1], N=width[0], D=width[1], L=2)
    kernel_cases.check(ls.RECURRENCES[name], dtype, chunk_size, starts=(7, chunk_size), H=2, HV=4, **sizes)


@kernel_cases.compiler
def test_compiles_for_a_tpu():
    kernel_cases.assert_compiles([("simple_gla", "v5e"), ("linear_attention", "v5e")])


@pytest.mark.slow
@kernel_cases.compiler
@pytest.mark.parametrize("target", kernel_cases.TARGETS)
def test_compiles_in_all_shapes(target):
    kernel_cases.assert_compiles([(name, target) for name in ("simple_gla", "linear_attention")], kernel_cases.SHAPES)
