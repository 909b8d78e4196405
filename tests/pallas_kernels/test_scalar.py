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
