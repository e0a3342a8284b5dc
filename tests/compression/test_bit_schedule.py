"""Bits that change while a model trains: by step, by validation loss, and through a resume."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.quantization.adaptive_bits import AdaptiveBits
from tf_gptopt.compression.quantization.aware_state import (
    final_config,
    layer_bits,
    quantized_layers,
    set_bits,
)
from tf_gptopt.compression.quantization.bit_schedule import BitSchedule
from tf_gptopt.compression.quantization.config import BITS, QuantConfig
from tf_gptopt.compression.quantization.grids import find_grid
from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
from tf_gptopt.compression.quantization.rounding import matrix_rows, quantizable_layers
from tf_gptopt.models.checkpoints import named_weights
from tf_gptopt.models.gpt import GPTModel

IDS = np.random.default_rng(0).integers(0, 61, (32, 13)).astype("int32")
INPUTS, LABELS = IDS[:, :-1], IDS[:, 1:]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fit(model: Any, steps: int, *callbacks: Any) -> None:
    data = tf.data.Dataset.from_tensor_slices((INPUTS, LABELS)).batch(8).repeat()
    model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[*callbacks])


def compiled(model: Any) -> Any:
    model.compile(keras.optimizers.Adam(3e-3), LOSS)
    return model


def assert_on_final_grid(aware: GPTModel) -> None:
    config, weights = final_config(aware), named_weights(strip_quantization(aware))
    for layer, name in quantizable_layers(weights).items():
        rows = matrix_rows(name, weights[name])
        bits, group = BITS[config.weights_of(layer)], config.group_of(layer, rows.shape[1])
        assert bits == layer_bits(quantized_layers(aware))[layer]
        assert find_grid(rows, bits, group) is not None, (layer, bits, group)


def test_the_bits_of_now_come_before_those_it_was_made_with(tiny_model: Any) -> None:
    config = QuantConfig("int8", layers={"block_0_fc": "int8:channel", "block_1_*": "int8"})
    aware = quantize_aware(tiny_model(), config)
    for layer in quantized_layers(aware):
        if layer.layer.name in ("block_0_fc", "block_1_out"):
            set_bits(layer, 4)
    found = final_config(aware)
    names = ("block_0_fc", "block_0_out", "block_1_fc", "block_1_out")
    assert [found.weights_of(name) for name in names] == ["int4", "int8", "int8", "int4"]
    assert_on_final_grid(aware)


class Seen(keras.callbacks.Callback):
    """The bits of a layer after every step."""

    def __init__(self, aware: GPTModel, name: str = "block_0_fc") -> None:
        super().__init__()
        self.layer, self.bits, self.name = aware.base_layer(name), [], name

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.bits.append(layer_bits([self.layer])[self.name])


def test_bits_follow_the_schedule(tiny_model, capsys) -> None:
    aware = compiled(
        quantize_aware(tiny_model(num_layers=1, embedding_dim=32, num_heads=2), QuantConfig("int4"))
    )
    schedule = BitSchedule({"token_*": {0: 8}, "*": {0: 8, 3: 4, 5: "mse"}})
    seen = Seen(aware)
    fit(aware, 4, schedule, seen)
    function = aware.train_function
    clip = aware.base_layer("block_0_fc").quantized_weights[0][2]["clip"]
    assert (clip.numpy() == 1).all()
    fit(aware, 3, schedule, seen)
    assert aware.train_function is function  # the same graph
    assert seen.bits == [8, 8, 4, 4, 4, 4, 4]
    assert clip.numpy().min() < 0.9
    assert schedule.bits["token_embedding"] == 8
    assert final_config(aware).weights_of("token_embedding") == "int8"
    assert_on_final_grid(aware)
    line = "block_0_fc, block_0_out; int8: token_embedding."
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("learned", [False, True])
def test_a_resumed_run_goes_on_where_it_was(tiny_model, tmp_path, learned: bool) -> None:
    model = tiny_model(num_layers=1)
    config = QuantConfig("int4", granularity="channel", range="mse")
    data = tf.data.Dataset.from_tensor_slices((INPUTS, LABELS)).batch(8).repeat()

    def fresh() -> Any:
        aware = compiled(quantize_aware(model, config, learned_ranges=learned))
        aware.optimizer.build(aware.trainable_variables)
        return aware, tf.train.Checkpoint(model=aware, optimizer=aware.optimizer)

    def run(aware: GPTModel, first: int, steps: int) -> None:
        schedule = BitSchedule({0: 8, 2: 4})
        aware.fit(data.skip(first), steps_per_epoch=steps, verbose=0, callbacks=[schedule])

    whole, _ = fresh()
    run(whole, 0, 5)
    for cut in (2,) if learned else (1, 3):
        aware, checkpoint = fresh()
        run(aware, 0, cut)
        path = checkpoint.write(str(tmp_path / f"step_{cut}"))
        resumed, checkpoint = fresh()
        checkpoint.read(path).assert_existing_objects_matched().assert_consumed()
        run(resumed, cut, 5 - cut)
        for a, b in zip(whole.weights, resumed.weights, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{cut} {a.name}")


def test_adaptive_bits_go_as_far_as_the_loss_allows(tiny_model, tmp_path, capsys) -> None:
    aware = quantize_aware(
        tiny_model(num_layers=2, embedding_dim=32, num_heads=2), QuantConfig("int4")
    )
    teacher = tiny_model(num_layers=2, embedding_dim=32, num_heads=2)
    distiller = compiled(Distiller(student=aware, teacher=teacher, alpha=0.5))
    adaptive = AdaptiveBits(aware, IDS, tolerance=0.0, frequency=1)
    losses = iter([2.0, 1.9, 2.1, 2.0])  # 8 bits, block 0, block 1, the table
    real, adaptive.validation_loss = adaptive.validation_loss, lambda: next(losses)
    assert np.isfinite(real())
    good: list = []
    original = adaptive._judge

    def judge() -> None:
        if len(adaptive.state.history) == 1:  # what block 1 is tried from
            good.extend(adaptive.state.weights)
        original()
        if len(adaptive.state.history) == 2:
            bits = layer_bits(quantized_layers(aware))
            assert {bits["block_0_qkv"], bits["block_1_qkv"]} == {4, 8}
            kernels = [w.numpy() for w in aware.trainable_weights]
            before = dict(zip([w.ref() for w in aware.weights], good, strict=True))
            for weight, kernel in zip(aware.trainable_weights, kernels, strict=True):
                np.testing.assert_array_equal(kernel, before[weight.ref()])

    adaptive._judge = judge
    fit(distiller, 2, adaptive)
    checkpoint = tf.train.Checkpoint(model=aware)
    path = checkpoint.write(str(tmp_path / "middle"))
    aware.bit_state.tried = 0
    checkpoint.read(path)
    assert aware.bit_state.tried == 3
    fit(distiller, 3, adaptive)
    assert adaptive.state.done
    assert [kept for *_, kept in adaptive.state.history] == [True, False, True]
    assert sorted(name for name, bits in adaptive.bits.items() if bits == 8) == [
        f"block_1_{name}" for name in ("fc", "out", "proj", "qkv")
    ]
    assert_on_final_grid(aware)
    assert "int8: block_1_qkv, block_1_proj" in capsys.readouterr().err


def test_mistakes_name_their_remedy(tiny_model) -> None:
    model = tiny_model(num_layers=1)
    for wrong in ({}, {0: 5}, {-1: 8}, {True: 8}, {0: "mean"}, {"block_*": 8}, [8]):
        with pytest.raises(UserError, match=r"steps|step|bits"):
            BitSchedule(wrong)
    with pytest.raises(UserError, match="not quantization-aware"):
        BitSchedule({0: 8}).set_model(model)
    aware = quantize_aware(model)
    with pytest.raises(UserError, match="Did you mean 'block_0_qkv'"):
        BitSchedule({"block_0_qkw": {0: 8}}).set_model(aware)
    for wrong in ({"tolerance": -1}, {"frequency": 0}, {"groups": ["nothing"]}):
        with pytest.raises(UserError):
            AdaptiveBits(aware, IDS, **wrong)
