"""Every law of a kernel finds the kernel that breaks it. The kernels here are the XLA program, and errors in it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import lineax_seq as ls
from lineax_seq.testing import check_kernel, kernel_laws

SMALL = dict(T=40, K=8, V=8, chunk_size=16)


class WithKernel(ls.Operator):
    """simple_gla whose "mosaic_gpu" is `kernel(call, segment_ids)`; it runs anywhere."""

    kernel = staticmethod(lambda call, options: call(**options))

    def __call__(self, *args, implementation=None, **options):
        call = lambda **options: super(WithKernel, self).__call__(*args, implementation="xla", **options)  # noqa: E731
        return self.kernel(call, options) if implementation == "mosaic_gpu" else call(**options)


class Imprecise(WithKernel):
    @staticmethod
    def kernel(call, options):
        o, state = call(**options)
        return o * (1 + 1e-3), state


class LosesTheState(WithKernel):
    @staticmethod
    def kernel(call, options):
        o, state = call(**options)
        return o, jnp.zeros_like(state)


class SeesOneDocument(WithKernel):
    @staticmethod
    def kernel(call, options):
        return call(**{**options, "segment_ids": None})


class WrongGradient(WithKernel):
    @staticmethod
    def kernel(call, options):
        return jax.lax.stop_gradient(call(**options))


class WideOutputs(WithKernel):
    @staticmethod
    def kernel(call, options):
        o, state = call(**options)
        return o.astype(jnp.float32), state


def operator(kind) -> ls.Operator:
    return kind(**{field.name: getattr(ls.simple_gla, field.name) for field in dataclasses.fields(ls.simple_gla)})


def test_a_right_kernel_obeys_all_laws():
    check_kernel(operator(WithKernel), "mosaic_gpu", **SMALL)


BROKEN = {
    "imprecise": (Imprecise, "kernel = scan, float32", r"\['o'\]: relative rms 1.0e-03, wants at most 2e-05"),
    "state": (LosesTheState, "kernel = chunk, bfloat16", r"\['final_state'\]: relative rms 1.0e\+00"),
    "documents": (SeesOneDocument, "packed documents", r"\['o'\]"),
    "gradient": (WrongGradient, "kernel = chunk, float32", r"\['d g'\]"),
    "dtype": (WideOutputs, "kernel = scan, bfloat16", "o is float32 for bfloat16 inputs"),
}


@pytest.mark.parametrize(("kind", "law", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_kernel_is_found(kind, law, message):
    with pytest.raises(AssertionError, match=message):
        check_kernel(operator(kind), "mosaic_gpu", laws=[law], **SMALL)


def test_every_law_has_a_kernel_that_breaks_it():
    assert {law for _, law, _ in BROKEN.values()} == set(kernel_laws(operator(WithKernel), "mosaic_gpu"))


def test_a_kernel_that_refuses_is_not_passed_over():
    with pytest.raises(NotImplementedError, match="mosaic_gpu") as error:
        check_kernel(ls.linear_attention, "mosaic_gpu", laws=["packed documents"], **SMALL)
    assert "check_kernel: linear_attention by mosaic_gpu, law 'packed documents'" in error.value.__notes__
