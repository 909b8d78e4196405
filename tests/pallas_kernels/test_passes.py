"""The wiring of a kernel's two passes, with plain arithmetic in the kernels' place: gradients, what is kept, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tolerances import GRADIENTS, assert_close

from pallas_kernels import Machine
from pallas_kernels._shared.passes import differentiable


@dataclasses.dataclass(frozen=True)
class Weighted:
    """o = sin(x) A where the document goes on, 0 where one starts; total = sum of o over T."""

    machine: Machine
    resets: bool
    heads: tuple[int, int] = (1, 1)

    outputs = {"o": "B T H D", "total": "B H D"}
    saved = {"sine": "B T H D"}

    @property
    def inputs(self):
        return {"x": "B T H D", **({"reset": "B T"} if self.resets else {}), "A": "D"}

    @property
    def kept(self):
        return ("x", "A", *(["reset"] if self.resets else []))

    def _goes_on(self, arrays):
        return ~arrays["reset"][..., None, None] if self.resets else True

    def forward(self, arrays, keep):
        sine = jnp.where(self._goes_on(arrays), jnp.sin(arrays["x"]), 0)
        o = sine * arrays["A"]
        return {"total": o.sum(1), "o": o, **({"sine": sine} if keep else {})}

    def backward(self, arrays):
        d_o = arrays["d_o"] + arrays["d_total"][:, None]
        d_x = jnp.where(self._goes_on(arrays), jnp.cos(arrays["x"]), 0) * arrays["A"] * d_o
        return {"d_A": (arrays["sine"] * d_o).sum((1, 2)), "d_x": d_x}


def derived(arrays):
    """The same by automatic differentiation."""
    o = jnp.sin(arrays["x"]) * arrays["A"]
    o = jnp.where(arrays["reset"][..., None, None], 0, o) if "reset" in arrays else o
    return {"o": o, "total": o.sum(1)}


def example(resets: bool):
    x, A = jax.random.normal(jax.random.key(0), (4, 8, 2, 3)), jnp.arange(1.0, 4)
    return {"x": x, "A": A, **({"reset": jnp.arange(32).reshape(4, 8) % 5 == 0} if resets else {})}


def loss(run):
    def of(floats, others):
        results = run({**floats, **others})
        return (results["o"] ** 2).sum() + (results["total"] ** 3).sum()

    return jax.jit(jax.value_and_grad(of))


def split(arrays):
    floats = {name: x for name, x in arrays.items() if name != "reset"}
    return floats, {name: x for name, x in arrays.items() if name == "reset"}


@pytest.mark.parametrize("resets", [False, True])
def test_gradients(resets):
    passes, arrays = Weighted(Machine("tpu", "any"), resets), example(resets)
    one = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with jax.sharding.use_abstract_mesh(one.abstract_mesh):
        got = loss(lambda arrays: differentiable(passes, arrays))(*split(arrays))
    assert_close(got, loss(derived)(*split(arrays)), GRADIENTS["float32"])


def test_an_input_of_all_heads_keeps_them_together():
    with pytest.raises(ValueError, match=r"\['A'\] belong to all heads, and heads=\(2, 2\)"):
        differentiable(Weighted(Machine("tpu", "any"), False, (2, 2)), example(False))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_a_shared_inputs_gradient_is_summed(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    passes, arrays = Weighted(Machine("tpu", "any"), True), example(True)
    specs = {"x": P("data"), "A": P(), "reset": P("data")}
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}
        got = loss(lambda arrays: differentiable(passes, arrays))(*split(placed))
        got = jax.tree.map(jax.device_get, got)
    assert_close(got, loss(derived)(*split(arrays)), GRADIENTS["float32"])
