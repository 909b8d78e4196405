"""The decoder's configuration: what it derives, its trip through JSON, what it refuses."""

import json

import pytest

from lineax_seq.models import DecoderConfig

SMALL = dict(vocab_size=11, d_model=16, num_layers=4)


def test_pattern_is_its_shortest_period():
    assert DecoderConfig(**SMALL, pattern="LLLN").layers == ("gated_delta_net",) * 3 + ("softmax_attention",)
    alternating = DecoderConfig(**SMALL, pattern="LNLN", linear_layer="gla")
    assert alternating.layers == ("gla", "softmax_attention") and alternating.repeats == 2
    assert DecoderConfig(**SMALL, pattern=["delta_net", "L", "gla", "N"]).layers == (
        *("delta_net", "gated_delta_net", "gla"),
        "softmax_attention",
    )
    assert DecoderConfig(**SMALL, pattern="NNNN").repeats == 4


def test_json_round_trip_and_hash():
    config = DecoderConfig(
        **SMALL,
        pattern=["gla", "N"],
        linear_options={"gate_rank": 4, "expand_k": 1.0},
        attention_options={"num_heads": 2},
        window=8,
        remat="dots",
    )
    again = DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    assert config.to_dict()["linear_options"] == {"gate_rank": 4, "expand_k": 1.0}
    assert config.layer_options("softmax_attention")["num_heads"] == 2
    assert config.layer_options("gla") == {"num_heads": 4, "gate_rank": 4, "expand_k": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_layers=6), r"num_layers=6 is no multiple of the pattern's 4 layers"),
        (dict(num_layers=0, d_ff=2.5), r"num_layers=0, d_ff=2.5"),
        (dict(vocab_size=None), "vocab_size is None"),
        (dict(pattern="LLXN"), "'X'"),
        (dict(pattern=["gated_delta_nt"]), "did you mean 'gated_delta_net'"),
        (dict(pattern=()), "pattern is empty"),
        (dict(linear_layer="glaa"), "did you mean 'gla'"),
        (dict(dtype="bfloat"), "did you mean 'bfloat16'"),
        (dict(remat="all"), "wants one of 'dots', 'full'"),
        (dict(norm_eps=0.0), "norm_eps is 0.0"),
        (dict(linear_options={"expand_w": 2}), "did you mean 'expand_v'"),
        (dict(attention_options={"d_model": 2}), "'d_model'"),
        (dict(linear_layer="gla", num_v_heads=4), "'num_v_heads'"),
        (dict(pattern="N", conv_width=4), "conv_width set, but pattern 'N' has no linear layer"),
        (dict(pattern="L", window=4), "window set, but pattern 'L' has no softmax attention layer"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**SMALL, **change})


def test_unknown_and_missing_fields_are_refused():
    with pytest.raises(ValueError, match="did you mean 'num_layers'"):
        DecoderConfig.from_dict({"vocab_size": 1, "num_layer": 2})
    with pytest.raises(ValueError, match="missing d_model, num_layers"):
        DecoderConfig.from_dict({"vocab_size": 1})
