"""Quantization-aware training: the grid is exact, zeros stay, and what trains is what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.qat import (
    is_quantization_aware,
    quantize_aware,
    strip_quantization,
)
from tf_gptopt.compression.quantization.quantizers import int8_fake_quantize, int8_scales
from tf_gptopt.models.checkpoints import assign_weights, named_weights
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.models.gpt import GPTModel

UNEVEN = {"num_heads": (2, 3), "head_dim": 8, "intermediate_dim": (40, 17)}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def text(vocab_size: int = 61, examples: int = 16, time: int = 12) -> Any:
    """Sequences that count upwards by 1 or 2: a GPT learns them in a few steps."""
    steps = np.random.default_rng(0).integers(1, 3, (examples, time + 1))
    ids = (np.cumsum(steps, axis=1) % vocab_size).astype("int32")
    return ids[:, :-1], ids[:, 1:]


def train(model: keras.Model, epochs: int = 5, optimizer: Any = None, **compile_args: Any) -> list:
    model.compile(optimizer or keras.optimizers.Adam(3e-3), LOSS, **compile_args)
    return model.fit(*text(), batch_size=8, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def halved(model: GPTModel, seed: int = 1) -> GPTModel:
    """`model` with about half of every kernel and of the token table at zero."""
    rng = np.random.default_rng(seed)
    weights = named_weights(model)
    for name, weight in weights.items():
        if name.endswith("/kernel") or name == "token_embedding/embeddings":
            weight *= rng.random(weight.shape) > 0.5
    assign_weights(model, weights)
    return model


def quantized_names(model: GPTModel) -> dict[str, int]:
    """Name of each quantized weight and its channel axis."""
    axes = {name: 1 for name in named_weights(model) if name.endswith("/kernel")}
    return {**axes, "token_embedding/embeddings": 0}


def requantize(weights: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """What any symmetric max-abs quantizer computes: (integers, scales)."""
    largest = np.abs(weights).max(axis=1 - axis, keepdims=True)
    scales = np.where(largest == 0, 1, largest / np.float32(127)).astype(np.float32)
    return np.rint(weights / scales), scales


def assert_on_grid(weights: np.ndarray, axis: int) -> None:
    integers, scales = requantize(weights, axis)
    assert np.abs(integers).max() <= 127
    np.testing.assert_array_equal(integers.astype(np.float32) * scales, weights)


# The grid


@settings(max_examples=150, deadline=None)
@given(
    weights=arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=7),
        elements=st.floats(-(2.0**66), 2.0**66, width=32)
        | st.floats(-1, 1, width=32)
        | st.just(0.0),
    ),
    axis=st.integers(0, 1),
)
def test_weights_on_the_grid_quantize_to_themselves(weights: np.ndarray, axis: int) -> None:
    scales = int8_scales(weights, axis).numpy()
    result = int8_fake_quantize(weights, axis).numpy()
    assert np.isfinite(result).all()
    assert (scales > 0).all()
    integers, scales_again = requantize(result, axis)
    alive = result.any(axis=1 - axis, keepdims=True)
    assert (np.abs(weights) < 1e-29)[np.broadcast_to(~alive, weights.shape)].all()
    np.testing.assert_array_equal(scales_again[alive], scales[alive])  # to the last bit
    np.testing.assert_array_equal(integers, np.rint(result / scales))
    largest = np.abs(integers).max(axis=1 - axis, keepdims=True)
    np.testing.assert_array_equal(largest, np.where(alive, 127, 0))
    assert (np.abs(result - weights) <= 0.501 * np.where(alive, scales, 1e-29)).all()
    np.testing.assert_array_equal(int8_fake_quantize(result, axis).numpy(), result)


def test_every_one_of_many_scales_comes_back_exactly() -> None:
    # with a scale of full precision, max|w| / 127 of about one channel in 128 would differ
    weights = np.random.default_rng(0).normal(size=(20_000, 5)).astype(np.float32)
    result = int8_fake_quantize(weights, 0).numpy()
    expected = int8_scales(weights, 0).numpy()
    np.testing.assert_array_equal(requantize(result, 0)[1], expected)
    np.testing.assert_allclose(expected, np.abs(weights).max(1, keepdims=True) / 127, rtol=2**-16)
    # nor does it matter how the next tool divides
    for again in (result * (np.float32(1) / expected), result.astype(np.float64) / expected):
        np.testing.assert_array_equal(np.rint(again) * expected, result)


def test_a_channel_of_zeros_stays_zero_and_finite() -> None:
    weights = np.float32([[0, 1, 1e-38], [0, -3, 0]])
    np.testing.assert_array_equal(int8_scales(weights, 1)[0, ::2], [1, 1])
    np.testing.assert_array_equal(int8_fake_quantize(weights, 1)[:, ::2], np.zeros((2, 2)))


def test_gradients_pass_straight_through_and_stop_at_the_mask() -> None:
    weights = tf.Variable(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    factors = tf.reshape(tf.range(12.0) - 5.0, (4, 3))
    mask = tf.reshape(tf.range(12), (4, 3)) % 3 != 0
    for used, expected in ((None, factors), (mask, tf.where(mask, factors, 0.0))):
        with tf.GradientTape() as tape:
            result = int8_fake_quantize(weights, 1, used)
            loss = tf.reduce_sum(result * factors)
        np.testing.assert_array_equal(tape.gradient(loss, weights), expected)
        if used is not None:
            np.testing.assert_array_equal(result.numpy() != 0, mask)


# The model


def test_quantize_aware_copies_and_stays_close(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model(vocab_size=300, dropout=0.1)
    model.tokenizer = tiny_tokenizer
    before, trainable = named_weights(model), len(model.trainable_weights)
    inputs = text()[0]
    expected = model(inputs).numpy()
    aware = quantize_aware(model, QuantConfig("int8"))
    assert isinstance(aware, GPTModel)
    assert (aware.config, aware.name, aware.tokenizer) == (model.config, "gpt", tiny_tokenizer)
    error = aware(inputs).numpy() - expected
    assert 0 < np.abs(error).mean() < 0.03 * np.abs(expected).mean()
    for name in ("block_0_qkv", "token_embedding"):
        assert aware.base_layer(name).layer.name == name
    train(aware, epochs=1)
    for name, weight in named_weights(model).items():
        np.testing.assert_array_equal(weight, before[name])
    np.testing.assert_array_equal(model(inputs), expected)
    assert len(model.trainable_weights) == trainable
    assert model.get_layer("block_1_fc").output is not None  # raises when the layer is shared
    assert not is_quantization_aware(model)
    assert is_quantization_aware(aware)


@pytest.mark.parametrize("tied", [True, False])
def test_strip_is_the_same_function_on_the_grid(tiny_model, tied: bool) -> None:
    aware = quantize_aware(tiny_model(tie_embeddings=tied, **UNEVEN))
    train(aware, epochs=2)
    inputs = text()[0]
    logits = aware(inputs).numpy()
    plain = strip_quantization(aware)
    assert isinstance(plain, GPTModel)
    assert is_quantization_aware(aware)
    assert not is_quantization_aware(plain)
    np.testing.assert_array_equal(plain(inputs), logits)
    weights = named_weights(plain)
    axes = quantized_names(plain)
    assert ("token_logits/kernel" in axes) is not tied
    for name, axis in axes.items():
        assert_on_grid(weights[name], axis)
    assert len(plain.trainable_weights) == len(plain.weights)  # norms train again
    # a second round starts from the same grid
    again = named_weights(strip_quantization(quantize_aware(plain)))
    for name, weight in weights.items():
        np.testing.assert_array_equal(again[name], weight)


def test_layer_norms_are_folded_and_frozen(tiny_model) -> None:
    model = tiny_model()
    folded = fold_layer_norms(named_weights(model))
    aware = quantize_aware(model)
    plain = named_weights(strip_quantization(aware))
    for name, axis in quantized_names(model).items():
        scales = requantize(folded[name], axis)[1]
        assert (np.abs(plain[name] - folded[name]) <= 0.51 * scales).all()
    np.testing.assert_array_equal(plain["block_1_qkv/bias"], folded["block_1_qkv/bias"])
    trainable = {id(variable) for variable in aware.trainable_weights}
    for norm in ("block_0_attention_norm", "block_1_mlp_norm"):
        gamma, beta = aware.base_layer(norm).weights
        assert not {id(gamma), id(beta)} & trainable
        np.testing.assert_array_equal([gamma, beta], [np.ones(24), np.zeros(24)])
    train(aware, epochs=1)
    trained = named_weights(strip_quantization(aware))
    for name, weight in fold_layer_norms(trained).items():  # there is nothing left to fold
        np.testing.assert_array_equal(weight, trained[name])
    assert (trained["final_norm/gamma"] != plain["final_norm/gamma"]).all()


def test_norms_that_somebody_unfroze_are_folded_again(tiny_model) -> None:
    aware = quantize_aware(tiny_model(num_layers=1))
    aware.trainable = True
    train(aware, epochs=1)
    weights = named_weights(strip_quantization(aware))
    np.testing.assert_array_equal(weights["block_0_mlp_norm/gamma"], np.ones(24))
    assert_on_grid(weights["block_0_fc/kernel"], 1)


def test_gradients_are_those_of_the_stripped_model(tiny_model) -> None:
    aware = quantize_aware(tiny_model(num_layers=1))
    plain = strip_quantization(aware)
    inputs, labels = text()
    gradients = []
    for model in (aware, plain):
        with tf.GradientTape() as tape:
            loss = LOSS(labels, model(inputs, training=True))
        named = {
            f"{getattr(layer, 'layer', layer).name}/{weight.name.split('/')[-1]}": weight
            for layer in model.layers
            for weight in layer.trainable_weights
        }
        gradients.append(tape.gradient(loss, named))
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


# Zeros


def test_zeros_stay_zero_through_training(tiny_model) -> None:
    model = halved(tiny_model())
    zeros = {name: weight == 0 for name, weight in named_weights(model).items()}
    aware = quantize_aware(model)
    # an optimizer with momentum and decay, and weights knocked off zero, as no training would
    losses = train(aware, epochs=10, optimizer=keras.optimizers.AdamW(3e-3, weight_decay=0.1))
    assert losses[-1] < losses[0]
    for layer in aware.layers:
        if hasattr(layer, "quantized_weights"):
            raw = layer.quantized_weights[0][0]
            raw.assign_add(tf.fill(raw.shape, 1e-2))
    train(aware, epochs=1, optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    logits = aware(text()[0]).numpy()
    plain = strip_quantization(aware)
    np.testing.assert_array_equal(plain(text()[0]), logits)
    weights = named_weights(plain)
    for name, axis in quantized_names(model).items():
        assert 0.3 < zeros[name].mean() < 0.7
        assert (weights[name][zeros[name]] == 0).all()
        assert (weights[name] == 0).mean() < 0.75  # and the others live
        assert_on_grid(weights[name], axis)


def test_a_dense_model_carries_no_mask(tiny_model) -> None:
    assert not [
        w.name for w in quantize_aware(tiny_model(num_layers=1)).weights if "mask" in w.name
    ]
    masks = [
        w for w in quantize_aware(halved(tiny_model(num_layers=1))).weights if "mask" in w.name
    ]
    assert len(masks) == 5
    assert {w.dtype for w in masks} == {tf.bool}


# Keras


def test_loss_falls_and_jit_compile_agrees(tiny_model) -> None:
    model = tiny_model(num_layers=1)
    plain = train(quantize_aware(model), epochs=5)
    jitted = train(quantize_aware(model), epochs=5, jit_compile=True)
    assert plain[-1] < 0.9 * plain[0]
    np.testing.assert_allclose(jitted, plain, rtol=1e-2)


def test_save_and_load(tiny_model, tmp_path) -> None:
    aware = quantize_aware(halved(tiny_model(**UNEVEN)))
    train(aware, epochs=1)
    aware.save(tmp_path / "aware.keras")
    loaded = keras.models.load_model(tmp_path / "aware.keras")
    assert isinstance(loaded, GPTModel)
    inputs = text()[0]
    np.testing.assert_array_equal(loaded(inputs), aware(inputs))
    np.testing.assert_array_equal(strip_quantization(loaded)(inputs), aware(inputs))
    train(loaded, epochs=1)
    assert [w.shape for w in loaded.trainable_weights] == [w.shape for w in aware.trainable_weights]
    stripped = named_weights(strip_quantization(loaded))
    assert (stripped["block_0_fc/kernel"] == 0).mean() > 0.4


def test_a_checkpoint_resumes_to_the_same_weights(tiny_model, tmp_path) -> None:
    model = halved(tiny_model(num_layers=1))
    inputs, labels = text()

    def fresh() -> Any:
        aware = quantize_aware(model)
        aware.compile(keras.optimizers.AdamW(1e-2), LOSS)
        aware.optimizer.build(aware.trainable_variables)
        return aware, tf.train.Checkpoint(model=aware, optimizer=aware.optimizer)

    aware, checkpoint = fresh()
    aware.train_on_batch(inputs, labels)
    path = checkpoint.write(str(tmp_path / "step_1"))
    aware.train_on_batch(inputs, labels)
    resumed, checkpoint = fresh()
    checkpoint.read(path).assert_existing_objects_matched().assert_consumed()
    resumed.train_on_batch(inputs, labels)
    for restored, original in zip(resumed.weights, aware.weights, strict=True):
        np.testing.assert_array_equal(restored, original)


def test_a_frozen_layer_does_not_train(tiny_model) -> None:
    aware = quantize_aware(tiny_model(num_layers=1))
    layer, count = aware.base_layer("block_0_fc"), len(aware.weights)
    layer.trainable = False
    kernel = layer.quantized_weights[0][0].numpy()
    train(aware, epochs=1)
    np.testing.assert_array_equal(layer.quantized_weights[0][0], kernel)
    assert len(aware.weights) == count
    assert strip_quantization(aware).get_layer("block_0_fc").trainable is False


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("policy_lasts", [True, False])
def test_mixed_precision(tiny_model, policy: str, policy_lasts: bool) -> None:
    keras.mixed_precision.set_global_policy(policy)
    model = tiny_model(num_layers=1, tie_embeddings=False)
    now = policy if policy_lasts else "float32"
    keras.mixed_precision.set_global_policy(now)
    aware = quantize_aware(model)
    assert keras.mixed_precision.global_policy().name == now
    assert aware.base_layer("block_0_qkv").layer.compute_dtype == policy.removeprefix("mixed_")
    losses = train(aware, epochs=4)
    assert losses[-1] < losses[0]
    assert {w.dtype for w in aware.trainable_weights} == {tf.float32}
    plain = strip_quantization(aware)
    np.testing.assert_array_equal(plain(text()[0]), aware(text()[0]))
    for name, axis in quantized_names(plain).items():
        assert_on_grid(named_weights(plain)[name], axis)


def test_under_mirrored_strategy_and_back_from_disk(run_child, tmp_path) -> None:
    code = f"""
        import numpy as np, tf_keras as keras
        from tf_gptopt.models.gpt import GPTModel
        from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
        ids = (np.arange(16 * 13).reshape(16, 13) * 7 % 61).astype("int32")
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        losses = []
        weights = None
        for scope in (tf.distribute.get_strategy().scope, strategy.scope):
            with scope():
                model = GPTModel(61, 24, 2, 3, max_sequence_length=16)
            weights = weights or [w * (np.abs(w) > 0.01) for w in model.get_weights()]
            model.set_weights(weights)
            aware = quantize_aware(model)  # takes the model's strategy by itself
            with scope():
                aware.compile(keras.optimizers.SGD(0.5),
                              keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            losses.append(aware.fit(ids[:, :-1], ids[:, 1:], batch_size=8, epochs=3,
                                    shuffle=False, verbose=0).history["loss"])
        print(type(aware.trainable_weights[0]).__name__, losses)
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
        assert losses[0][-1] < losses[0][0]
        plain = strip_quantization(aware)
        np.testing.assert_array_equal(plain(ids[:, :-1]), aware(ids[:, :-1]))
        assert np.mean(plain.get_layer("block_0_fc").get_weights()[0] == 0) > 0.3
        aware.save({str(tmp_path / "mirrored.keras")!r})
        np.save({str(tmp_path / "logits.npy")!r}, aware(ids[:, :-1]))
    """
    assert "MirroredVariable" in run_child(code)
    loaded = keras.models.load_model(tmp_path / "mirrored.keras")
    ids = (np.arange(16 * 13).reshape(16, 13) * 7 % 61).astype("int32")
    np.testing.assert_allclose(loaded(ids[:, :-1]), np.load(tmp_path / "logits.npy"), atol=1e-5)


def test_a_student_learns_from_its_teacher_and_generates(tiny_model) -> None:
    from tf_gptopt.compression.distillation.distiller import Distiller
    from tf_gptopt.models.generation import generate

    teacher = tiny_model()
    student = quantize_aware(halved(tiny_model(seed=3, num_layers=1)))
    distiller = Distiller(student=student, teacher=teacher, temperature=2.0, alpha=0.5)
    losses = train(distiller, epochs=3)
    assert losses[-1] < losses[0]
    plain = strip_quantization(distiller.student)
    np.testing.assert_array_equal(plain(text()[0]), student(text()[0]))
    assert (named_weights(plain)["block_0_fc/kernel"] == 0).mean() > 0.4
    prompts = [[1, 2, 3], [9, 10]]
    assert generate(student, prompts, max_length=8) == generate(plain, prompts, max_length=8)


# What is kept float, and mistakes


def test_float_layers_stay_float(tiny_model) -> None:
    model = tiny_model()
    config = QuantConfig("int8", float_layers=("token_embedding", "block_1_*"))
    aware = quantize_aware(model, config)
    plain, folded = named_weights(strip_quantization(aware)), fold_layer_norms(named_weights(model))
    for name, axis in quantized_names(model).items():
        if name.startswith(("token_embedding", "block_1")):
            np.testing.assert_array_equal(plain[name], folded[name])
        else:
            assert_on_grid(plain[name], axis)


def test_mistakes_name_their_remedy(tiny_model) -> None:
    model = tiny_model(num_layers=1)
    for scheme in ("float16", "float32"):
        with pytest.raises(UserError, match=f"Export the model with QuantConfig\\('{scheme}'\\)"):
            quantize_aware(model, QuantConfig(scheme))
    with pytest.raises(UserError, match="keeps every layer float"):
        quantize_aware(model, QuantConfig(float_layers="*"))
    with pytest.raises(UserError, match="Did you mean 'block_0_qkv'"):
        quantize_aware(model, QuantConfig(float_layers="block_0_qk"))
    with pytest.raises(UserError, match="strip_quantization"):
        quantize_aware(quantize_aware(model))
    with pytest.raises(UserError, match="no quantization to strip"):
        strip_quantization(model)


def test_a_model_with_pruning_wrappers_is_refused(tiny_model) -> None:
    from tf_gptopt.compression.pruning.config import PruneConfig
    from tf_gptopt.compression.pruning.pruner import prune

    with pytest.raises(UserError, match="strip_pruning"):
        quantize_aware(prune(tiny_model(num_layers=1), PruneConfig(sparsity=0.5)))


def test_other_models_are_refused() -> None:
    import keras as keras3

    inputs = keras.Input((3,))
    with pytest.raises(UserError, match="GPTModel is needed"):
        quantize_aware(keras.Model(inputs, keras.layers.Dense(2)(inputs)))
    inputs = keras3.Input((3,))
    for verb in (quantize_aware, strip_quantization):
        with pytest.raises(UserError, match="Keras 3"):
            verb(keras3.Model(inputs, keras3.layers.Dense(2)(inputs)))


def test_a_fresh_process_loads_a_saved_model(tmp_path, run_child):
    aware = quantize_aware(GPTModel(50, 16, 1, 2, max_sequence_length=8))
    aware.save(tmp_path / "aware.keras")
    printed = run_child(
        f"""
        import tf_gptopt.models.gpt
        from tf_gptopt._keras import keras

        model = keras.models.load_model({str(tmp_path / "aware.keras")!r})
        print(type(model).__name__, type(model.base_layer("block_0_qkv")).__name__)
        """,
        devices=0,
    )
    assert printed.split()[-2:] == ["GPTModel", "QuantizedLayer"]
