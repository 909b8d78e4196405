"""Kernels whose transition is not diagonal: delta_rule, gated_delta_rule, gated_delta_product, kda, gdn2, rwkv7."""

import kernel_cases
import numpy as np
import pytest

import lineax_seq as ls


@pytest.mark.parametrize("operator", [ls.gated_delta_rule, ls.kda, ls.gdn2, ls.rwkv7], ids=lambda op: op.name)
def test_float32(operator):
    kernel_cases.check(operator, "float32", starts=(5, 64, 99), H=1)


@pytest.mark.parametrize("operator", [ls.delta_rule, ls.kda, ls.rwkv7], ids=lambda operator: operator.name)
def test_bfloat16(operator):
    kernel_cases.check(operator, "bfloat16", chunk_size=128, T=130)


@pytest.mark.slow
def test_several_steps_a_token():
    kernel_cases.check(ls.gated_delta_product, "float32", T=40)


@pytest.mark.parametrize(("dtype", "beta"), [("float32", 2.0), ("bfloat16", 1.0)])
def test_one_key_at_every_token(dtype, beta):
    """Powers of A reach 1e27, its inverse stays small."""

    def change(args):
        key = np.zeros_like(args["k"])
        key[..., 0] = 1.0  # of length one in either dtype
        return {**args, "k": key, "beta": np.full_like(args["beta"], beta)}

    kernel_cases.check(ls.delta_rule, dtype, change=change)


def test_reflections_do_not_drift():
    """beta = 2 along few keys, no decay: nothing fades, and the state carries every rounding along.

    What is written to the state is not rounded to bfloat16, and the error is 3e-3. Rounded, it would be 1.6e-2.
    """

    def change(args):
        keys = np.zeros_like(args["k"])
        keys[:, np.arange(keys.shape[1]), :, np.arange(keys.shape[1]) % 5] = 1.0
        return {**args, "k": keys, "beta": np.full_like(args["beta"], 2.0)}

    case = kernel_cases.Case(ls.delta_rule, **{**kernel_cases.SIZES, "T": 160})
    case.args = change({name: np.asarray(x) for name, x in case.args.items()})
    case.rounded("bfloat16")
    final = kernel_cases.through_kernel(case, ls.delta_rule, "bfloat16")[0][1]
    kernel_cases.assert_close(
        final, kernel_cases.reference(ls.delta_rule, case)[0][1], kernel_cases.OUTPUTS["bfloat16"], "final state"
    )


@pytest.mark.parametrize("operator", [ls.kda, ls.rwkv7], ids=lambda operator: operator.name)
def test_strong_gates_among_weak_ones(operator):
    def change(args):
        g = args["g"].copy()
        g[:, 20::7], g[:, 70:80] = -1e4, -30.0
        return {**args, "g": g}

    kernel_cases.check(operator, "float32", change=change)
