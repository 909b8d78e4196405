"""Kernels whose cost is counted by hand. They are compiled in another process, which imports this module."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 256


def _product(a_ref, b_ref, o_ref):
    o_ref[...] = jnp.dot(a_ref[...], b_ref[...], precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def product(a, b):
    """A row block of a per grid step, all of b at each."""
    rows, inner = a.shape
    columns = b.shape[1]
    return pl.pallas_call(
        _product,
        grid=(rows // BLOCK,),
        in_specs=[pl.BlockSpec((BLOCK, inner), lambda i: (i, 0)), pl.BlockSpec((inner, columns), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((BLOCK, columns), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        name="product",
    )(a, b)


def product_shapes(rows: int, inner: int, columns: int):
    return jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16), jax.ShapeDtypeStruct((inner, columns), jnp.bfloat16)


def _chain(x_ref, o_ref, *, trips: int):
    o_ref[...] = lax.fori_loop(0, trips, lambda i, y: jnp.tanh(y), x_ref[...])


def chain(x, trips: int):
    """One register through `trips` dependent tanh, one after the other."""
    return pl.pallas_call(functools.partial(_chain, trips=trips), out_shape=x, name="chain")(x)


REGISTER = (jax.ShapeDtypeStruct((8, 128), jnp.float32),)


def scan_of_products(a, b):
    """XLA's loop around a kernel, five times."""
    return lax.scan(lambda c, _: (c + product(a, b), None), jnp.zeros((a.shape[0], b.shape[1])), length=5)[0]


def too_large(x):
    """Scratch that no vector memory holds."""
    scratch = pltpu.VMEM((1 << 16, 4096), jnp.float32)
    return pl.pallas_call(_through_scratch, out_shape=x, scratch_shapes=[scratch], name="too_large")(x)


def _through_scratch(x_ref, o_ref, scratch_ref):
    scratch_ref[:8, :128] = x_ref[...]
    o_ref[...] = scratch_ref[:8, :128]


def example():
    """What `--kernel` wants."""
    return product, product_shapes(1024, 128, 128)


@functools.partial(jax.jit, donate_argnums=1)
def decode(fields, state):
    from pallas_kernels import KERNELS, machine_here

    return KERNELS["tpu", "step", "delta_diagonal_decay"](machine_here(), 1.0, None, fields, None, state)


def decode_job():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
    rows = dict.fromkeys(("q", "k", "v", "g"), shape(2, 1, 16, 128))
    return "hand_counted:decode", ({**rows, "beta": shape(2, 1, 16)}, shape(2, 16, 128, 128))


def plain(x):
    """No kernel, to run anywhere."""
    return jnp.tanh(x) * 2
