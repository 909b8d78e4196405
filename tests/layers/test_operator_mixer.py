"""Layers made from a recurrence's declaration, and what the contract asks of a recurrence: states and padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import OUTPUTS, assert_close

import lineax_seq as ls
from lineax_seq import layers

B, T, D = 2, 6, 16
UNDRAWN = {
    "normalized_linear_attention",
    "lightning_attention",
    "ssd",
    "rwkv7",
    "rg_lru",
    "mamba",
    "log_linear_attention",
}
UNPADDED = {"retention", "lightning_attention", "log_linear_attention"}
SIZES = dict(H=2, K=4, V=6, D=5, N=3, L=4)


@pytest.mark.parametrize("name", ls.RECURRENCES)
def test_any_recurrence_whose_domains_are_known_is_a_layer(name):
    make = lambda: layers.OperatorMixerConfig(operator=name, num_heads=2, num_states=3)  # noqa: E731
    if name in UNDRAWN:
        with pytest.raises(ValueError, match=f"{name}: no way from any number into the domain of"):
            make()
        return

    def uses():
        layer, x = make().make(D, rngs=nnx.Rngs(0)), jnp.ones((B, T, D))
        cache = layer.init_cache(B, T)
        y, cache = layer.prefill(x, cache)
        return layer(x), y, layer.step(x[:, 0], cache)[0][:, None]

    assert [y.shape for y in jax.eval_shape(uses)] == [(B, T, D), (B, T, D), (B, 1, D)]


def test_a_recurrence_of_ones_own_is_a_layer():
    own = dataclasses.replace(ls.gla, name="own", arguments={**ls.gla.arguments})
    layer = layers.OperatorMixerConfig(operator=own, num_heads=2).make(D, rngs=nnx.Rngs(0))
    named = layers.OperatorMixerConfig(operator="gla", num_heads=2).make(D, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    assert_close(layer(x), named(x), OUTPUTS["float32"])
    with pytest.raises(ValueError, match="own.* is not in RECURRENCES"):
        layer.config.to_dict()
    with pytest.raises(ValueError, match="did you mean 'kda'"):
        layers.OperatorMixerConfig(operator="kdaa")


@pytest.mark.parametrize("name", ls.RECURRENCES)
def test_tokens_of_padding_leave_the_state_alone(name):
    operator = ls.RECURRENCES[name]
    xs = operator.example(jax.random.key(0), B=B, T=T, **SIZES)
    lengths = np.array([3, 0])
    keep = jnp.arange(T) < lengths[:, None]
    if name in UNPADDED:
        with pytest.raises(ValueError, match=f"{name}: no values of .* leave its state alone"):
            operator.identity_tokens(xs, keep)
        return
    start = operator.init_state(B=B, **SIZES)
    state = operator(**operator.identity_tokens(xs, keep), initial_state=start, form="scan")[1]
    token = lambda x, argument: x[:, :3] if argument.per_token else x  # noqa: E731
    short = {argument: token(x, operator.arguments[argument]) for argument, x in xs.items()}
    after = operator(**short, initial_state=start, form="scan")[1]
    row = lambda tree, b: jax.tree.map(lambda s: s[b], tree)  # noqa: E731
    assert_close(row(state, 0), row(after, 0), OUTPUTS["float32"])
    jax.tree.map(np.testing.assert_array_equal, row(state, 1), row(start, 1))


def test_states_of_nothing_ask_for_their_sizes():
    with pytest.raises(ValueError, match="gla: no size for H, V; give each as a keyword"):
        ls.gla.init_state(B=2, K=3)
    assert ls.gla.init_state(B=2, H=2, HV=4, K=3, V=5).shape == (2, 4, 3, 5)


def test_rows_of_different_lengths_want_a_recurrence_that_can_wait():
    layer = layers.OperatorMixerConfig(operator="retention", num_heads=2).make(D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="retention: no values of q, k, v leave its state alone"):
        layer.prefill(jnp.ones((B, T, D)), layer.init_cache(B, T), lengths=jnp.array([1, 2]))
