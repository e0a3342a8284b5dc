"""A verb takes the scheme of the model it reads, says which, and warns before it rounds twice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tf_gptopt.cli import main
from tf_gptopt.compression.quantization.config import RECIPES, QuantConfig
from tf_gptopt.compression.quantization.found_scheme import find_scheme, lies_on
from tf_gptopt.compression.quantization.ptq import quantize
from tf_gptopt.models.checkpoints import named_weights, save_model
from tf_gptopt.tflite.convert import export_tflite

INTEGERS = [name for name, (config, _) in RECIPES.items() if config.weights.startswith("int")]
MIXED = QuantConfig(
    "int4", layers={"token_embedding": "int8", "block_1_*": "int4:64"}, float_layers=("block_0_fc",)
)


@pytest.fixture
def model(tiny_model):
    return tiny_model(embedding_dim=64, num_heads=2, vocab_size=300)


@pytest.fixture
def folder(model, tiny_tokenizer, tmp_path):
    """A folder with a float model."""
    model.tokenizer = tiny_tokenizer
    save_model(model, tmp_path / "float")
    return tmp_path / "float"


IDS = np.arange(8 * 32).reshape(8, 32) % 61


@pytest.mark.parametrize("name", INTEGERS)
def test_weights_tell_their_scheme(model, name):
    config = RECIPES[name][0]
    assert find_scheme(named_weights(model)) is None
    made = quantize(model, config, IDS if config.needs_calibration else None)
    weights = named_weights(made)
    found = find_scheme(weights, is_static=made.activation_ranges is not None)
    assert found.weights == config.weights
    assert (found.activations == "static") == (config.activations == "static")
    assert bool(found.smoothing) == bool(config.smoothing)  # else the norms would be folded again
    assert not found.layers
    assert not found.float_layers
    for layer in ("token_embedding", "block_1_out"):
        assert found.group_of(layer, 64) == config.group_of(layer, 64)
    assert lies_on(weights, config)
    assert lies_on(weights, found)
    assert not lies_on(named_weights(model), config)


def test_weights_tell_a_mixed_scheme(model):
    weights = named_weights(quantize(model, MIXED))
    found = find_scheme(weights)
    for layer in ("token_embedding", "block_0_qkv", "block_0_fc", "block_1_fc"):
        assert found.weights_of(layer) == MIXED.weights_of(layer), layer
    assert found.group_of("block_0_out", 256) == 32
    assert found.group_of("block_1_out", 256) == 64
    assert lies_on(weights, found)


def test_zeros_are_no_scheme(model):
    weights = {name: np.zeros_like(array) for name, array in named_weights(model).items()}
    assert find_scheme(weights) is None


def export(folder, out, *options):
    assert main(["export", "--model", str(folder), "--out", str(out), *options]) == 0
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("name", ["int4", "int4-weight-only", "int8-cache", "float16"])
def test_export_takes_the_scheme_that_quantize_left(folder, tmp_path, capsys, name):
    scheme = QuantConfig.from_recipe(name, rounding="nearest")
    options = ["--quantization", name, "--quantization.rounding", "nearest"]
    small = tmp_path / "small"
    assert main(["quantize", "--model", str(folder), "--out", str(small), *options]) == 0
    capsys.readouterr()
    assert export(small, tmp_path / "file")["scheme"] == scheme.name
    said = capsys.readouterr().out
    assert f"quantization: {scheme.name} (as {small} has it)" in said
    assert "once more" not in said


def test_weights_alone_are_enough(model, folder, tmp_path, capsys):
    """A model that was quantized in Python and saved, without a stage's notes beside it."""
    made = quantize(model, QuantConfig.from_recipe("int4"))
    assert export_tflite(made, tmp_path / "direct.tflite").scheme == "int4 per 32 dynamic"
    save_model(made, tmp_path / "saved")
    metrics = export(tmp_path / "saved", tmp_path / "file")
    assert metrics["scheme"] == "int4 per 32 dynamic"
    # and what a stage noted counts no more once the weights have left its grid
    (folder / "metrics.json").write_text(json.dumps({"quantization": MIXED.to_dict()}))
    capsys.readouterr()
    assert export(folder, tmp_path / "other")["scheme"] == "int8 dynamic"
    assert f"{folder} is not quantized" in capsys.readouterr().out


def test_another_scheme_than_it_was_made_for_is_pointed_out(model, tmp_path, capsys):
    save_model(quantize(model, QuantConfig()), tmp_path / "eight")
    assert export(tmp_path / "eight", tmp_path / "file", "--quantization", "int4")
    said = capsys.readouterr().out
    assert "was made for int8 dynamic" in said
    assert "tf-gptopt qat" in said
    assert export(tmp_path / "eight", tmp_path / "same", "--quantization", "int8-weight-only")
    assert "was made for" not in capsys.readouterr().out  # the same integers
    save_model(model, tmp_path / "float")
    assert export(tmp_path / "float", tmp_path / "four", "--quantization", "int4")
    assert "was made for" not in capsys.readouterr().out


def test_training_goes_on_in_the_scheme_it_finds(model, folder, tmp_path, capsys):
    from tf_gptopt.recipes.console import Console
    from tf_gptopt.recipes.schemes import decided, say_if_left
    from tf_gptopt.recipes.sections import QatSection

    save_model(quantize(model, MIXED), tmp_path / "mixed")
    (tmp_path / "mixed" / "metrics.json").write_text(
        json.dumps({"section": {"quantization": MIXED.to_dict()}})
    )
    section = decided(QatSection(), tmp_path / "mixed", Console(), trains=True)
    assert section.quantization == MIXED
    given = QatSection(QuantConfig("int4", granularity="channel"))
    assert decided(given, tmp_path / "mixed", Console(), trains=True) == given
    assert "once more" not in capsys.readouterr().out
    assert decided(QatSection(), folder, Console(), trains=True).quantization == QuantConfig()
    capsys.readouterr()
    say_if_left(folder, Console())
    assert not capsys.readouterr().out
    say_if_left(tmp_path / "mixed", Console())
    assert f"is quantized ({MIXED.name})" in capsys.readouterr().out
