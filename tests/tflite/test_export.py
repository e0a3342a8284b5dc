"""The file computes what Keras computes, holds the weights it should, and nothing twice."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.grids import quantize_matrix
from tf_gptopt.models.checkpoints import weight_shapes
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.tflite.convert import build_tflite, export_tflite
from tf_gptopt.tflite.delegation import operations
from tf_gptopt.tflite.inspecting import inspect_tflite
from tf_gptopt.tflite.reading import count_weights, read_weights
from tf_gptopt.tflite.runtime import TFLiteGPT
from tf_gptopt.tflite.signatures import plan_buckets

SHAPES = {
    "plain": {},
    "own head": {"tie_embeddings": False},
    "blocks differ": {"num_heads": (1, 3), "intermediate_dim": (7, 40), "head_dim": 8},
    "wide heads": {"num_heads": 2, "head_dim": 20},
    "one of everything": {
        "vocab_size": 3,
        "embedding_dim": 1,
        "num_layers": 1,
        "num_heads": 1,
        "intermediate_dim": 1,
        "max_sequence_length": 2,
    },
    "long": {"max_sequence_length": 300},
}

# What an int8 file may differ from the float model, as a share of the logits' deviation. Weights
# are off by up to half of 1/127 of their row's largest, activations by half of 1/255 of their row's
# range. For normal numbers each is a relative error of about 0.6% of a product, and errors of the
# products along the residual stream add up as independent ones do: 2% to 3% after two blocks.
INT8_ERROR = 0.05


def ids_for(model, seed=0):
    config = model.config
    return np.random.default_rng(seed).integers(0, config.vocab_size, config.max_sequence_length)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logits_are_those_of_keras(exported, shape):
    model, runtime = exported("float32", **SHAPES[shape])
    ids = ids_for(model)
    np.testing.assert_allclose(runtime.logits(ids), model(ids[None])[0], atol=1e-4)


@pytest.mark.parametrize("shape", ["plain", "own head", "blocks differ", "long"])
@pytest.mark.parametrize(("scheme", "most"), [("float16", 0.005), ("int8", INT8_ERROR)])
def test_compressed_logits_are_near_those_of_keras(exported, relative_error, scheme, most, shape):
    model, runtime = exported(scheme, **SHAPES[shape])
    ids = ids_for(model)
    assert relative_error(runtime.logits(ids), model(ids[None])[0].numpy()) < most


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape_exports(exported, relative_error, data):
    small = st.integers(1, 17)
    layers = data.draw(st.integers(1, 3))
    model, runtime = exported(
        data.draw(st.sampled_from(["float32", "int8"])),
        vocab_size=data.draw(st.integers(2, 80)),
        embedding_dim=data.draw(st.integers(4, 40)),
        num_layers=layers,
        num_heads=tuple(data.draw(st.lists(st.integers(1, 4), min_size=layers, max_size=layers))),
        intermediate_dim=tuple(data.draw(st.lists(small, min_size=layers, max_size=layers))),
        head_dim=data.draw(small),
        max_sequence_length=data.draw(st.integers(1, 150)),
        tie_embeddings=data.draw(st.booleans()),
    )
    ids = ids_for(model)
    whole = runtime.logits(ids)
    is_float = runtime.metadata["quantization"]["weights"] == "float32"
    assert relative_error(whole, model(ids[None])[0].numpy()) < (1e-4 if is_float else 0.2)
    pieces = np.array([runtime.prefill(ids[:1]), *map(runtime.decode, ids[1:])])
    # sums of another order may fall to the other side of where an int8 activation is rounded
    np.testing.assert_allclose(pieces, whole, atol=1e-3 if is_float else 0.1)


def test_weights_are_quantized_after_folding(exported):
    model, runtime = exported("int8")
    stored = read_weights(runtime.path.read_bytes())
    folded = fold_layer_norms({w.name.removesuffix(":0"): w.numpy() for w in model.weights})
    for name, array in folded.items():
        if not name.endswith("/kernel"):
            continue
        values, scales = stored[name]
        grid = quantize_matrix(array.T)
        np.testing.assert_array_equal(values, grid.integers)
        np.testing.assert_array_equal(scales, grid.scales[:, 0])


def test_zeros_of_pruning_stay_zeros(exported, tiny_model):
    model = tiny_model()
    kernel = model.base_layer("block_1_fc").kernel
    mask = np.random.default_rng(0).random(kernel.shape) < 0.5
    kernel.assign(np.where(mask, kernel, 0.0))
    for scheme in ("int8", "float16", "float32"):
        _, runtime = exported(scheme, model=model)
        values, _ = read_weights(runtime.path.read_bytes())["block_1_fc/kernel"]
        assert not values[~mask.T].any()
        assert np.count_nonzero(values) > 0.95 * mask.sum()


@pytest.mark.filterwarnings("ignore:.*sparse")
def test_a_pruned_model_is_stripped(exported, tiny_model):
    from tf_gptopt.compression.pruning.config import PruneConfig
    from tf_gptopt.compression.pruning.pruner import prune, strip_pruning

    pruned = prune(tiny_model(), PruneConfig())
    _, runtime = exported("float32", model=pruned)
    ids = ids_for(pruned)
    np.testing.assert_allclose(runtime.logits(ids), strip_pruning(pruned)(ids[None])[0], atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "float16", "float32"])
def test_each_weight_is_stored_once(exported, scheme):
    model, runtime = exported(scheme, vocab_size=500, num_layers=2)
    data = runtime.path.read_bytes()
    root = schema.Model.GetRootAsModel(data, 0)
    sizes = [root.Buffers(i).DataLength() for i in range(root.BuffersLength())]
    bytes_each = {"int8": 1, "float16": 2, "float32": 4}[scheme]
    assert sizes.count(500 * 24 * bytes_each) == 1  # the tied token table
    arrays = [root.Buffers(i).DataAsNumpy() for i in range(root.BuffersLength())]
    big = [a.tobytes() for a in arrays if not isinstance(a, int) and a.size > 300]
    assert len(big) == len(set(big))
    folded_away = 2 * 2 * 2 * 24  # gamma and beta of two blocks' two LayerNorms
    assert count_weights(data)[0] == model.count_params() - folded_away


def test_a_signature_costs_little(tmp_path, tiny_model):
    few, many = (
        export_tflite(
            tiny_model(vocab_size=500),
            tmp_path / "model.tflite",
            prefill_lengths=[32],
            decode_capacities=capacities,
        )
        for capacities in ([32], [8, 16, 24, 32])
    )
    added = len(many.signatures) - len(few.signatures)
    assert (many.bytes - few.bytes) / added < 3_000 * 2  # per block


def test_float_layers_stay_float(exported, tmp_path, tiny_model, relative_error):
    model = tiny_model()
    path = tmp_path / "model.tflite"
    export_tflite(model, path, QuantConfig("int8", float_layers=("block_0_*", "token_embedding")))
    stored = read_weights(path.read_bytes())
    assert stored["block_0_qkv/kernel"][0].dtype == np.float32
    assert stored["token_embedding/embeddings"][0].dtype == np.float32
    assert stored["block_1_qkv/kernel"][0].dtype == np.int8
    ids = ids_for(model)
    error = relative_error(TFLiteGPT(path).logits(ids), model(ids[None])[0].numpy())
    assert error < INT8_ERROR


@pytest.mark.parametrize(
    "scheme",
    [
        QuantConfig(),
        QuantConfig("int4", kv_cache="int8"),
        QuantConfig("int4", activations="static", quantize_adds=True, io="int8"),
    ],
)
def test_xnnpack_takes_all_but_look_ups_and_positions(exported, scheme):
    """What it leaves stands before the first product, so the rest is one partition."""
    calibration = ids_for(exported()[0])[None] if scheme.needs_calibration else None
    _, runtime = exported(scheme, calibration=calibration)
    found = inspect_tflite(runtime.path)
    assert found.xnnpack is None
    decode = next(s for s in found.signatures if s.name == "decode")
    half = {"CAST": 1} if scheme.weights == "int8" else {}  # the position table is float16
    assert decode.left == {"EMBEDDING_LOOKUP": 2, **half}
    assert decode.taken > 60
    for signature in found.signatures:
        assert set(signature.left) <= {"EMBEDDING_LOOKUP", "CAST", "ADD", "MINIMUM"}
        assert sum(signature.left.values()) <= 8
    root = schema.Model.GetRootAsModel(runtime.path.read_bytes(), 0)
    graphs = [root.Subgraphs(i) for i in range(root.SubgraphsLength())]
    names = [
        name for name, _, _ in operations(root, next(g for g in graphs if g.Name() == b"decode"))
    ]
    outside = [i for i, name in enumerate(names) if name in decode.left]
    assert max(outside) < names.index("FULLY_CONNECTED")


def test_the_whole_export_needs_no_tensorflow(run_child, tmp_path):
    out = run_child(
        """
        import sys
        import numpy as np
        from tf_gptopt.compression.quantization.config import QuantConfig
        from tf_gptopt.models.config import GPTConfig
        from tf_gptopt.tflite.convert import build_tflite
        shapes = {
            "token_embedding/embeddings": (9, 4), "position_embedding/embeddings": (8, 4),
            "block_0_attention_norm/gamma": (4,), "block_0_attention_norm/beta": (4,),
            "block_0_qkv/kernel": (4, 12), "block_0_qkv/bias": (12,),
            "block_0_proj/kernel": (4, 4), "block_0_proj/bias": (4,),
            "block_0_mlp_norm/gamma": (4,), "block_0_mlp_norm/beta": (4,),
            "block_0_fc/kernel": (4, 16), "block_0_fc/bias": (16,),
            "block_0_out/kernel": (16, 4), "block_0_out/bias": (4,),
            "final_norm/gamma": (4,), "final_norm/beta": (4,),
        }
        weights = {name: np.ones(shape, "float32") for name, shape in shapes.items()}
        config = GPTConfig(9, 4, 1, 2, max_sequence_length=8)
        data, info = build_tflite(config, weights, QuantConfig("int8"))
        print(len(data), info.signatures[-1], "tensorflow" in sys.modules)
        """,
        devices=0,
    )
    assert out.split()[1:] == ["logits", "False"]


def test_info_says_what_was_written(exported, tmp_path, tiny_model):
    info = export_tflite(tiny_model(), tmp_path / "new" / "model.tflite")
    assert info.scheme == "int8 dynamic"
    assert info.bytes == (tmp_path / "new" / "model.tflite").stat().st_size
    assert info.parameters == tiny_model().count_params()
    assert info.bytes_per_parameter == info.bytes / info.parameters
    assert info.signatures == ("prefill", "decode", "logits")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.tflite"]


def test_the_same_model_gives_the_same_bytes(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # the date is in the file
    for name in ("a", "b"):
        export_tflite(tiny_model(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Mistakes


def test_a_model_that_diverged_is_refused(tmp_path, tiny_model):
    model = tiny_model()
    kernel = model.base_layer("block_0_fc").kernel
    kernel.assign(np.where(np.arange(kernel.shape[1]) == 3, np.nan, kernel))
    with pytest.raises(UserError, match="'block_0_fc/kernel' holds NaN"):
        export_tflite(model, tmp_path / "model.tflite")
    assert not (tmp_path / "model.tflite").exists()


def test_weights_beyond_float16_are_refused(tmp_path, tiny_model):
    model = tiny_model()
    model.base_layer("block_0_fc").kernel.assign_add(1e6 * np.ones((24, 96)))
    with pytest.raises(UserError, match="beyond float16"):
        export_tflite(model, tmp_path / "model.tflite", QuantConfig("float16"))
    export_tflite(model, tmp_path / "model.tflite", QuantConfig("int8"))


def test_float_layers_that_are_not_there_are_refused(tmp_path, tiny_model):
    with pytest.raises(UserError, match="Did you mean 'block_0_qkv'"):
        export_tflite(
            tiny_model(), tmp_path / "m.tflite", QuantConfig("int8", float_layers=("block_0_qvk",))
        )


def test_other_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="must be a tf_keras model"):
        export_tflite("model", tmp_path / "model.tflite")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    with pytest.raises(UserError, match="knows 300 tokens and the model 61"):
        export_tflite(tiny_model(), tmp_path / "model.tflite", tokenizer=tiny_tokenizer)


def test_a_file_beyond_two_gigabytes_is_refused():
    from tf_gptopt.tflite.convert import _check_size

    weights = {"token_embedding/embeddings": np.broadcast_to(np.float32(1), 1_557_611_200)}
    _check_size(QuantConfig("int8"), weights)  # as large as gpt2-xl
    with pytest.raises(UserError, match=r"5\.8 GiB"):
        _check_size(QuantConfig("float32"), weights)


# Buckets


def test_buckets_of_gpt2():
    assert [(b.signature, b.tokens) for b in plan_buckets(1024)] == [
        ("prefill", 256),
        ("decode", 1),
    ]
    assert all(bucket.free and bucket.capacity == 1024 for bucket in plan_buckets(1024))
    names = [bucket.signature for bucket in plan_buckets(1024, fixed=True)]
    assert names[:5] == [f"prefill_{n}" for n in (16, 32, 64, 128, 256)]
    assert "prefill_32_512" in names
    assert names[-1] == "decode"
    decode = [bucket.capacity for bucket in plan_buckets(1024, fixed=True) if bucket.is_decode]
    assert decode == [64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024]


@given(st.integers(1, 5000), st.booleans())
def test_buckets_serve_every_position(context, fixed):
    buckets = plan_buckets(context, fixed=fixed)
    assert len({bucket.signature for bucket in buckets}) == len(buckets)
    assert all(bucket.tokens <= context and bucket.capacity <= context for bucket in buckets)
    assert any(bucket.is_decode and bucket.capacity == context for bucket in buckets)
    assert any(bucket.is_prefill and bucket.capacity == context for bucket in buckets)
    assert any(bucket.is_prefill and bucket.free | (not bucket.capacity) for bucket in buckets)


def test_large_caches_come_in_groups_of_heads(tmp_path):
    """Each capacity by the signature that reads it in as many parts as are worth it."""
    config = GPTConfig(64, 48, 2, 6, head_dim=64, max_sequence_length=2000)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in weight_shapes(config).items()
    }
    data, info = build_tflite(config, weights, QuantConfig("float32"))
    assert info.signatures == ("prefill", "decode_1344", "decode", "logits")
    (tmp_path / "m.tflite").write_bytes(data)
    runtime = TFLiteGPT(tmp_path / "m.tflite", threads=1)
    ids = rng.integers(0, 64, 2000)
    whole = runtime.logits(ids)
    for start in (20, 1300, 1980):  # around each change, up to the last token
        runtime.reset()
        runtime.prefill(ids[:start])
        for position in range(start, min(start + 60, 2000)):
            logits = runtime.decode(ids[position])
            np.testing.assert_allclose(logits, whole[position], atol=1e-3)


@pytest.mark.parametrize("wrong", [[0], [33], ["8"], []])
def test_impossible_lengths_are_refused(tmp_path, tiny_model, wrong):
    with pytest.raises(UserError, match="integers from 1 to the model's context, 32"):
        export_tflite(tiny_model(), tmp_path / "model.tflite", prefill_lengths=wrong)
