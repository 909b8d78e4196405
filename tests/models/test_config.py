"""Configurations of decoders, composed and flat: what they derive, their trip through JSON, what they refuse."""

import dataclasses
import json

import pytest

from lineax_seq.layers import (
    DeltaNetConfig,
    GatedLinearAttentionConfig,
    MLSTMConfig,
    RWKV7ChannelMixConfig,
    RWKV7Config,
    SoftmaxAttentionConfig,
    SwiGLUConfig,
)
from lineax_seq.models import BlockConfig, DecoderConfig, HybridConfig, Stage

SMALL = dict(vocab_size=11, d_model=16, num_layers=4)
COMPOSED = DecoderConfig(
    vocab_size=11,
    d_model=16,
    stages=(
        Stage((BlockConfig(mixer=RWKV7Config(value_residual=False), feed_forward=RWKV7ChannelMixConfig()),)),
        Stage(
            [
                BlockConfig(mixer=MLSTMConfig(num_heads=2), feed_forward=None, norm="layer_norm"),
                BlockConfig(mixer=SoftmaxAttentionConfig(window=8), residual="parallel", multiplier=0.5),
            ],
            repeats=3,
        ),
    ),
    embed_norm="layer_norm",
    remat="dots",
)


def mixers(config):
    """Names of the mixers of every stage, and how often it repeats."""
    return [([block.mixer.name for block in stage.blocks], stage.repeats) for stage in config.stages]


def test_pattern_is_its_shortest_period():
    gdn, softmax = "gated_delta_net", "softmax_attention"
    assert mixers(HybridConfig(**SMALL, pattern="LLLN").decoder()) == [([gdn] * 3 + [softmax], 1)]
    alternating = HybridConfig(**SMALL, pattern="LNLN", linear_layer="gla").decoder()
    assert mixers(alternating) == [(["gla", softmax], 2)]
    named = HybridConfig(**SMALL, pattern=["delta_net", "L", "gla", "N"]).decoder()
    assert mixers(named) == [(["delta_net", gdn, "gla", softmax], 1)]
    assert mixers(HybridConfig(**SMALL, pattern="NNNN").decoder()) == [([softmax], 4)]


def test_a_lowest_layer_of_its_own_has_a_stage_of_its_own():
    config = HybridConfig(**{**SMALL, "num_layers": 6}, pattern="LLN", linear_layer="rwkv7").decoder()
    assert mixers(config) == [(["rwkv7", "rwkv7", "softmax_attention"], 1)] * 2
    residual = [[getattr(b.mixer, "value_residual", None) for b in stage.blocks] for stage in config.stages]
    assert residual == [[False, True, None], [True, True, None]]
    assert mixers(HybridConfig(**SMALL, pattern="L", linear_layer="rwkv7").decoder()) == [
        (["rwkv7"], 1),
        (["rwkv7"], 3),
    ]


def test_hybrid_in_code_is_the_flat_record():
    flat = HybridConfig(**SMALL, pattern="LN", linear_layer="gla", num_heads=2, window=8, d_ff=24, init_std=0.1)
    linear, attention = GatedLinearAttentionConfig(num_heads=2), SoftmaxAttentionConfig(num_heads=2, window=8)
    feed_forward = {"feed_forward": SwiGLUConfig(d_ff=24)}
    composed = DecoderConfig.hybrid("LN", linear=linear, attention=attention, block=feed_forward, init_std=0.1, **SMALL)
    assert flat.decoder() == composed and composed.num_layers == 4
    with pytest.raises(ValueError, match="'X' in pattern 'LX'"):
        DecoderConfig.hybrid("LX", linear=linear, **SMALL)
    with pytest.raises(ValueError, match="'L' in pattern 'LN', wants letters L, with linear="):
        DecoderConfig.hybrid("LN", **SMALL)
    with pytest.raises(ValueError, match="num_layers=4 is no multiple of the pattern's 3 layers"):
        DecoderConfig.hybrid("LLN", linear=linear, **SMALL)


@pytest.mark.parametrize("config", [COMPOSED, HybridConfig(**SMALL, window=4, linear_options={"expand_v": 1.0})])
def test_json_round_trip_and_hash(config):
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


def test_options_come_last():
    config = HybridConfig(
        **SMALL,
        pattern=["gla", "N"],
        linear_options={"gate_rank": 4, "expand_k": 1.0},
        attention_options={"num_heads": 2},
    )
    assert config.to_dict()["linear_options"] == {"gate_rank": 4, "expand_k": 1.0}
    assert config.mixer("softmax_attention").num_heads == 2
    assert config.mixer("gla") == GatedLinearAttentionConfig(gate_rank=4, expand_k=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_layers=6), r"num_layers=6 is no multiple of the pattern's 4 layers"),
        (dict(num_layers=0, d_ff=2.5), r"num_layers=0.*d_ff=2.5"),
        (dict(vocab_size=None), "vocab_size=None, wants a whole number"),
        (dict(pattern="LLXN"), "'X'"),
        (dict(pattern=["gated_delta_nt"]), "did you mean 'gated_delta_net'"),
        (dict(pattern=()), "pattern is empty"),
        (dict(linear_layer="glaa"), "did you mean 'gla'"),
        (dict(linear_layer="softmax_attention"), "linear_layer='softmax_attention'"),
        (dict(dtype="bfloat"), "did you mean 'bfloat16'"),
        (dict(remat="all"), "remat='all', wants one of 'full', 'dots'"),
        (dict(norm_eps=0.0), "norm_eps=0.0"),
        (dict(init_std=float("inf")), "init_std=inf, wants a finite number above 0"),
        (dict(rope_theta=0), "rope_theta=0"),
        (dict(linear_options={"expand_w": 2}), "did you mean 'expand_v'"),
        (dict(linear_options={"form": "foo"}), "form='foo'"),
        (dict(linear_options={"chunk_size": 3}), "chunk_size=3"),
        (dict(linear_options={"expand_v": float("nan")}), "expand_v=nan"),
        (dict(linear_options={"expand_v": 1.3}), "expand_v=1.3 of head_dim=3 is 3.9 channels per head"),
        (dict(d_model=10), "d_model=10 over num_heads=4"),
        (dict(attention_options={"d_model": 2}), "'d_model'"),
        (dict(linear_layer="gla", num_v_heads=4), "'num_v_heads'"),
        (dict(pattern="N", conv_width=4), "conv_width set, but pattern 'N' has no linear layer"),
        (dict(pattern="L", window=4), "window set, but pattern 'L' has no softmax attention layer"),
    ],
)
def test_bad_values_of_the_flat_record_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig(**{**SMALL, **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(COMPOSED, stages=()), "wants at least one Stage"),
        (
            lambda: dataclasses.replace(COMPOSED, d_model=18),
            "RWKV7Config: d_model=18 over num_heads=4.*SoftmaxAttentionConfig: d_model=18",
        ),
        (lambda: dataclasses.replace(COMPOSED, init_std=float("inf")), "init_std=inf"),
        (lambda: Stage((), 1), "wants at least one BlockConfig"),
        (lambda: Stage(COMPOSED.stages[0].blocks, 0), "repeats=0"),
        (lambda: BlockConfig(mixer="gla"), "mixer is 'gla', wants a configuration such as GatedLinearAttentionConfig"),
        (lambda: BlockConfig(mixer=DeltaNetConfig(), residual="pst"), "did you mean 'post'"),
        (lambda: BlockConfig(mixer=DeltaNetConfig(), multiplier=0.0), "multiplier=0.0"),
    ],
)
def test_bad_values_of_composed_records_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_and_missing_fields_are_refused():
    for config in (DecoderConfig, HybridConfig):
        with pytest.raises(ValueError, match=f"{config.__name__}.from_dict: a field='vocab_siz'.*mean 'vocab_size'"):
            config.from_dict({"vocab_siz": 1})
    with pytest.raises(ValueError, match="missing d_model, num_layers"):
        HybridConfig.from_dict({"vocab_size": 1})
    values = COMPOSED.to_dict()
    values["stages"][0]["blocks"][0]["mixer"]["name"] = "rwkv"
    with pytest.raises(ValueError, match="BlockConfig.mixer: name='rwkv' .did you mean 'rwkv7'"):
        DecoderConfig.from_dict(values)
