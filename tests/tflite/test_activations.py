"""Models whose MLP is not GPT-2's own: cached, gated, divided, saved, quantized and in a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._keras import keras
from tf_gptopt.compression.structured.gates import GatedGPT, open_gates
from tf_gptopt.models.checkpoints import load_model, named_weights, save_model
from tf_gptopt.tflite.inspecting import inspect_tflite
from tf_gptopt.training.loss import NextTokenLoss

KINDS = ("gelu", "relu")
IDS = np.arange(18).reshape(2, 9) * 5 % 61


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    return tiny_model(activation=request.param)


def by_hand(model: Any, ids: np.ndarray) -> np.ndarray:
    """The last block's MLP, from its layers' weights in numpy."""
    inner = keras.Model(model.inputs, model.get_layer("block_1_fc").output)(ids).numpy()
    if model.config.activation == "relu":
        y = np.maximum(inner, 0.0)
    else:
        y = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / np.sqrt(2)))
    return y @ model.get_layer("block_1_out").kernel.numpy() + model.get_layer("block_1_out").bias


def test_the_function_is_the_one_it_names(model: Any, tiny_model: Any, tmp_path: Path) -> None:
    out = keras.Model(model.inputs, model.get_layer("block_1_out").output)(IDS)
    np.testing.assert_allclose(out, by_hand(model, IDS), atol=1e-4)
    logits = model(IDS).numpy()
    assert np.abs(tiny_model()(IDS) - logits).max() > 1e-4  # gelu_new says something else

    # without a cache and with one
    assert model.generate(IDS[0], max_new_tokens=4)[:9].tolist() == IDS[0].tolist()
    greedy = [int(i) for i in np.argmax(logits[0, -1:], -1)]
    assert model.generate(IDS[0].tolist(), max_new_tokens=1)[9:] == greedy

    # on disk, in both formats
    save_model(model, tmp_path / "folder")
    np.testing.assert_array_equal(load_model(tmp_path / "folder")(IDS), logits)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(IDS), logits)
    assert loaded.config == model.config

    # behind gates
    gated, gates = GatedGPT(named_weights(model), model.config), open_gates(model.config, 2)
    x = gated.embed(IDS)
    for block in range(2):
        x, _ = gated.block(block, x, gates)
    final = keras.Model(model.inputs, model.get_layer("block_1_mlp_add").output)(IDS)
    np.testing.assert_allclose(x, final, atol=1e-4)


def test_training_has_its_gradient(model: Any) -> None:
    loss, inputs, labels = NextTokenLoss(), IDS[:, :-1], IDS[:, 1:]
    gradients = []
    for training in (True, False):  # the fused operations, and plain ones
        with tf.GradientTape() as tape:
            value = loss(labels, model(inputs, training=training))
        gradients.append(tape.gradient(value, model.trainable_variables))
    for fused, plain in zip(*gradients, strict=True):
        fused, plain = (tf.convert_to_tensor(g).numpy() for g in (fused, plain))
        np.testing.assert_allclose(fused, plain, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("scheme", "most"), [("float32", 1e-5), ("int8", 0.05), ("int4", 0.4)])
def test_a_file_computes_it(
    exported: Any, model: Any, relative_error: Any, scheme: str, most: float
) -> None:
    _, runtime = exported(scheme, model=model)
    assert relative_error(runtime.logits(IDS[0]), model(IDS[:1])[0].numpy()) < most
    assert runtime.config.activation == model.config.activation
    operation = "RELU" if model.config.activation == "relu" else "GELU"
    decode = {s.name: s for s in inspect_tflite(runtime.path).signatures}["decode"]
    assert decode.operations[operation] == 2
    assert operation not in decode.left  # XNNPACK takes it


def test_a_model_divided_over_devices_computes_it(run_child: Any) -> None:
    said = run_child("""
        import numpy as np
        import tf_gptopt as tgo
        ids = np.arange(18).reshape(2, 9)
        for kind in ("gelu", "relu"):
            rates = {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.9}
            shape = {"vocab_size": 61, "embedding_dim": 24, "num_layers": 1, "num_heads": 2}
            model = tgo.GPTModel(**shape, max_sequence_length=9, activation=kind, **rates)
            for weight in model.weights:
                weight.assign(np.random.default_rng(0).normal(0, 0.3, weight.shape))
            sharded = tgo.shard(model, "model=2")
            print(kind, np.abs(sharded(ids) - model(ids)).max() < 1e-4)
            print("dropped", np.abs(sharded(ids, training=True) - model(ids)).max() > 1e-2)
    """)
    assert said.split() == ["gelu", "True", "dropped", "True", "relu", "True", "dropped", "True"]
