"""Kernels of the delta rule: delta_rule, gated_delta_rule, gated_delta_product, kda, gdn2."""

import kernel_cases
import numpy as np
import pytest

import lineax_seq as ls


@pytest.mark.parametrize("operator", [ls.gated_delta_rule, ls.kda, ls.gdn2], ids=lambda operator: operator.name)
def test_float32(operator):
    kernel_cases.check(operator, "float32", starts=(5, 64, 99), H=1)


@pytest.mark.parametrize("operator", [ls.delta_rule, ls.kda], ids=lambda operator: operator.name)
def test_bfloat16(operator):
    kernel_cases.check(operator, "bfloat16", chunk_size=128, T=130)


@pytest.mark.slow
def test_several_steps_a_token():
    kernel_cases.check(ls.gated_delta_product, "float32", T=40)


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_key_at_every_token(dtype, beta):
    """Powers of A reach 1e27, its inverse stays small."""

    def change(args):
        key = np.zeros_like(args["k"])
        key[..., 0] = 1.0  # of length one in either dtype
        return {**args, "k": key, "beta": np.full_like(args["beta"], beta)}

    kernel_cases.check(ls.delta_rule, dtype, change=change)


@pytest.mark.parametrize("operator", [ls.gated_delta_rule, ls.kda], ids=lambda operator: operator.name)
def test_strong_gates_among_weak_ones(operator):
    def change(args):
        g = args["g"].copy()
        g[:, 20::7], g[:, 70:80] = -1e4, -30.0
        return {**args, "g": g}

    kernel_cases.check(operator, "float32", change=change)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [64, 128])
@pytest.mark.parametrize("width", [(64, 256), (128, 128), (256, 64)], ids=str)
@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule", "gated_delta_product", "kda", "gdn2"])
def test_product(name, dtype, chunk_size, width):
    sizes = dict(T=chunk_size + 33, K=width[0], V=width[1])
    kernel_cases.check(ls.RECURRENCES[name], dtype, chunk_size, starts=(7, chunk_size), H=2, HV=4, **sizes)
