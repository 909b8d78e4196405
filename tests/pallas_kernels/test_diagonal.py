"""Kernels of one decay per key channel: gla, hgrn2, rwkv6."""

import kernel_cases
import numpy as np
import pytest

import lineax_seq as ls


def test_float32():
    kernel_cases.check(ls.gla, "float32", starts=(5, 64, 99), H=1)


def test_bfloat16():
    kernel_cases.check(ls.gla, "bfloat16", chunk_size=128, T=140, V=128)


def test_keys_that_the_gates_make():
    kernel_cases.check(ls.hgrn2, "bfloat16", T=70)


def test_a_query_that_reads_the_state_before_its_token():
    kernel_cases.check(ls.rwkv6, "float32", starts=(5, 64), T=70)


@pytest.mark.parametrize("strength", [-1.5, -15.0])
def test_uniform_strong_gates(strength):
    """Sums of gates over a chunk, and at -15 over a few tokens, that leave float32's range either way."""
    kernel_cases.check(ls.gla, "float32", change=lambda args: {**args, "g": np.full_like(args["g"], strength)})


def test_strong_gates_among_weak_ones():
    def change(args):
        g = args["g"].copy()
        g[:, 20::7, :, ::3], g[:, 30::11, :, 1::3] = -1e4, -30.0
        return {**args, "g": g}

    kernel_cases.check(ls.gla, "float32", change=change)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [64, 128])
@pytest.mark.parametrize("width", [(64, 256), (128, 128), (256, 64)], ids=str)
@pytest.mark.parametrize("name", ["gla", "hgrn2", "rwkv6"])
def test_product(name, dtype, chunk_size, width):
    sizes = dict(T=chunk_size + 33, K=width[0], V=width[1])
    kernel_cases.check(ls.RECURRENCES[name], dtype, chunk_size, starts=(7, chunk_size), H=2, HV=4, **sizes)


@kernel_cases.compiler
def test_compiles_for_a_tpu():
    kernel_cases.assert_compiles([("gla", "v5e"), ("rwkv6", "v5e")])


@pytest.mark.slow
@kernel_cases.compiler
@pytest.mark.parametrize("target", kernel_cases.TARGETS)
def test_compiles_in_all_shapes(target):
    kernel_cases.assert_compiles([(name, target) for name in ("gla", "hgrn2", "rwkv6")], kernel_cases.SHAPES)
