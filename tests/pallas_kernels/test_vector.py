"""The elementwise kernels against the float64 token scan, in the strict interpreter: outputs, states and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, reference
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls
import pallas_kernels
from pallas_kernels.tpu.vector import vector_scan

VECTOR = ("hgrn", "rg_lru", "mamba")


def through_kernel(case: Case, operator: ls.Operator, dtype: str, chunk_size: int = 16):
    """Outputs, final state and every gradient, as `cases.evaluate` has them."""
    narrow = lambda x: jnp.asarray(np.asarray(x), dtype)  # noqa: E731
    args, state = jax.tree.map(narrow, case.args), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case.state)
    d_out = narrow(case.d_out[0]), jnp.asarray(case.d_out[1], jnp.float32)

    @jax.jit
    def run(args, state, segment_ids):
        call = functools.partial(operator, segment_ids=segment_ids, chunk_size=chunk_size, implementation="mosaic_tpu")
        out, pull = jax.vjp(lambda args, state: call(**args, initial_state=state), args, state)
        return out, pull(d_out)

    with pallas_kernels.interpret():
        return run(args, state, case.segment_ids)


def check(name: str, dtype: str, chunk_size: int = 16, **sizes: int):
    operator = ls.RECURRENCES[name]
    case = Case(operator, **sizes)
    if case.sizes["T"] > 20:
        case.packed(5, 16, 20)
    case.rounded(dtype)
    out, gradients = through_kernel(case, operator, dtype, chunk_size)
    want, want_gradients = reference(operator, case)
    assert_close(out, want, OUTPUTS[dtype], f"{name} {dtype}")
    assert_close(gradients, want_gradients, GRADIENTS[dtype], f"{name} {dtype} gradients")


@pytest.mark.parametrize(("name", "dtype"), [("hgrn", "float32"), ("mamba", "float32"), ("rg_lru", "bfloat16")])
def test_kernel_is_the_scan(name, dtype):
    check(name, dtype, B=2, T=37, D=8, N=8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [dict(T=1, D=8, N=8), dict(T=64, D=256, N=16), dict(T=100, D=128, N=8)], ids=str)
@pytest.mark.parametrize("name", VECTOR)
def test_kernel_is_the_scan_everywhere(name, dtype, sizes):
    check(name, dtype, 32, B=1, **sizes)


def test_blocks_of_channels_and_of_time_agree():
    x, g = (jax.random.normal(jax.random.key(i), (1, 40, 200)) for i in range(2))
    state = jax.random.normal(jax.random.key(2), (1, 200))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(time_block, channel_block):
        out, pull = jax.vjp(lambda *a: vector_scan(*a, time_block, channel_block), x, -jax.nn.softplus(g), state)
        return out, pull(out)

    with pallas_kernels.interpret():
        jax.tree.map(np.testing.assert_array_equal, run(16, 128), run(48, 256))


def test_refusals_say_why():
    x = jnp.ones((1, 16, 8))
    with pytest.raises(NotImplementedError, match="runs on cpu"):
        ls.hgrn(x, -x, implementation="mosaic_tpu")
    with pallas_kernels.interpret():
        with pytest.raises(NotImplementedError, match="N=4 states"):
            ls.mamba(x, x, -jnp.ones((8, 4)), x[..., :4], x[..., :4], implementation="mosaic_tpu")
        with pytest.raises(NotImplementedError, match="multiple of 128"):
            wide = jnp.ones((1, 16, 200))
            ls.mamba(wide, wide, -jnp.ones((200, 8)), x, x, implementation="mosaic_tpu")
        with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
            ls.hgrn(*jax.tree.map(lambda a: a.astype("float64"), (x, -x)), implementation="mosaic_tpu")
