"""A file that is not what its model is does not get its name."""

from __future__ import annotations

import dataclasses
import re
import types

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite import attention, convert, weights
from tf_gptopt.tflite.checking import POSITIONS, divergence, logit_distance, sample_ids
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.graph import Graph
from tf_gptopt.tflite.runtime import TFLiteGPT

BUCKETS = {"prefill_lengths": [32, 96], "decode_capacities": [64, 96]}
CHILD = QuantConfig("float32", kv_cache="int8")  # tried in a process of its own


@pytest.fixture
def model(tiny_model):
    return tiny_model(max_sequence_length=96)


@pytest.mark.parametrize(
    ("scheme", "computed", "distance"),
    [
        (QuantConfig("float32"), 1e-5, 1e-5),
        (QuantConfig("float16"), 1e-5, 2e-3),
        (QuantConfig(activations="float"), 1e-5, 0.05),
        (QuantConfig(), 0.05, 0.1),
        (CHILD, 0.02, 0.02),
    ],
)
def test_the_figures_are_those_of_the_runtime(tmp_path, model, scheme, computed, distance):
    before = [w.numpy() for w in model.weights]
    info = export_tflite(model, tmp_path / "m.tflite", scheme, **BUCKETS)
    check = info.check
    assert check.positions == POSITIONS
    assert 0 < check.computed < computed
    assert 0 < check.distance < distance
    assert check.pieces < computed
    ids, _ = sample_ids(model.config)
    logits, wanted = TFLiteGPT(info.path).logits(ids), model(ids[None])[0].numpy()
    assert check.distance == pytest.approx(logit_distance(logits, wanted), rel=1e-3)
    assert check.agreement == np.mean(logits.argmax(-1) == wanted.argmax(-1))
    for now, then in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(now, then)


def _no_future(monkeypatch):
    masks = attention.masks
    monkeypatch.setattr(attention, "masks", lambda *a: dataclasses.replace(masks(*a), future=None))


def _no_past(monkeypatch):
    masks = attention.masks

    def everything_is_seen(g, *rest):
        found = masks(g, *rest)
        none = g.model.constant(np.zeros(1, np.float32))
        return found if found.past is None else dataclasses.replace(found, past=found.past * none)

    monkeypatch.setattr(attention, "masks", everything_is_seen)


def _no_gelu(monkeypatch):
    monkeypatch.setattr(Graph, "gelu", lambda graph, x, **kwargs: x)


@pytest.mark.parametrize("scheme", [QuantConfig("float32"), CHILD, QuantConfig()])
@pytest.mark.parametrize("mutation", [_no_future, _no_past, _no_gelu])
def test_a_wrong_graph_is_refused(tmp_path, tiny_model, monkeypatch, mutation, scheme):
    mutation(monkeypatch)
    with pytest.raises(UserError, match=r"does not compute what it holds: on 72 tokens") as caught:
        export_tflite(tiny_model(max_sequence_length=96), tmp_path / "m.tflite", scheme, **BUCKETS)
    assert "Nothing was written" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_refused(tmp_path, model, tiny_model, monkeypatch):
    from tf_gptopt.models.checkpoints import named_weights

    other = named_weights(tiny_model(seed=1, max_sequence_length=96))
    build = convert.build_tflite
    monkeypatch.setattr(
        convert, "build_tflite", lambda config, _, *a, **k: build(config, other, *a, **k)
    )
    (tmp_path / "m.tflite").write_bytes(b"of yesterday")
    with pytest.raises(
        UserError, match=r"nothing of the model is left in it: .* 1\.\d from the model's"
    ):
        export_tflite(model, tmp_path / "m.tflite", **BUCKETS)
    assert [file.name for file in tmp_path.iterdir()] == ["m.tflite"]
    assert (tmp_path / "m.tflite").read_bytes() == b"of yesterday"


@pytest.mark.parametrize("spoil", [lambda x: x * np.nan, lambda x: np.roll(x, 1, 0)])
def test_what_litert_computes_is_looked_at(tmp_path, model, monkeypatch, spoil):
    """Not a number, or one token's logits in place of another's."""

    def read(*args, genuine=convert.read_logits):
        logits = genuine(*args)
        return logits._replace(at_once=spoil(logits.at_once))

    monkeypatch.setattr(convert, "read_logits", read)
    with pytest.raises(UserError, match="does not compute what it holds"):
        export_tflite(model, tmp_path / "m.tflite", **BUCKETS)
    assert not list(tmp_path.iterdir())


def _noise(logits):
    """4% of the signal, five times what int8 activations make of this model."""
    noise = np.random.default_rng(0).normal(size=logits.shape) * logits.std()
    return logits + 0.04 * noise.astype(np.float32)


def _favourite(logits):
    """One of 2,000 tokens is too likely: hardly any distance, and another text."""
    logits = logits.copy()
    logits[:, 7] += 12
    return logits


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(_noise, r"are 0\.04\d? away .*this model: 0\.0[12]"), (_favourite, "divergence [1-9]")],
)
@pytest.mark.parametrize("scheme", [QuantConfig(), QuantConfig("int4")])
def test_a_small_fault_is_refused(tmp_path, tiny_model, monkeypatch, spoil, says, scheme):
    """What rounding makes of this model is known, so that more is seen."""
    model = tiny_model(vocab_size=2000)
    text = np.random.default_rng(2).integers(0, 2000, (4, 32))
    file = tmp_path / "m.tflite"
    good = export_tflite(model, file, scheme, calibration=text).check
    assert good.computed < 1.3 * good.expected
    assert good.computed_divergence < 1.5 * good.expected_divergence
    name = "try_file" if scheme.weights == "int4" else "read_logits"
    read = getattr(convert, name)

    def spoilt(*args):
        logits = read(*args)
        pieces = spoil(logits.at_once)[logits.rows]
        return logits._replace(at_once=spoil(logits.at_once), pieces=pieces)

    monkeypatch.setattr(convert, name, spoilt)
    before = file.read_bytes()
    with pytest.raises(UserError, match="does not compute what it holds") as caught:
        export_tflite(model, file, scheme, calibration=text)
    assert re.search(says, str(caught.value)), caught.value
    assert file.read_bytes() == before


def test_int4_rows_that_litert_reads_wrongly_are_refused(tmp_path, tiny_model, monkeypatch):
    """As rows of odd width were, in a model that says little of its table."""
    model = tiny_model(embedding_dim=27)
    table = model.get_layer("token_embedding").weights[0]
    table.assign(0.25 * table)
    text = np.random.default_rng(2).integers(0, 61, (1, 32))
    info = export_tflite(model, tmp_path / "m.tflite", QuantConfig("int4"), check=text)
    assert info.check.computed < 0.02
    monkeypatch.setattr(weights, "with_even_rows", lambda grid: grid)
    with pytest.raises(UserError, match=r"does not compute what it holds.* are 0\.[123]"):
        export_tflite(model, tmp_path / "m.tflite", QuantConfig("int4"), check=text)


def test_real_text_is_read_where_there_is_some(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    seen = []
    check = convert.check_logits
    monkeypatch.setattr(convert, "check_logits", lambda *a: seen.append(a[2]) or check(*a))
    model = tiny_model(vocab_size=300, max_sequence_length=96)
    file = tmp_path / "m.tflite"
    assert export_tflite(model, file, tokenizer=tiny_tokenizer).check.text == "prose"
    assert tiny_tokenizer.decode(seen[-1]).startswith("It was late in the year when")
    assert export_tflite(model, file).check.text == "random"
    text = np.random.default_rng(3).integers(0, 300, (2, 50))
    assert export_tflite(model, file, tokenizer=tiny_tokenizer, check=text).check.text == "given"
    assert seen[-1].tolist() == text.reshape(-1)[:POSITIONS].tolist()
    # a tokenizer of something else makes next to nothing of it
    other = types.SimpleNamespace(
        encode=lambda text: [3] * len(text), decode=str, vocab_size=300, eot_id=None
    )
    assert export_tflite(model, file, tokenizer=other).check.text == "random"


def test_the_check_can_be_left_out(tmp_path, model, monkeypatch):
    _no_future(monkeypatch)
    info = export_tflite(model, tmp_path / "m.tflite", check=False, **BUCKETS)
    assert info.check is None
    assert TFLiteGPT(info.path).generate([1], 3)[0] == 1


def test_calibration_text_is_what_is_read(tmp_path, model, monkeypatch):
    seen = []
    check = convert.check_logits
    monkeypatch.setattr(convert, "check_logits", lambda *a: seen.append(a[2].tolist()) or check(*a))
    text = np.random.default_rng(5).integers(0, 61, (4, 96))
    static = QuantConfig(activations="static")
    info = export_tflite(model, tmp_path / "m.tflite", static, calibration=text, **BUCKETS)
    assert seen == [text[0, :POSITIONS].tolist()]
    assert info.check.text == "given"


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_other_policies_are_compared_in_float32(tmp_path, tiny_model, policy):
    from tf_gptopt._keras import keras

    keras.mixed_precision.set_global_policy(policy)
    model = tiny_model(dropout=0.1)
    before = [w.numpy() for w in model.weights]
    info = export_tflite(model, tmp_path / "m.tflite", QuantConfig("float32"))
    assert info.check.computed < 1e-5
    assert info.check.distance < 1e-5
    assert all((now.numpy() == then).all() for now, then in zip(model.weights, before, strict=True))


def test_a_model_that_says_nothing_passes(tmp_path, tiny_model):
    """Equal logits for all tokens: what rounding leaves of them is no signal to compare."""
    model = tiny_model()
    for weight in model.weights:
        weight.assign(np.ones(weight.shape))
    for scheme in (QuantConfig(), QuantConfig("float32")):
        assert export_tflite(model, tmp_path / "m.tflite", scheme).check.agreement == 1


def test_distances():
    logits = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    assert logit_distance(logits, logits) == 0
    assert logit_distance(logits + 3, logits) < 1e-6  # no probability sees it
    assert logit_distance(np.zeros_like(logits), logits) == pytest.approx(1)
    assert logit_distance(-logits, logits) == pytest.approx(2)
    assert np.isnan(logit_distance(logits * np.nan, logits))
    assert divergence(logits + 3, logits) == pytest.approx(0, abs=1e-9)
    assert divergence(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])) == pytest.approx(
        0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    )
