"""CONTRIBUTING's "A layer", taken literally: its file is run, its lines are put into the table, and what is then listed
there obeys every law and makes a model."""

import jax
import jax.numpy as jnp
import pytest
import recipes
from flax import nnx

from lineax_seq import layers
from lineax_seq.models import Decoder, DecoderConfig
from lineax_seq.testing import check_layer, layer_laws

MODULE, TABLE = recipes.listed("A layer")
CONFIG = MODULE.SimpleGLAConfig(num_heads=2)
WIDTH = 16


@pytest.fixture(scope="module")
def layer(filled):
    return filled(CONFIG, WIDTH)


@pytest.mark.parametrize("law", layer_laws(CONFIG.make(WIDTH, rngs=nnx.Rngs(0)), WIDTH))
def test_law(layer, law):
    check_layer(layer, WIDTH, laws=[law])


def test_the_recipe_s_lines_list_it():
    assert TABLE.MIXERS["simple_gla"] is MODULE.SimpleGLAConfig and TABLE.SimpleGLA is MODULE.SimpleGLA
    assert set(TABLE.MIXERS) == {*layers.MIXERS, "simple_gla"}


def test_the_table_enrols_it_in_the_tests_of_layers(monkeypatch):
    monkeypatch.setattr(layers, "MIXERS", TABLE.MIXERS)
    assert "simple_gla" in recipes.loaded("tests/layers/test_laws.py").CONFIGS


def test_it_makes_a_model():
    config = DecoderConfig.hybrid("LN", linear=CONFIG, num_layers=2, vocab_size=11, d_model=WIDTH)
    model = Decoder(config, rngs=nnx.Rngs(0))
    logits = jax.eval_shape(model, jnp.zeros((1, 5), jnp.int32))
    assert logits.shape == (1, 5, 11)
