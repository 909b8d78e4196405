"""The machine that a program is traced for: who is asked first, and that no other machine's program is reused."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import Machine, interpret, machine_here, tracing_for

H100, V5E = Machine("gpu", "NVIDIA H100 80GB HBM3"), Machine("tpu", "TPU v5 lite")


def described(platform: str) -> AbstractMesh:
    """A mesh of devices that are not there."""
    device = jax.sharding.AbstractDevice(device_kind="some kind", num_cores=None, platform=platform)
    return AbstractMesh((1,), ("x",), axis_types=(AxisType.Explicit,), abstract_device=device)


def test_the_default_device():
    assert machine_here() == Machine("cpu", jax.devices()[0].device_kind)
    with jax.default_device("cpu"):
        assert machine_here().platform == "cpu"
    with jax.default_device(jax.devices()[1]):
        assert machine_here().platform == "cpu"


@pytest.mark.parametrize(("platform", "found"), [("tpu", "tpu"), ("gpu", "gpu"), ("cuda", "gpu"), ("rocm", "gpu")])
def test_the_mesh_comes_before_the_default_device(platform, found):
    with jax.sharding.use_abstract_mesh(described(platform)):
        assert machine_here() == Machine(found, "some kind")


def test_what_is_asked_for_comes_first():
    with jax.sharding.use_abstract_mesh(described("tpu")), tracing_for(H100):
        assert machine_here() == H100
        with tracing_for(V5E):
            assert machine_here() == V5E
        assert machine_here() == H100
    with pytest.raises(KeyError), tracing_for(H100):
        raise KeyError
    assert machine_here().platform == "cpu"


def test_a_jitted_function_is_traced_for_each_machine():
    seen = []

    @jax.jit
    def f(x):
        seen.append(machine_here().platform)
        return x + {"cpu": 0, "gpu": 1, "tpu": 2}[machine_here().platform]

    found = [float(f(jnp.zeros(())))]
    for machine in (H100, V5E, H100):
        with tracing_for(machine):
            found.append(float(f(jnp.zeros(()))))
    assert found == [0, 1, 2, 1] and float(f(jnp.zeros(()))) == 0
    assert seen == ["cpu", "gpu", "tpu"]


def test_the_interpreter_is_a_machine():
    for platform in ("tpu", "gpu"):
        with interpret(platform):
            assert machine_here() == Machine(platform, jax.devices()[0].device_kind, interpret=True)
    assert not machine_here().interpret
    with pytest.raises(ValueError, match="the platform is 'tpu' or 'gpu'"), interpret("cpu"):
        pass
    with pytest.raises(ValueError, match="leave params out"), interpret("gpu", params=object()):
        pass
