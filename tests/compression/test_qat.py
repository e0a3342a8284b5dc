"""Quantization-aware training: the grid is exact, zeros stay, and what trains is what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.quantization.aware_state import final_config, quantized_layers
from tf_gptopt.compression.quantization.config import BITS, QuantConfig
from tf_gptopt.compression.quantization.grids import find_grid
from tf_gptopt.compression.quantization.ptq import quantize
from tf_gptopt.compression.quantization.qat import (
    is_quantization_aware,
    quantize_aware,
    strip_quantization,
)
from tf_gptopt.compression.quantization.rounding import (
    matrix_rows,
    quantizable_layers,
    round_weights,
)
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


def matrices(model: GPTModel) -> dict[str, np.ndarray]:
    """What can be quantized, `(rows, width)`, by layer."""
    weights = named_weights(model)
    return {x: matrix_rows(n, weights[n]) for x, n in quantizable_layers(weights).items()}


def assert_on_grid(model: GPTModel, config: QuantConfig = QuantConfig()) -> None:
    for layer, rows in matrices(model).items():
        kind, group = config.weights_of(layer), config.group_of(layer, rows.shape[1])
        if kind in BITS:
            grid = find_grid(rows, BITS[kind], group)
            assert grid is not None, layer
            np.testing.assert_array_equal(grid.values(), rows)


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
    positions = weights["position_embedding/embeddings"]
    np.testing.assert_array_equal(positions, positions.astype(np.float16))  # as the file has them
    assert ("token_logits" in matrices(plain)) is not tied
    assert_on_grid(plain)
    assert len(plain.trainable_weights) == len(plain.weights)  # norms train again
    # a second round starts from the same grid
    again = named_weights(strip_quantization(quantize_aware(plain)))
    for name, weight in weights.items():
        np.testing.assert_array_equal(again[name], weight)


@pytest.mark.parametrize("learned", [False, True])
def test_every_kind_of_weights_in_one_model(tiny_model, learned: bool) -> None:
    layers = {
        "block_0_qkv": "int4",
        "block_0_proj": "int4:64",  # which its rows of 48 are not: a channel
        "block_0_fc": "int8:tensor",
        "token_*": "int4:channel",
        "block_1_qkv": "float32",
        "block_1_proj": "float16",
    }
    config = QuantConfig("int8", layers=layers, range="mse", float_layers="block_1_out")
    model = tiny_model(embedding_dim=64, num_heads=(2, 4), head_dim=24, tie_embeddings=False)
    aware = quantize_aware(model, config, learned_ranges=learned)
    rounded = quantize(model, config)
    assert_on_grid(strip_quantization(aware), config)
    for layer, rows in matrices(strip_quantization(aware)).items():
        # nothing has been trained yet
        np.testing.assert_array_equal(rows, matrices(rounded)[layer], err_msg=layer)
    scales = [weight for weight in aware.trainable_weights if "clip" in weight.name]
    assert len(scales) == learned * len(quantized_layers(aware))
    train(aware, epochs=1)
    assert all((scale.numpy() != 1).any() for scale in scales)
    plain = strip_quantization(aware)
    np.testing.assert_array_equal(plain(text()[0]), aware(text()[0]))
    assert_on_grid(plain, config)
    assert final_config(aware) == config.for_model(plain.config)
    # whoever comes from there, as from GPTQ, begins there
    again = matrices(strip_quantization(quantize_aware(plain, config, learned_ranges=learned)))
    for layer, rows in matrices(plain).items():
        np.testing.assert_array_equal(again[layer], rows, err_msg=layer)


def test_one_range_for_all(tiny_model) -> None:
    config = QuantConfig("int4", granularity="global")
    model = tiny_model(num_layers=1)
    aware = quantize_aware(model, config)
    rounded = matrices(quantize(model, config))
    for layer, rows in matrices(strip_quantization(aware)).items():
        np.testing.assert_array_equal(rows, rounded[layer])
    train(aware, epochs=1)
    grids = [find_grid(rows, 4, "global") for rows in matrices(strip_quantization(aware)).values()]
    assert len({grid.scales.item() for grid in grids}) == 1
    with pytest.raises(UserError, match="not learned"):
        quantize_aware(model, config, learned_ranges=True)


def test_layer_norms_are_folded_and_frozen(tiny_model) -> None:
    model = tiny_model()
    folded = fold_layer_norms(named_weights(model))
    aware = quantize_aware(model)
    plain = named_weights(strip_quantization(aware))
    rounded = round_weights(folded, QuantConfig())
    for name, weight in rounded.items():  # nothing has been trained yet
        np.testing.assert_array_equal(plain[name], weight, err_msg=name)
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
    assert find_grid(weights["block_0_fc/kernel"].T) is not None


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
    model = halved(tiny_model(num_layers=1))
    zeros = {name: weight == 0 for name, weight in named_weights(model).items()}
    aware = quantize_aware(model)
    # an optimizer with momentum and decay, and weights knocked off zero, as no training would
    losses = train(aware, epochs=6, optimizer=keras.optimizers.AdamW(3e-3, weight_decay=0.1))
    assert losses[-1] < losses[0]
    for layer in quantized_layers(aware):
        raw = layer.quantized_weights[0][0]
        raw.assign_add(tf.fill(raw.shape, 1e-2))
    train(aware, epochs=1, optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    logits = aware(text()[0]).numpy()
    plain = strip_quantization(aware)
    np.testing.assert_array_equal(plain(text()[0]), logits)
    weights = named_weights(plain)
    for name in quantizable_layers(weights).values():
        assert 0.3 < zeros[name].mean() < 0.7
        assert (weights[name][zeros[name]] == 0).all()
        assert (weights[name] == 0).mean() < 0.75  # and the others live
    assert_on_grid(plain)


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


@pytest.mark.parametrize(
    ("policy", "policy_lasts"), [("mixed_bfloat16", True), ("mixed_float16", False)]
)
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
    assert_on_grid(plain)


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
        # static activations: each replica follows its half of the batch, and their mean is read
        from tf_gptopt.compression.quantization.config import QuantConfig
        config = QuantConfig(activations="static", kv_cache="int8")
        found = []
        for scope in (tf.distribute.get_strategy().scope, strategy.scope):
            with scope():
                model = GPTModel(61, 24, 1, 3, max_sequence_length=16)
                model.set_weights([np.full(w.shape, 0.1) * np.sign(w) for w in weights[:16]])
                static = quantize_aware(model, config, learned_ranges=True)
                static.compile(keras.optimizers.SGD(0.1),
                               keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            losses = static.fit(ids[:, :-1], ids[:, 1:], batch_size=8, epochs=2, shuffle=False,
                                verbose=0).history["loss"]
            ranges = strip_quantization(static).activation_ranges
            found.append([*losses, *ranges["block_0_qkv/input"], *ranges["block_0_fc/output"]])
        np.testing.assert_allclose(found[0], found[1], rtol=0.2)
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
    plain, folded = strip_quantization(aware), fold_layer_norms(named_weights(model))
    weights = named_weights(plain)
    for name in ("token_embedding/embeddings", "block_1_qkv/kernel", "block_1_out/kernel"):
        np.testing.assert_array_equal(weights[name], folded[name])
    assert_on_grid(plain, config)


def test_mistakes_name_their_remedy(tiny_model) -> None:
    model = tiny_model(num_layers=1)
    for scheme in ("float16", "float32"):
        with pytest.raises(UserError, match=f"Export the model with QuantConfig\\('{scheme}'\\)"):
            quantize_aware(model, QuantConfig(scheme))
    long = GPTModel(61, 256, 1, 4, max_sequence_length=4096)  # its cache is int8 where nobody says
    for one in (model, long):
        with pytest.raises(UserError, match="keeps every layer float"):
            quantize_aware(one, QuantConfig(float_layers="*"))
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
