"""What configurations refuse, and when: before a layer is made; and what parameters say they are."""

import typing

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lineax_seq import layers, parallel
from lineax_seq.core import dispatch
from lineax_seq.core.operator import FORMS

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (layers.GatedDeltaNetConfig, dict(form="foo"), "form='foo', wants one of 'chunk', 'scan'"),
        (layers.GatedDeltaNetConfig, dict(form="chunks"), "did you mean 'chunk'"),
        (layers.GatedDeltaNetConfig, dict(chunk_size=3), "chunk_size=3, wants a power of two"),
        (layers.GatedDeltaNetConfig, dict(implementation="mosaic"), "implementation='mosaic'"),
        (layers.GatedDeltaNetConfig, dict(expand_v=NAN), "expand_v=nan, wants a finite number above 0"),
        (layers.GatedLinearAttentionConfig, dict(gate_normalizer=INF), "gate_normalizer=inf"),
        (layers.GatedLinearAttentionConfig, dict(num_heads=0, conv_width=2.5), "num_heads=0.*conv_width=2.5"),
        (layers.DeltaNetConfig, dict(allow_neg_eigval=1), "allow_neg_eigval=1, wants True or False"),
        (layers.DeltaNetConfig, dict(num_heads=True), "num_heads=True, wants a whole number"),
        (layers.SoftmaxAttentionConfig, dict(rope_theta=0), "rope_theta=0, wants a finite number above 0 or None"),
        (layers.SoftmaxAttentionConfig, dict(num_kv_heads=3), "num_heads=4 is no multiple of num_kv_heads=3"),
        (layers.SoftmaxAttentionConfig, dict(window=0), "window=0"),
        (layers.SoftmaxAttentionConfig, dict(implementation="flash"), "'flash'"),
        (layers.SoftmaxAttentionConfig, dict(strategy="rings"), "did you mean 'ring'"),
        (layers.SwiGLUConfig, dict(d_ff=-1), "d_ff=-1"),
        (layers.MLSTMConfig, dict(gate_soft_cap=0.0), "gate_soft_cap=0.0"),
    ],
)
def test_values_are_refused_when_the_configuration_is_made(config, options, message):
    with pytest.raises(ValueError, match=f"^{config.__name__}: .*{message}"):
        config(**options)


@pytest.mark.parametrize(
    ("config", "d_model", "message"),
    [
        (layers.GatedLinearAttentionConfig(), 10, "expand_k=0.5 of d_model=10 over num_heads=4 is 1.25 channels"),
        (layers.DeltaNetConfig(head_dim=4, expand_v=0.3), 16, "expand_v=0.3 of d_model=16 over num_heads=4 is 1.2"),
        (layers.GatedDeltaNetConfig(), 10, r"3/4 of d_model=10 over num_heads=4 \(without head_dim\) is 1.875"),
        (layers.GatedDeltaNetConfig(expand_v=1.3), 48, "expand_v=1.3 of head_dim=9 is 11.7 channels per head"),
        (layers.GatedDeltaNetConfig(num_heads=2, num_v_heads=3), 16, "num_v_heads=3 is no multiple of num_heads=2"),
        (layers.RWKV7Config(), 10, "d_model=10 over num_heads=4 is 2.5 channels"),
        (layers.SoftmaxAttentionConfig(), 10, r"d_model=10 over num_heads=4 \(without head_dim\) is 2.5"),
        (layers.SoftmaxAttentionConfig(head_dim=3), 16, "head_dim=3 is odd"),
        (layers.SwiGLUConfig(), 0, "d_model=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, d_model, message):
    with pytest.raises(ValueError, match=f"^{type(config).__name__}.*{message}"):
        config.make(d_model, rngs=nnx.Rngs(0))


def test_choices_are_those_of_the_functions_they_go_to():
    def choices(config, field):
        hint = typing.get_type_hints(config)[field]
        return {name for name in jax.tree.leaves([typing.get_args(h) or [h] for h in typing.get_args(hint) or [hint]])}

    assert {"chunk", "scan"} == set(FORMS) == choices(layers.RecurrentConfig, "form")
    assert set(dispatch.IMPLEMENTATIONS) <= choices(layers.RecurrentConfig, "implementation")
    assert set(parallel.STRATEGIES) == choices(layers.SoftmaxAttentionConfig, "strategy")


def test_every_parameter_says_what_it_is():
    for config in (*layers.MIXERS.values(), *layers.FEED_FORWARDS.values()):
        module = nnx.eval_shape(lambda config=config: config().first().make(32, rngs=nnx.Rngs(0)))
        kinds = layers.parameter_kinds(module)
        assert jax.tree.structure(kinds) == jax.tree.structure(nnx.to_pure_dict(nnx.split(module)[1]))
        assert set(jax.tree.leaves(kinds)) <= set(layers.KINDS)
    kinds = layers.parameter_kinds(layers.GatedDeltaNetConfig().make(32, rngs=nnx.Rngs(0)))
    assert (kinds["q_proj"]["kernel"], kinds["b_proj"]["kernel"], kinds["A_log"]) == ("matrix", "gate", "decay")
    assert (kinds["taps"]["q"]["kernel"], kinds["o_norm"]["scale"]) == ("convolution", "norm")


def test_parameters_without_a_kind_are_refused():
    class Unsaid(nnx.Module):
        def __init__(self):
            self.known, self.bare = nnx.Param(jnp.ones(2), kind="vector"), nnx.Param(jnp.ones(2))

    with pytest.raises(ValueError, match=r"parameter_kinds: .*bare.*: no kind"):
        layers.parameter_kinds(Unsaid())
