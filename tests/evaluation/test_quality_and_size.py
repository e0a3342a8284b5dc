"""Measurements against plain arithmetic: nothing in a report may be a number nobody measured."""

import gzip
import math

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.evaluation.quality import Quality, measure_quality, token_logits
from tf_gptopt.evaluation.size import file_bytes


@pytest.fixture(scope="module")
def model():
    from tf_gptopt.models.gpt import GPTModel

    return GPTModel(50, 16, 2, 2, max_sequence_length=12)


@pytest.fixture(scope="module")
def batches():
    ids = np.random.default_rng(0).integers(0, 50, (3, 2, 13)).astype("int32")
    return [(rows[:, :-1], rows[:, 1:]) for rows in ids]


def plain_loss(model, batches):
    losses, top1 = [], []
    for inputs, labels in batches:
        logits = model(inputs).numpy().astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-np.take_along_axis(log_probabilities, labels[..., None], -1))
        top1.append(logits.argmax(-1).ravel())
    return np.mean(losses), np.concatenate(top1)


def test_loss_is_the_mean_cross_entropy(model, batches):
    loss, top1 = plain_loss(model, batches)
    quality = measure_quality(model, batches)
    assert quality.loss == pytest.approx(loss, rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert quality.tokens == 3 * 2 * 12
    np.testing.assert_array_equal(quality.top1, top1)


def test_labels_that_do_not_count_are_left_out(model, batches):
    keep = np.random.default_rng(1).random((3, 2, 12)) < 0.5
    padded = [(x, np.where(k, y, -100)) for (x, y), k in zip(batches, keep, strict=True)]
    quality, whole = measure_quality(model, padded, model), measure_quality(model, batches)
    logits = np.concatenate([model(x).numpy()[k] for (x, _), k in zip(batches, keep, strict=True)])
    labels = np.concatenate([y[k] for (_, y), k in zip(batches, keep, strict=True)])
    log_z = np.log(np.exp(logits).sum(-1))
    want = np.mean(log_z - np.take_along_axis(logits, labels[:, None], 1)[:, 0])
    assert quality.loss == pytest.approx(want, rel=1e-5)
    assert quality.kl == pytest.approx(0, abs=1e-6)
    assert quality.tokens == keep.sum()
    np.testing.assert_array_equal(quality.top1, whole.top1[keep.ravel()])
    with pytest.raises(UserError, match="no label counts"):
        measure_quality(model, [(x, np.full_like(y, -1)) for x, y in batches])


def test_a_tflite_file_is_scored_alike(model, batches, tmp_path):
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.tflite.convert import export_tflite
    from tf_gptopt.tflite.runtime import TFLiteGPT

    export_tflite(model, tmp_path / "m.tflite", QuantConfig("float32"))
    ours = measure_quality(TFLiteGPT(tmp_path / "m.tflite"), batches)
    keras = measure_quality(model, batches)
    assert ours.loss == pytest.approx(keras.loss, abs=1e-4)
    assert ours.agreement(keras) > 0.98


def test_distance_from_a_reference(batches, tmp_path):
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.models.gpt import GPTModel
    from tf_gptopt.tflite.convert import export_tflite
    from tf_gptopt.tflite.runtime import TFLiteGPT

    def log_probabilities(model):
        logits = np.concatenate([model(inputs).numpy() for inputs, _ in batches]).astype("float64")
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    model, other = (GPTModel(50, 16, layers, 2, max_sequence_length=12) for layers in (1, 2))
    for table in (model.base_layer("token_embedding"), other.base_layer("token_embedding")):
        table.set_weights([20 * weights for weights in table.get_weights()])  # they disagree loudly
    p, q = log_probabilities(model), log_probabilities(other)
    expected = np.mean(np.sum(np.exp(p) * (p - q), -1))
    assert expected > 0.1
    assert measure_quality(other, batches, model).kl == pytest.approx(expected, rel=1e-4)
    assert measure_quality(model, batches, model).kl == pytest.approx(0, abs=1e-6)
    known = token_logits(model, batches)
    assert measure_quality(other, batches, known).kl == pytest.approx(expected, rel=1e-4)
    assert measure_quality(other, batches).kl is None
    export_tflite(other, tmp_path / "m.tflite", QuantConfig("float32"))
    file = TFLiteGPT(tmp_path / "m.tflite")
    assert measure_quality(file, batches, model).kl == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UserError, match="nothing to evaluate"):
        measure_quality(model, [], model)


def test_agreement():
    def quality(*top1):
        return Quality(1.0, len(top1), np.array(top1))

    assert quality(1, 2, 3, 4).agreement(quality(1, 2, 0, 0)) == 0.5
    with pytest.raises(UserError, match="same tokens"):
        quality(1, 2).agreement(quality(1, 2, 3))


def test_nothing_to_evaluate(model):
    with pytest.raises(UserError, match="nothing to evaluate"):
        measure_quality(model, [])


def test_sizes(tmp_path):
    data = b"abc" * 100_000 + bytes(range(256)) * 100
    (tmp_path / "x").write_bytes(data)
    size, packed = file_bytes(tmp_path / "x")
    assert size == len(data)
    assert packed == pytest.approx(len(gzip.compress(data, 6)), abs=32)
