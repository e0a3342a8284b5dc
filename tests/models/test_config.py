"""GPTConfig: what makes a model, what cannot, and what the error says."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.distillation.config import DistillConfig
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.models.config import PRESETS, GPTConfig, preset
from tf_gptopt.training.config import TrainConfig


def test_defaults_follow_gpt2() -> None:
    config = GPTConfig(50257, 768, 12, 12)
    assert config.head_dim == 64
    assert config.intermediate_dim == 3072
    assert config.max_sequence_length == 1024
    assert config.tie_embeddings


def test_one_number_where_all_blocks_agree() -> None:
    config = GPTConfig(100, 32, 3, (4, 4, 4), intermediate_dim=[64, 64, 64])
    assert config.num_heads == 4
    assert config.intermediate_dim == 64
    assert config == GPTConfig(100, 32, 3, 4, intermediate_dim=64)


def test_blocks_may_differ() -> None:
    config = GPTConfig(100, 32, 3, (4, 2, 1), intermediate_dim=(64, 32, 5), head_dim=8)
    assert config.block_heads == (4, 2, 1)
    assert config.block_intermediate_dims == (64, 32, 5)
    assert GPTConfig(100, 32, 3, 4).block_heads == (4, 4, 4)


@given(
    st.integers(1, 4).flatmap(
        lambda layers: st.tuples(
            st.just(layers),
            st.lists(st.integers(1, 5), min_size=layers, max_size=layers),
            st.lists(st.integers(1, 99), min_size=layers, max_size=layers),
        )
    ),
    st.integers(1, 300),
    st.integers(1, 16),
    st.booleans(),
)
def test_json_round_trip(shape: Any, vocab_size: int, head_dim: int, tied: bool) -> None:
    layers, heads, neurons = shape
    config = GPTConfig(
        vocab_size, 24, layers, tuple(heads), tuple(neurons), head_dim, tie_embeddings=tied
    )
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"num_layers": -1}, "num_layers must be a positive integer"),
        ({"embedding_dim": 2.5}, "embedding_dim must be a positive integer"),
        ({"max_sequence_length": True}, "max_sequence_length must be a positive integer"),
        ({"num_heads": 33}, r"at least 1\. Received: num_heads=33, embedding_dim=32"),
        ({"num_heads": (4, 4, 4)}, r"one per block \(num_layers=2\)"),
        ({"num_heads": (4, 2)}, "head_dim is needed"),
        ({"intermediate_dim": (1, 2, 3)}, "intermediate_dim must be one number"),
        ({"intermediate_dim": (64, 0)}, "intermediate_dim must be a positive integer"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"embedding_dropout": -0.1}, r"embedding_dropout must be in \[0, 1\)"),
        ({"activation": "gelu_now"}, "Unknown activation 'gelu_now'. Did you mean 'gelu_new'"),
        ({"head_dim": 0}, "head_dim must be a positive integer"),
    ],
)
def test_impossible_shapes(changes: dict[str, Any], message: str) -> None:
    shape = {"vocab_size": 100, "embedding_dim": 32, "num_layers": 2, "num_heads": 4}
    with pytest.raises(UserError, match=message):
        GPTConfig(**{**shape, **changes})


def test_heads_that_do_not_divide_the_width_get_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"42 wide, 252 together\. num_heads=4 would"):
        config = GPTConfig(5000, 256, 4, 6)
    assert (config.head_dim, config.num_heads) == (42, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GPTConfig.from_dict(config.to_dict()) == config  # it says its head_dim
        GPTConfig(5000, 256, 4, 8)


@pytest.mark.parametrize(
    ("cls", "wrong", "right"),
    [
        (GPTConfig, "num_layer", "num_layers"),
        (PruneConfig, "sparsty", "sparsity"),
        (QuantConfig, "weight", "weights"),
        (ShrinkConfig, "layer", "layers"),
        (DistillConfig, "temprature", "temperature"),
        (TrainConfig, "learning_rat", "learning_rate"),
    ],
)
def test_unknown_arguments_are_named(cls: type, wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=rf"{cls.__name__} has no argument '{wrong}'.*'{right}'"):
        cls(**{wrong: 1})


def test_unknown_keys_are_named() -> None:
    with pytest.raises(UserError, match="Did you mean 'num_layers'"):
        GPTConfig.from_dict({"num_layer": 2})


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["tiny"].vocab_size = 3  # type: ignore[misc]


def test_presets() -> None:
    assert preset("gpt2") == GPTConfig(50257, 768, 12, 12)
    assert [*PRESETS][:: len(PRESETS) - 1] == ["tiny", "gpt2-xl"]
    with pytest.raises(UserError, match="Did you mean 'gpt2-medium'"):
        preset("gpt2-medum")


def test_overriding_a_width_brings_the_widths_that_follow_from_it() -> None:
    config = preset("gpt2", embedding_dim=96)
    assert (config.head_dim, config.intermediate_dim) == (8, 384)
    assert preset("gpt2", num_heads=6).head_dim == 128
    assert preset("gpt2", embedding_dim=96, intermediate_dim=100).intermediate_dim == 100
    assert preset("gpt2", num_layers=2).num_layers == 2
    with pytest.raises(UserError, match="Unknown GPT option"):
        preset("gpt2", width=3)


def test_later_fields_are_written_only_where_they_say_something() -> None:
    plain = GPTConfig(100, 32, 3, 4, dropout=0.1, attention_dropout=0.1)
    assert plain == GPTConfig(100, 32, 3, 4, dropout=0.1)
    assert not {"activation", "embedding_dropout", "attention_dropout"} & plain.to_dict().keys()
    other = GPTConfig(100, 32, 3, 4, dropout=0.1, attention_dropout=0.0, activation="relu")
    assert other.dropouts == (0.1, 0.0, 0.1)
    assert GPTConfig.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    assert not other.with_dropout(dropout=0.0).has_dropout
    assert other.with_dropout(attention_dropout=0.2).dropouts == (0.1, 0.2, 0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_heads": 2**31 - 2},  # answered at once, with a divisor
        {"vocab_size": 2**31},
        {"vocab_size": 10**5000},
        {"dropout": "0.1"},
        {"dropout": float("nan")},
        {"layer_norm_epsilon": float("nan")},
        {"layer_norm_epsilon": -1.0},
        {"layer_norm_epsilon": "x"},
        {"tie_embeddings": "no"},
    ],
)
def test_values_that_no_model_has(wrong):
    shape = {"vocab_size": 61, "embedding_dim": 24, "num_layers": 2, "num_heads": 3}
    with pytest.raises(UserError, match=next(iter(wrong))):
        GPTConfig(**{**shape, **wrong})
