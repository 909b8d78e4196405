"""The decode kernel against the library's own step, in the strict interpreter."""

import functools

import jax
import jax.numpy as jnp
import pytest
from tolerances import OUTPUTS, assert_close

import lineax_seq as ls
from pallas_kernels import KERNELS, interpret, machine_here

QUICK = [("simple_gla", "float32", 4), ("kda", "bfloat16", 8), ("rwkv7", "float32", 2)]
ALL = ["linear_attention", "simple_gla", "gla", "delta_rule", "gated_delta_rule", "kda", "gdn2", "rwkv7"]


def check(name: str, dtype: str, HV: int, K: int = 64, V: int = 64):
    operator = ls.RECURRENCES[name]
    x = operator.example(jax.random.key(0), B=2, T=1, H=2, HV=HV, K=K, V=V, dtype=jnp.dtype(dtype))
    state = jax.random.normal(jax.random.key(1), (2, HV, K, V))
    kernel, scale = KERNELS["tpu", "step", operator.recurrence.name], operator.default_scale or K**-0.5
    with interpret():
        step = functools.partial(kernel, machine_here(), scale, None)
        new, o = jax.jit(lambda x, state: step(x, None, state))(x, state)
    want_o, want = operator.step(**{argument: value[:, 0] for argument, value in x.items()}, state=state)
    assert o.dtype == want_o.dtype
    assert_close(new, want, OUTPUTS["float32"], f"{name} state")
    assert_close(o[:, 0], want_o, OUTPUTS[dtype], f"{name} output")


@pytest.mark.parametrize(("name", "dtype", "HV"), QUICK)
def test_kernel_is_the_step(name, dtype, HV):
    check(name, dtype, HV)


def test_the_public_step_takes_it():
    """A recurrence in disguise: retention's decays come from its lowering."""
    x = ls.retention.example(jax.random.key(0), B=2, T=1, H=2, HV=4, K=64, V=128)
    x = {argument: value[:, 0] for argument, value in x.items()}
    state = jax.random.normal(jax.random.key(1), (2, 4, 64, 128))
    with interpret():
        got = ls.retention.step(**x, state=state, implementation="mosaic_tpu")
    assert_close(got, ls.retention.step(**x, state=state), OUTPUTS["float32"])


def test_the_public_step_says_why_not():
    x = ls.gated_delta_product.example(jax.random.key(0), B=1, T=1, H=1, K=64, V=64)
    x = {argument: value[:, 0] for argument, value in x.items()}
    with interpret(), pytest.raises(NotImplementedError, match="one step a token, not several"):
        ls.gated_delta_product.step(**x, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="runs on cpu"):
        ls.gla.step(
            **{k: v[:, 0] for k, v in ls.gla.example(jax.random.key(0), B=1, T=1, H=1, K=64, V=64).items()},
            implementation="mosaic_tpu",
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("K", "V"), [(64, 128), (256, 64)])
@pytest.mark.parametrize("name", ALL)
def test_kernel_is_the_step_everywhere(name, K, V, dtype):
    check(name, dtype, 8, K, V)


def test_refusals_say_why():
    step, ones = KERNELS["tpu", "step", "no_decay"], jnp.ones
    fields = {"q": ones((1, 1, 2, 32)), "k": ones((1, 1, 2, 32)), "v": ones((1, 1, 2, 64))}
    with interpret():
        with pytest.raises(NotImplementedError, match=r"no_decay \(one token\) cannot: K=32, wants one of"):
            step(machine_here(), 1.0, None, fields, None, ones((1, 2, 32, 64)))
        with pytest.raises(ValueError, match="one token has neither"):
            wide = {name: ones((1, 1, 2, 64)) for name in "qkv"}
            step(machine_here(), 1.0, 64, wide, None, ones((1, 2, 64, 64)))
