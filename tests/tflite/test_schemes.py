"""Every scheme's file holds what training saw, and computes what it should, within bounds."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import RECIPES, QuantConfig
from tf_gptopt.compression.quantization.grids import quantize_matrix
from tf_gptopt.compression.quantization.rounding import round_weights
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.tflite.convert import build_tflite, export_tflite
from tf_gptopt.tflite.imitation import Imitation
from tf_gptopt.tflite.reading import held_weights, read_weights
from tf_gptopt.tflite.runtime import TFLiteGPT
from tf_gptopt.tflite.tensors import Affine
from tf_gptopt.tflite.weights import with_integer_bias

# Two bounds for each scheme, of the root mean square difference of all logits in units of their
# deviation. The first is to the fake-quantized Keras model, whose activations are float: 8 bits of
# a row or range are a relative error of 0.3% to 1% at every product, and such errors add up as
# independent ones do along the residual stream. The second is to numpy that rounds where the file
# rounds: nothing is left but the steps that fall to the other side of a tie, which are few.
# (Weight-only files differ from Keras by the position table alone, which is float16.)
STATIC = {"activations": "static"}
SCHEMES = {
    "int8": (QuantConfig(), 0.05, 0.03),
    "int8 per tensor": (QuantConfig(granularity="tensor"), 0.05, 0.03),
    "int8 global": (QuantConfig(granularity="global"), 0.05, 0.03),
    "int8 smooth": (QuantConfig(smoothing=0.7), 0.05, 0.03),
    "int8 weight-only": (QuantConfig(activations="float"), 1e-3, 1e-5),
    "int8 cache": (QuantConfig(kv_cache="int8"), 0.05, 0.03),
    "int8 weight-only, cache": (QuantConfig(activations="float", kv_cache="int8"), 0.02, 2e-3),
    "int8 static": (QuantConfig(**STATIC), 0.1, 0.04),
    "int8 static, symmetric": (
        QuantConfig(**STATIC, symmetric=True, granularity="tensor"),
        0.1,
        0.04,
    ),
    "int8 static, cache": (QuantConfig(**STATIC, kv_cache="int8"), 0.1, 0.04),
    "int8 static, smooth": (QuantConfig(**STATIC, smoothing=0.5, bias_correction=True), 0.1, 0.04),
    "int8 static, adds": (QuantConfig(**STATIC, quantize_adds=True), 0.15, 0.08),
    "int8 static, io": (QuantConfig(**STATIC, io="int8"), 0.1, 0.04),
    "int8 static, io, adds": (QuantConfig(**STATIC, io="int8", quantize_adds=True), 0.15, 0.08),
    "int4 per 32": (QuantConfig("int4"), 0.05, 0.03),
    "int4 per 64, mse": (QuantConfig("int4", granularity=64, range="mse"), 0.05, 0.03),
    "int4 per channel": (QuantConfig("int4", granularity="channel"), 0.05, 0.03),
    "int4 per tensor": (QuantConfig("int4", granularity="tensor"), 0.05, 0.03),
    "int4 weight-only": (QuantConfig("int4", activations="float"), 1e-3, 1e-5),
    "int4 static": (QuantConfig("int4", **STATIC), 0.1, 0.04),
    "mixed": (
        QuantConfig("int4", layers={"*_qkv": "int8", "*_out": "int4:channel", "*_fc": "float16"}),
        0.05,
        0.03,
    ),
    "one block float": (QuantConfig(float_layers=("block_0_*", "token_*")), 0.05, 0.03),
    "float16": (QuantConfig("float16"), 2e-3, 2e-3),
    "float32": (QuantConfig("float32"), 1e-5, 1e-5),
}
SHAPES = {
    "blocks divide": {"embedding_dim": 64, "num_heads": 4},
    "own head, pruned": {"tie_embeddings": False},
    "structured": {"num_heads": (1, 3), "intermediate_dim": (7, 40), "head_dim": 8},
}
# of a row of int4, an odd number of weights ends in the middle of a byte
ODD_SHAPES = {
    "odd": {"embedding_dim": 27},
    "odd, own head": {"embedding_dim": 33, "intermediate_dim": 21, "tie_embeddings": False},
}
INT4 = [name for name in SCHEMES if "int4" in name or name == "mixed"]
CASES = [(scheme, shape) for shape in SHAPES for scheme in SCHEMES]
CASES += [(scheme, shape) for shape in ODD_SHAPES for scheme in INT4]
BUCKETS = {"prefill_lengths": [8, 16], "decode_capacities": [16]}
IDS = np.random.default_rng(0).integers(0, 61, (6, 32))


@functools.cache
def _model(shape):
    """A Keras model whose weights are exchanged for each scheme, and what they were at first."""
    from tf_gptopt.models.checkpoints import named_weights
    from tf_gptopt.models.gpt import GPTModel

    sizes = {"embedding_dim": 24, "num_heads": 3, **(SHAPES | ODD_SHAPES)[shape]}
    model = GPTModel(61, num_layers=2, max_sequence_length=32, **sizes)
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.2, w.shape) for name, w in named_weights(model).items()}
    for name, values in weights.items():
        values += "gamma" in name
        if "pruned" in shape and name.endswith("kernel"):
            values *= rng.random(values.shape) < 0.5
    return model, fold_layer_norms(weights)


def _quantize(config, shape):
    """A fake-quantized Keras model, valid until the next one of this shape."""
    from tf_gptopt.compression.quantization.ptq import quantize
    from tf_gptopt.models.checkpoints import assign_weights

    model, weights = _model(shape)
    assign_weights(model, weights)
    if config.smoothing or config.bias_correction:
        return quantize(model, config, IDS)
    weights = round_weights(weights, config)
    assign_weights(model, weights)
    recorded = Imitation(model.config, weights, config)
    for ids in IDS:
        recorded.logits(ids)
    model.activation_ranges = recorded.seen
    return model


@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_every_scheme_on_every_shape(tmp_path, relative_error, scheme, shape):
    from tf_gptopt.models.checkpoints import named_weights

    config, most, most_imitated = SCHEMES[scheme]
    model = _quantize(config, shape)
    weights = named_weights(model)
    data, _ = build_tflite(model.config, weights, config, ranges=model.activation_ranges, **BUCKETS)
    _check_stored(data, weights, config)
    path = tmp_path / "model.tflite"
    path.write_bytes(data)
    runtime = TFLiteGPT(path, threads=1)
    ids = IDS[0]
    whole = runtime.logits(ids)
    assert relative_error(whole, model(ids[None])[0].numpy()) < most
    held = held_weights(read_weights(data), {name: w.shape for name, w in weights.items()})
    imitation = Imitation(model.config, held, config, model.activation_ranges)
    assert relative_error(whole, imitation.logits(ids)) < most_imitated
    runtime.prefill(ids[:3])
    decoded = np.array([runtime.decode(token) for token in ids[3:]])  # across a cache of 16 rows
    assert relative_error(decoded, whole[3:]) < most_imitated


def _check_stored(data, weights, config):
    """Every matrix of the model is in the file, in its type, to the last bit, and once."""
    stored = read_weights(data)
    types = {"int8": np.int8, "int4": np.int8, "float16": np.float16, "float32": np.float32}
    for name in [n for n in weights if n.endswith(("kernel", "token_embedding/embeddings"))]:
        layer = name.partition("/")[0]
        rows = weights[name].T if name.endswith("kernel") else weights[name]
        values, scales = stored[name]
        assert values.dtype == types[config.weights_of(layer)]
        if values.dtype == np.float16:  # quantization-aware training leaves these as they are
            rows = rows.astype(np.float16)
        meant = _meant(values, scales)[:, : rows.shape[1]]  # the table may have a column more
        np.testing.assert_array_equal(meant, rows, name)
    table = stored["token_embedding/embeddings"][0]
    bits = {"int8": 8, "int4": 4, "float16": 16, "float32": 32}
    size = -(-table.size * bits[config.weights_of("token_embedding")] // 8)
    root = schema.Model.GetRootAsModel(data, 0)
    sizes = [root.Buffers(i).DataLength() for i in range(root.BuffersLength())]
    head = stored.get("token_logits/kernel", (None,))[0]
    assert sizes.count(size) == (2 if head is not None and head.shape == table.shape else 1)


def _meant(values, scales):
    if scales is None:
        return values.astype(np.float32)
    blocks = 1 if scales.ndim == 1 else scales.shape[1]
    rows = len(values) if scales.size > 1 else 1
    grouped = values.reshape(rows, blocks, -1).astype(np.float32)
    return (grouped * scales.reshape(rows, blocks, 1)).reshape(values.shape)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_export(tmp_path, tiny_model, relative_error, name):
    config, _ = RECIPES[name]
    model = tiny_model()
    if config.needs_calibration:
        with pytest.raises(UserError, match="Hand calibration= over"):
            export_tflite(model, tmp_path / "model.tflite", config)
        assert not list(tmp_path.iterdir())
    info = export_tflite(model, tmp_path / "model.tflite", config, calibration=IDS, **BUCKETS)
    assert info.scheme == config.name
    runtime = TFLiteGPT(info.path)
    assert runtime.metadata["quantization"] == config.for_model(model.config).to_dict()
    most = 0.6 if "int4" in name else 0.1
    assert relative_error(runtime.logits(IDS[0]), model(IDS[:1])[0].numpy()) < most


def test_a_large_cache_is_int8_in_training_and_in_the_file(tmp_path):
    from tf_gptopt.compression.quantization.aware_state import final_config
    from tf_gptopt.compression.quantization.qat import quantize_aware
    from tf_gptopt.models.gpt import GPTModel

    model = GPTModel(61, 256, 1, 4, max_sequence_length=4096)  # 8 MiB in float32
    assert final_config(quantize_aware(model)).kv_cache == "int8"
    info = export_tflite(model, tmp_path / "model.tflite")
    assert info.scheme == "int8 dynamic int8 cache"
    assert TFLiteGPT(info.path).metadata["cache"]["dtype"] == "int8"
    info = export_tflite(model, tmp_path / "model.tflite", QuantConfig(kv_cache="float32"))
    assert info.scheme == "int8 dynamic"
    assert TFLiteGPT(info.path).metadata["cache"]["dtype"] == "float32"


@pytest.mark.parametrize("scheme", ["int8", "int8 static", "int4 per 32", "mixed"])
def test_what_training_saw_is_what_the_file_holds(tmp_path, tiny_model, relative_error, scheme):
    from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
    from tf_gptopt.models.checkpoints import named_weights

    config, most, _ = SCHEMES[scheme]
    calibration = IDS if config.needs_calibration else None
    aware = quantize_aware(tiny_model(), config, calibration=calibration)
    aware.compile("sgd", "mse", run_eagerly=True)
    aware.train_on_batch(IDS, np.zeros([6, 32, 61]))
    info = export_tflite(aware, tmp_path / "model.tflite", config, **BUCKETS)
    data = (tmp_path / "model.tflite").read_bytes()
    _check_stored(data, named_weights(strip_quantization(aware)), config)
    logits = TFLiteGPT(info.path).logits(IDS[0])
    assert relative_error(logits, aware(IDS[:1], training=False)[0].numpy()) < most


def test_ranges_that_are_missing_are_named(tmp_path, tiny_model):
    model = tiny_model()
    model.activation_ranges = {"block_0_qkv/input": (-1.0, 1.0)}
    with pytest.raises(UserError, match="'block_0_qkv/output'"):
        export_tflite(model, tmp_path / "model.tflite", QuantConfig(**STATIC))
    assert not list(tmp_path.iterdir())


def test_integer_io_needs_integer_layers(tmp_path, tiny_model):
    config = QuantConfig(**STATIC, io="int8", float_layers=("block_1_qkv",))
    with pytest.raises(UserError, match="'block_1_qkv'"):
        export_tflite(tiny_model(), tmp_path / "m.tflite", config, calibration=IDS)


@pytest.mark.parametrize("group", ["channel", "tensor"])
def test_a_bias_keeps_its_value_beside_weights_of_any_size(group):
    before, after = Affine(0.05, 3), Affine(0.1, -4)
    rows = np.random.default_rng(0).normal(0, 0.2, (4, 16)).astype(np.float32)
    bias = np.array([0.123, -3.0, 5.0, 0.4], np.float32)
    if group == "channel":
        rows[1] = 0  # pruned away: its scale says nothing
        rows[2] *= 1e-9  # with its own scale the bias would be 10**11 units
    grid, integers = with_integer_bias(quantize_matrix(rows, group=group), bias, before, after)
    assert integers.dtype == np.int32
    np.testing.assert_allclose(
        integers * grid.scales[:, 0] * before.scale, bias, atol=after.scale / 100
    )
    changed = np.abs(grid.values() - quantize_matrix(rows, group=group).values()).max(1)
    assert (changed[[0, 1, 3]] == 0).all()
    assert changed[2] * 16 * 255 * before.scale < after.scale / 10  # in the output, at most


def test_a_kernel_of_zeros_keeps_its_bias():
    grid = quantize_matrix(np.zeros((3, 8), np.float32), group="tensor")
    bias = np.array([1.0, -2.0, 0.5], np.float32)
    grid, integers = with_integer_bias(grid, bias, Affine(1e-4), Affine(0.02))
    np.testing.assert_allclose(integers * grid.scales[0, 0] * 1e-4, bias, atol=1e-4)
