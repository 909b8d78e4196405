"""The record of a kernel and the table of all: what refuses and how it says so, and that importing loads no kernel."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import lineax_seq as ls
from pallas_kernels import KERNELS, Kernel, Machine
from pallas_kernels._shared.kernel import dtype_reasons, sizes_of, table
from pallas_kernels._shared.refs import by_name
from pallas_kernels.tpu import KERNELS as TPU

V5E, CPU = Machine("tpu", "TPU v5 lite"), Machine("cpu", "cpu")


def test_importing_the_package_loads_no_pallas():
    """The library imports this package at its top, and most of its users never run a kernel."""
    code = "import sys, pallas_kernels; print('jax.experimental.pallas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def test_the_table_is_the_lists():
    assert set(KERNELS.values()) == set(TPU)
    assert all(key == (kernel.platform, kernel.role, kernel.record) for key, kernel in KERNELS.items())
    with pytest.raises(ValueError, match=r"two kernels for \('tpu', 'chunk', 'no_decay'\)"):
        table(*TPU, TPU[0])


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda kernel: f"{kernel.role} {kernel.record}")
def test_a_kernel_has_its_records_fields(kernel):
    records = {operator.recurrence.name: operator.recurrence for operator in ls.RECURRENCES.values()}
    record = records[kernel.record]
    assert dict(kernel.fields) == dict(record.fields) and dict(kernel.parameters) == dict(record.parameters)


def small(refuses=lambda machine, sizes, dtypes: []) -> Kernel:
    run = lambda machine, scale, chunk_size, fields, reset, state: (state, fields["x"] * scale)  # noqa: E731
    return Kernel("small", "tpu", "chunk", {"x": "D"}, run, refuses, parameters={"A": "D N"})


FIELDS = {"x": jnp.ones((1, 3, 4), jnp.bfloat16), "A": jnp.ones((4, 2))}


def test_a_call_refuses_or_runs():
    state, o = small()(V5E, 2.0, None, FIELDS, None, jnp.zeros((1, 4)))
    assert o.shape == (1, 3, 4) and float(o[0, 0, 0]) == 2
    seen = []

    def refuses(machine, sizes, dtypes):
        seen.append((machine, sizes, dtypes))
        return ["x is odd", "A is even"]

    with pytest.raises(NotImplementedError) as refusal:
        small(refuses)(CPU, None, 16, FIELDS, None, (jnp.zeros(1), jnp.zeros((), "bfloat16")))
    text = str(refusal.value)
    assert text.startswith("mosaic_tpu: the kernel of small cannot: this call runs on cpu, the kernel on tpu")
    assert text.endswith("; x is odd; A is even")
    sizes, dtypes = dict(B=1, T=3, D=4, N=2, C=16), dict(x="bfloat16", A="float32", state="float32")
    assert seen == [(CPU, sizes, dtypes)]


def test_the_reasons_against_dtypes():
    found = dtype_reasons({"q": "float16", "k": "bfloat16", "state": "float64"})
    assert found == ["q is float16, wants one of ('bfloat16', 'float32')", "state is float64, wants float32"]


def test_mistakes_in_a_record():
    with pytest.raises(ValueError, match="role='scan', wants one of"):
        Kernel("small", "tpu", "scan", {}, lambda: None, lambda: [])
    with pytest.raises(ValueError, match="zip"):
        sizes_of({"x": "H D"}, FIELDS)


def test_refs_have_names():
    seen = {}
    by_name(lambda **refs: seen.update(refs), ["q", "o"])(1, 2)
    assert seen == {"q_ref": 1, "o_ref": 2}
    with pytest.raises(ValueError, match=r"\['q'\] stand twice"):
        by_name(print, ["q", "o", "q"])


def test_dispatch_asks_the_machine():
    from lineax_seq.core import dispatch
    from pallas_kernels import tracing_for

    gpu = Machine("gpu", "NVIDIA H100")
    assert dispatch.candidates("f", None, Machine("cpu", "cpu")) == ("xla",)
    assert dispatch.candidates("f", None, V5E) == ("mosaic_tpu", "xla")
    assert dispatch.candidates("f", None, gpu) == ("mosaic_gpu", "xla")
    x = jax.ShapeDtypeStruct((1, 16, 2, 32), jnp.float32)
    with tracing_for(V5E), pytest.raises(NotImplementedError, match="linear_attention: mosaic_tpu.*K=32, wants one of"):
        jax.eval_shape(lambda x: ls.linear_attention(x, x, x, implementation="mosaic_tpu"), x)
    with pytest.raises(NotImplementedError, match="mosaic_gpu: no kernel for recurrence 'no_decay' yet"):
        jax.eval_shape(lambda x: ls.linear_attention(x, x, x, implementation="mosaic_gpu"), x)
