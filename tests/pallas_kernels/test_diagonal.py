"""Kernels of one decay per key channel: gla, hgrn2, rwkv6, lightnet."""

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


@pytest.mark.parametrize("largest", [1.0, 30.0])
def test_a_running_softmax(largest):
    """Logits that dwarf those before them, masked tokens, in the first place too, and a masked document."""

    def change(args):
        k = args["k"] * largest
        k[:, :1], k[:, 40:43], k[:, 70:80, :, ::2], k[:, 85:92] = -1e30, -1e30, -1e30, -1e30
        return {**args, "k": k}

    kernel_cases.check(ls.lightnet, "float32", starts=(5, 64, 85, 92), H=1, change=change)


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
