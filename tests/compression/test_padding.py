"""Padding is not text: whoever calibrates or validates on padded examples sees the text alone."""

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.calibration_text import calibration_ids
from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune
from tf_gptopt.compression.pruning.validation import ValidationLoss
from tf_gptopt.compression.quantization.adaptive_bits import AdaptiveBits
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.ptq import quantize
from tf_gptopt.compression.quantization.qat import quantize_aware
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.compression.structured.gates import GatedGPT
from tf_gptopt.compression.structured.importance import importance
from tf_gptopt.compression.structured.shrinking import shrink
from tf_gptopt.models.checkpoints import named_weights
from tf_gptopt.training.loss import NextTokenLoss

TEXT, TIME = 5, 16  # tokens of an example, and with its padding


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(1, 61, (24, TEXT)).astype("int32")


@pytest.fixture(scope="module")
def sources(ids):
    """The same text: alone, padded with a negative id, and beside labels that leave padding out."""
    padded = np.pad(ids, [(0, 0), (0, TIME - TEXT)])
    labels = np.full_like(padded, -100)
    labels[:, 2 : TEXT - 1] = ids[:, 3:]  # as in instruction tuning: nor does the prompt count
    pairs = tf.data.Dataset.from_tensor_slices((padded, labels)).batch(10)
    negative = np.pad(ids, [(0, 0), (0, TIME - TEXT)], constant_values=-7)
    return {"alone": ids, "negative": negative, "pair": (padded, labels), "batches": pairs}


def test_what_is_text_is_found_beside_the_labels(ids, sources):
    want = np.pad(ids, [(0, 0), (0, TIME - TEXT)], constant_values=-1)
    for kind in ("negative", "pair", "batches"):
        np.testing.assert_array_equal(calibration_ids(sources[kind]), want)
    inputs, labels = (x.copy() for x in sources["pair"])
    labels[:, -1] = 3  # a label at the end, and none that names a token behind it
    labels[0] = -1  # an example without a label is none
    np.testing.assert_array_equal(calibration_ids((inputs, labels)), inputs[1:])
    labels[:] = -1
    with pytest.raises(UserError, match="all labels or ids are negative"):
        calibration_ids((inputs, labels))
    with pytest.raises(UserError, match=r"one shape.*\(24, 16\) and \(24, 15\)"):
        calibration_ids((inputs, labels[:, 1:]))


def prune_by(score):
    def masks(model, source):
        config = PruneConfig(0.5, score=score, schedule="constant", min_weights=0)
        pruned = prune(model, config, calibration=source)
        return [layer.mask_values() for layer in pruned.layers if hasattr(layer, "mask_values")]

    return masks


def quantize_by(recipe):
    def weights(model, source):
        quantized = quantize(model, QuantConfig.from_recipe(recipe), calibration=source)
        ranges = quantized.activation_ranges or {}
        return [*named_weights(quantized).values(), *map(np.array, ranges.values())]

    return weights


def importance_by(kind):
    def scores(model, source):
        gpt = GatedGPT(named_weights(model), model.config)
        return tf.nest.flatten(importance(gpt, calibration_ids(source), kind))

    return scores


def shrink_to_budget(model, source):
    config = ShrinkConfig(parameters=0.8)
    return list(named_weights(shrink(model, config, calibration=source)).values())


MEASURES = {
    "wanda": prune_by("wanda"),
    "taylor": prune_by("taylor"),
    "sparsegpt": prune_by("sparsegpt"),
    "gptq": quantize_by("int4-gptq"),
    "static": quantize_by("int8-static-smooth"),
    "activation": importance_by("activation"),
    "gradients": importance_by("taylor"),
    "budget": shrink_to_budget,
}


@pytest.mark.parametrize("kind", MEASURES)
def test_padding_is_not_measured(tiny_model, sources, kind):
    model, measure = tiny_model(), MEASURES[kind]
    want = measure(model, sources["alone"])
    blind = measure(model, np.maximum(sources["negative"], 0))  # padding taken for text
    assert not all(
        a.shape == b.shape and np.allclose(a, b) for a, b in zip(want, blind, strict=True)
    )
    for source in ("negative", "batches"):
        for a, b in zip(want, measure(model, sources[source]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def deciding_loss(model, validation, kind):
    if kind == "bits":
        return AdaptiveBits(quantize_aware(model, QuantConfig("int8")), validation).validation_loss
    config = PruneConfig(0.5, schedule="adaptive", end_step=8, frequency=4, min_weights=0)
    watch = pruning_callbacks(prune(model, config), validation=validation)[-1]
    return watch.validation_loss


@pytest.mark.parametrize("kind", ["sparsity", "bits"])
def test_callbacks_decide_by_the_labels(tiny_model, sources, kind):
    model, (inputs, labels) = tiny_model(), sources["pair"]
    loss = deciding_loss(model, (inputs, labels), kind)
    trained = loss.model
    trained.compile("sgd", NextTokenLoss())
    want = trained.evaluate(inputs, labels, verbose=0)
    assert loss() == pytest.approx(want, rel=1e-5)
    others = np.where(labels >= 0, (labels + 7) % 61, labels)
    assert deciding_loss(model, sources["batches"], kind)() == pytest.approx(want, rel=1e-5)
    assert deciding_loss(model, (inputs, others), kind)() != pytest.approx(want, rel=1e-3)


def test_validation_on_ids_is_on_each_next_token(tiny_model, sources):
    model = tiny_model()
    alone, padded = (ValidationLoss(model, sources[kind])() for kind in ("alone", "negative"))
    theirs = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ids = sources["alone"]
    assert alone == pytest.approx(float(theirs(ids[:, 1:], model(ids[:, :-1]))), rel=1e-5)
    assert padded == pytest.approx(alone, rel=1e-5)
    with pytest.raises(UserError, match="no label counts"):
        ValidationLoss(model, (ids, np.full_like(ids, -1)))
    with pytest.raises(UserError, match="Labels are ids below 61"):
        ValidationLoss(model, (ids, ids + 60))
