"""QuantConfig: checks itself, reads back, and needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import RECIPES, WEIGHTS, QuantConfig
from tf_gptopt.models.config import GPTConfig


def test_int8_is_the_default() -> None:
    assert QuantConfig() == QuantConfig("int8")
    assert QuantConfig().float_layers == ()


@pytest.mark.parametrize("scheme", sorted(WEIGHTS))
def test_a_config_survives_json(scheme: str) -> None:
    config = QuantConfig(scheme, float_layers=["block_0_*", "token_logits"])
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    hash(config)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().weights = "float32"


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


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_name_and_a_line(name: str) -> None:
    config = QuantConfig.from_recipe(name)
    assert config == RECIPES[name][0]
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.name
    assert "\n" not in RECIPES[name][1]
    assert QuantConfig.from_recipe(name, float_layers="block_0_*").keeps_float("block_0_fc")


def test_names_tell_the_recipes_apart() -> None:
    assert len({config.name for config, _ in RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"granularity": 32}, "Blocks are for int4"),
        ({"granularity": 48}, "Unknown granularity"),
        ({"weights": "int4", "granularity": 32, "activations": "static"}, "no static activations"),
        ({"smoothing": 0.5, "activations": "float"}, "activations that are quantized"),
        ({"smoothing": 2}, "smoothing is 0 to 1"),
        ({"percentile": True}, "must be a number"),
        ({"io": "int8"}, "static activations"),
        ({"quantize_adds": True}, "static activations"),
        ({"weights": "float16", "activations": "static"}, "need integer weights"),
        ({"layers": {"block_0_*": "int9"}}, "layer name patterns"),
        ({"layers": {"block_0_*": "int8:32"}}, "layer name patterns"),
        ({"layers": {"block_0_*": ["int8"]}}, "layer name patterns"),
        ({"layers": {"*_fc": "int4:64"}, "activations": "static"}, "no static activations"),
        ({"weights": "int4", "granularity": 32, "activations": "float"}, "float again"),
        ({"activations": "static", "io": "int8", "kv_cache": "int8"}, "cache of its own"),
        ({"rounding": "gtpq"}, "Did you mean 'gptq'"),
    ],
)
def test_what_does_not_go_together_is_an_error(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QuantConfig(**values)


@pytest.mark.parametrize(
    ("changes", "large", "cache"),
    [
        ({}, True, "int8"),
        ({}, False, "float32"),
        ({"weights": "int4"}, True, "int8"),
        ({"kv_cache": "float32"}, True, "float32"),
        ({"kv_cache": "int8"}, False, "int8"),
        ({"weights": "float32"}, True, "float32"),
        ({"weights": "float32", "layers": {"*_fc": "int8"}}, True, "int8"),
        ({"activations": "float"}, True, "float32"),
        ({"activations": "static", "io": "int8"}, True, "float32"),
    ],
)
def test_a_large_cache_is_int8_where_nobody_says(changes: dict, large: bool, cache: str) -> None:
    # 2 arrays x 4 bytes x 4 blocks x 1,024 rows x 256 numbers are 8 MiB
    model = GPTConfig(61, 256, 4, 4, max_sequence_length=1024 if large else 1023)
    config = QuantConfig(**changes)
    assert config.for_model(model) == dataclasses.replace(config, kv_cache=cache)
    assert config.for_model(model).for_model(model) == config.for_model(model)


def test_layers_choose_their_weights() -> None:
    config = QuantConfig(
        "int4", layers={"block_0_*": "int8", "*_out": "float16"}, float_layers=("block_0_fc",)
    )
    names = ["block_0_fc", "block_0_out", "block_1_out", "block_1_fc"]
    assert [config.weights_of(name) for name in names] == ["float32", "int8", "float16", "int4"]
    assert config.layers_to_quantize(names) == {"block_0_out", "block_1_fc"}
    with pytest.raises(UserError, match="layers: 'block_9"):
        QuantConfig(layers={"block_9_*": "int4"}).layers_to_quantize(names)


def test_blocks_are_for_what_they_divide() -> None:
    config = QuantConfig("int4")
    assert [config.group_of("x", width) for width in (64, 100)] == [32, "channel"]
    assert QuantConfig("int4", activations="static").group_of("x", 64) == "channel"


def test_a_layer_may_have_a_granularity_of_its_own() -> None:
    own = {"a": "int4:128", "b": "int4:tensor", "c": "int8", "d": "int4", "e": "float16"}
    config = QuantConfig("int4", granularity=64, layers=own, float_layers="f")
    assert [config.group_of(name, 128) for name in "abcdz"] == [128, "tensor", "channel", 64, 64]
    assert config.group_of("a", 192) == "channel"
    assert [config.weights_of(name) for name in "abcef"] == [
        "int4", "int4", "int8", "float16", "float32",
    ]  # fmt: skip
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
