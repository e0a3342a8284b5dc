"""GPTModel is an ordinary Keras model: what works on those works on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.config import PRESETS, GPTConfig
from tf_gptopt.models.gpt import GPTModel, require_gpt

Build = Callable[..., GPTModel]


def loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def counting(examples: int = 64, time: int = 16, vocab_size: int = 50) -> tuple[Any, Any]:
    """Sequences that count upward: the next token is certain."""
    start = np.random.default_rng(0).integers(0, vocab_size, (examples, 1))
    ids = (start + np.arange(time + 1)) % vocab_size
    return ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)


# The model


def test_shapes_and_dtypes(tiny_model: Build) -> None:
    model = tiny_model()
    logits = model(np.zeros((2, 7), np.int32))
    assert logits.shape == (2, 7, 61)
    assert logits.dtype == tf.float32
    assert model.input_shape == (None, None)
    assert [layer.name for layer in model.layers][:2] == ["token_ids", "token_embedding"]


def test_logits_do_not_see_the_future(tiny_model: Build) -> None:
    model = tiny_model()
    ids = np.random.default_rng(1).integers(0, 61, (2, 12))
    changed = ids.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % 61
    before, after = np.asarray(model(ids)), np.asarray(model(changed))
    np.testing.assert_allclose(before[:, :7], after[:, :7], atol=1e-5)
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 0.1


def test_parameter_count_of_gpt2() -> None:
    with pytest.warns(UserWarning, match="random weights.*Hugging Face checkpoint"):
        model = GPTModel.from_preset("gpt2")
    assert model.count_params() == 124_439_808


def test_initial_weights_follow_gpt2() -> None:
    keras.utils.set_random_seed(0)
    model = GPTModel(500, 64, 8, 4)
    assert np.std(model.base_layer("block_0_qkv").kernel) == pytest.approx(0.02, rel=0.05)
    assert np.std(model.base_layer("block_0_out").kernel) == pytest.approx(0.02 / 4, rel=0.05)
    assert np.std(model.base_layer("token_embedding").embeddings) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_and_widths_may_differ_by_block(tiny_model: Build, tied: bool) -> None:
    model = tiny_model(
        num_layers=3,
        num_heads=(1, 4, 2),
        head_dim=5,
        intermediate_dim=(7, 30, 11),
        tie_embeddings=tied,
    )
    assert model(np.zeros((1, 4), np.int32)).shape == (1, 4, 61)
    assert [model.base_layer(f"block_{i}_qkv").units for i in range(3)] == [15, 60, 30]
    assert [model.base_layer(f"block_{i}_fc").units for i in range(3)] == [7, 30, 11]
    has_own_head = bool(model.base_layer("token_logits").weights)
    assert has_own_head is not tied


def test_dropout_is_for_training_only(tiny_model: Build) -> None:
    model = tiny_model(dropout=0.5)
    ids = np.arange(10)[None]
    same = np.asarray(tiny_model()(ids))
    np.testing.assert_allclose(model(ids), same, atol=1e-6)
    first, second = model(ids, training=True), model(ids, training=True)
    assert np.abs(first - same).max() > 0.1
    assert np.abs(first - second).max() > 0.1


# Keras


def test_it_learns_with_fit_and_callbacks(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = GPTModel(vocab_size=50, embedding_dim=32, num_layers=2, num_heads=4)
    model.compile(keras.optimizers.Adam(0.01), loss(), metrics=["accuracy"])
    inputs, labels = counting()
    best = str(tmp_path / "best.keras")
    history = model.fit(
        inputs,
        labels,
        epochs=12,
        batch_size=32,
        verbose=0,
        validation_data=(inputs[:8], labels[:8]),
        callbacks=[
            keras.callbacks.ModelCheckpoint(best, save_best_only=True),
            keras.callbacks.EarlyStopping(patience=3),
        ],
    ).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    value, accuracy = model.evaluate(inputs, labels, verbose=0)
    assert value < 0.5 * history["loss"][0]
    assert accuracy > 0.8
    assert Path(best).is_file()
    assert model.predict(inputs[:3], verbose=0).shape == (3, 16, 50)


@pytest.mark.parametrize("suffix", [".keras", ""])
def test_keras_save_and_load(tiny_model: Build, tmp_path: Path, suffix: str) -> None:
    model = tiny_model(num_layers=1, dropout=0.1, tie_embeddings=False)
    model.compile("adam", loss())
    inputs, labels = counting(8)
    model.fit(inputs, labels, verbose=0)
    path = str(tmp_path / f"model{suffix}")
    model.save(path)
    loaded = keras.models.load_model(path)
    assert isinstance(loaded, GPTModel)
    assert loaded.config == model.config
    np.testing.assert_allclose(loaded(inputs), model(inputs), atol=1e-6)
    if suffix:  # a SavedModel folder leaves the optimizer's state behind, for every Keras model
        for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
            np.testing.assert_array_equal(a, b)
    loaded.fit(inputs, labels, verbose=0)


def test_weights_file(tiny_model: Build, tmp_path: Path) -> None:
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    model.save_weights(tmp_path / "w.weights.h5")
    other.load_weights(tmp_path / "w.weights.h5")
    ids = np.arange(9)[None]
    np.testing.assert_array_equal(model(ids), other(ids))


def test_clone_model(tiny_model: Build) -> None:
    model = tiny_model()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    ids = np.arange(9)[None]
    np.testing.assert_allclose(clone(ids), model(ids), atol=1e-6)
    assert [layer.name for layer in clone.layers] == [layer.name for layer in model.layers]


def test_from_config(tiny_model: Build) -> None:
    model = tiny_model(num_heads=(1, 2), head_dim=6, dropout=0.1)
    again = GPTModel.from_config(model.get_config())
    assert again.config == model.config
    assert again.name == model.name


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_policies(policy: str) -> None:
    keras.mixed_precision.set_global_policy(policy)
    keras.utils.set_random_seed(0)
    model = GPTModel(50, 32, 1, 4, dropout=0.1)
    model.compile(keras.optimizers.Adam(0.01), loss())
    inputs, labels = counting(32)
    history = model.fit(inputs, labels, epochs=6, batch_size=16, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert np.isfinite(history).all()
    assert model(inputs[:1]).dtype == tf.float32
    assert model.base_layer("block_0_qkv").kernel.dtype == tf.float32
    assert model.base_layer("block_0_qkv").compute_dtype == policy.removeprefix("mixed_")


def test_mirrored_strategy(run_child: Callable[..., str]) -> None:
    code = """
        import numpy as np
        import tensorflow as tf
        from tf_gptopt._keras import keras
        from tf_gptopt.models.gpt import GPTModel

        ids = (np.arange(33)[None] + np.arange(16)[:, None]) % 50

        def train(strategy):
            with strategy.scope():
                keras.utils.set_random_seed(0)
                model = GPTModel(50, 32, 1, 4)
                model.compile(
                    keras.optimizers.SGD(0.5),
                    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                )
            losses = model.fit(
                ids[:, :-1], ids[:, 1:], epochs=3, batch_size=8, shuffle=False, verbose=0
            ).history["loss"]
            return losses, model.generate([1, 2, 3], max_length=6)

        one = train(tf.distribute.get_strategy())
        devices = [d.name for d in tf.config.list_logical_devices("CPU")]
        assert len(devices) == 2
        two = train(tf.distribute.MirroredStrategy(devices))
        np.testing.assert_allclose(one[0], two[0], rtol=1e-4)
        assert one[1] == two[1], (one, two)
    """
    run_child(code, devices=2)


# What cannot work


def test_too_long_an_input(tiny_model: Build) -> None:
    model = tiny_model(max_sequence_length=8)
    model(np.zeros((1, 8), np.int32))
    with pytest.raises(ValueError, match="context is 8"):
        model(np.zeros((1, 9), np.int32))
    model.compile("sgd", loss())
    long = np.zeros((2, 9), np.int32)
    with pytest.raises(Exception, match="max_sequence_length"):  # TensorFlow wraps the type
        model.fit(long, long, verbose=0)


def test_impossible_shape() -> None:
    with pytest.raises(UserError, match="num_heads=33, embedding_dim=32"):
        GPTModel(vocab_size=100, embedding_dim=32, num_layers=1, num_heads=33)


def test_presets_and_folders(tiny_model: Build, tmp_path: Path) -> None:
    model = GPTModel.from_preset("tiny", num_layers=1)
    assert model.config == GPTConfig(2048, 128, 1, 4, max_sequence_length=256)
    assert PRESETS["tiny"].num_layers == 2
    with pytest.raises(UserError, match="Did you mean 'gpt2-large'"):
        GPTModel.from_preset("gpt2-lage")

    model = tiny_model()
    model.save_to_preset(tmp_path / "saved")
    again = GPTModel.from_preset(tmp_path / "saved")
    ids = np.arange(9)[None]
    np.testing.assert_array_equal(model(ids), again(ids))
    with pytest.raises(UserError, match="cannot be overridden"):
        GPTModel.from_preset(tmp_path / "saved", num_layers=1)


def test_require_gpt(tiny_model: Build) -> None:
    model = tiny_model()
    assert require_gpt(model) is model
    with pytest.raises(UserError, match="A GPTModel is needed"):
        require_gpt(keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(UserError, match=r"must be a tf_keras model\. Received: str"):
        require_gpt("model")


def test_a_keras_3_model_is_turned_away() -> None:
    keras3 = pytest.importorskip("keras", minversion="3")
    model = keras3.Sequential([keras3.layers.Dense(2)])
    with pytest.raises(UserError, match=r"Keras 3 object .*import tf_keras as keras"):
        require_gpt(model)


def test_base_layer_names(tiny_model: Build) -> None:
    model = tiny_model()
    assert model.base_layer("block_1_out").name == "block_1_out"
    with pytest.raises(UserError, match="no layer 'block_9_out'"):
        model.base_layer("block_9_out")
