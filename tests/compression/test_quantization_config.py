"""QuantConfig: checks itself, reads back, and needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import SCHEMES, QuantConfig


def test_int8_is_the_default() -> None:
    assert QuantConfig() == QuantConfig("int8")
    assert QuantConfig().float_layers == ()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_config_survives_json(scheme: str) -> None:
    config = QuantConfig(scheme, float_layers=["block_0_*", "token_logits"])
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    hash(config)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().scheme = "float32"


@pytest.mark.parametrize(
    ("scheme", "message"),
    [("int9", "Did you mean 'int8'"), ("floa32", "Did you mean 'float32'"), (8, "Known: float16")],
)
def test_an_unknown_scheme_names_the_near_one(scheme: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QuantConfig(scheme)


def test_an_unknown_option_names_the_near_one() -> None:
    with pytest.raises(UserError, match="Did you mean 'float_layers'"):
        QuantConfig.from_dict({"float_layer": ["x"]})


@pytest.mark.parametrize("patterns", [3, [3], [""], None])
def test_float_layers_must_be_patterns(patterns: object) -> None:
    with pytest.raises(UserError, match="name patterns"):
        QuantConfig(float_layers=patterns)


def test_patterns_choose_layers() -> None:
    config = QuantConfig(float_layers=("block_0_*", "*_out"))
    names = ["token_embedding", "block_0_qkv", "block_1_qkv", "block_1_out", "block_10_fc"]
    assert config.layers_to_quantize(names) == {"token_embedding", "block_1_qkv", "block_10_fc"}
    assert QuantConfig(float_layers="block_1_out").keeps_float("block_1_out")
    assert not QuantConfig(float_layers="Block_1_out").keeps_float("block_1_out")


def test_a_pattern_that_matches_nothing_is_a_mistake() -> None:
    with pytest.raises(UserError, match="Did you mean 'block_0_qkv'"):
        QuantConfig(float_layers=("block_0_qvk",)).layers_to_quantize(["block_0_qkv"])


def test_no_tensorflow_is_loaded(run_child) -> None:
    code = """
        import sys
        from tf_gptopt.compression.quantization.config import QuantConfig
        QuantConfig("int8")
        print(sorted({"tensorflow", "tf_keras", "numpy"} & set(sys.modules)))
    """
    assert run_child(code, devices=0).strip() == "[]"
