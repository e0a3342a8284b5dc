"""What `inspect_tflite` says of a file is what is in it, and what LiteRT does with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.hardware_accelerator import HardwareAccelerator

from tf_gptopt import cli
from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.grids import quantize_matrix
from tf_gptopt.tflite import delegation
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.flatbuffer import Model
from tf_gptopt.tflite.inspecting import inspect_tflite
from tf_gptopt.tflite.reading import read_weights

MATRIX = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)


@pytest.fixture
def file(tmp_path, tiny_model, tiny_tokenizer):
    model = tiny_model(vocab_size=300)
    return export_tflite(model, tmp_path / "model.tflite", tokenizer=tiny_tokenizer)


def write(tmp_path, build, signature="f"):
    """Somebody else's file: one function of `x`, (24,), which XNNPACK takes to begin with."""
    model = Model()
    graph = model.graph(signature)
    build(graph, graph.gelu(graph.reshape(graph.input("x", [24]), [1, 24])))
    path = tmp_path / "foreign.tflite"
    path.write_bytes(model.to_bytes())
    return path


def test_every_byte_is_accounted_for(file):
    found = inspect_tflite(file.path, run=False)
    assert sum(found.sizes.values()) == found.bytes == file.bytes
    width = 24
    assert found.sizes["token table"] == 300 * width
    assert found.sizes["positions"] == 32 * width * 2  # float16
    assert found.sizes["attention matrices"] == 2 * 4 * width**2
    assert found.sizes["MLP matrices"] == 2 * 8 * width**2
    assert found.sizes["norms"] == 2 * width * 4  # the last one; the others are folded
    rows = 2 * (3 + 1 + 4 + 1) * width
    assert found.sizes["biases"] == rows * 4
    # TFLite has a zero point of 8 bytes for every scale; those of equal length are shared
    assert (rows + 300) * 4 < found.sizes["scales"] < (rows + 300) * 12
    assert found.sizes["archive"] > found.files["made.json"] / 4
    assert set(found.files) == {
        "tokenizer.json", "tokenizer_config.json", "config.json", "made.json"
    }  # fmt: skip
    assert all(size > 0 for size in found.sizes.values())


def test_what_a_file_of_ours_says(file, tiny_tokenizer):
    found = inspect_tflite(file.path)
    assert (found.is_ours, found.checksum, found.scheme) == (True, "ok", "int8 dynamic")
    assert found.parameters == file.parameters
    assert found.bytes_per_parameter == file.bytes_per_parameter
    assert found.tokenizer["where"] == "inside"
    assert found.tokenizer["fingerprint"] == tiny_tokenizer.fingerprint
    assert found.made["check"] == file.check.to_dict()
    assert found.twice == ()
    assert tuple(s.name for s in found.signatures) == file.signatures
    by_name = {s.name: s for s in found.signatures}
    assert (by_name["prefill"].tokens, by_name["prefill"].capacity) == (32, 32)
    assert (by_name["decode"].tokens, by_name["decode"].capacity) == (1, 32)
    assert by_name["decode"].operations["FULLY_CONNECTED"] == 2 * 4 + 1
    assert json.loads(json.dumps(found.to_dict()))["bytes"] == file.bytes


OPERATIONS = {
    "ADD": lambda g, x: x + g.model.constant(MATRIX[:1]),
    "MUL": lambda g, x: x * x,
    "MEAN": lambda g, x: g.mean(x),
    "RSQRT": lambda g, x: g.rsqrt(x * x),
    "GELU": lambda g, x: g.gelu(x),
    "SOFTMAX": lambda g, x: g.softmax(x),
    "FULLY_CONNECTED": lambda g, x: g.dense(x, g.model.grid(quantize_matrix(MATRIX), "m")),
    "BATCH_MATMUL": lambda g, x: g.matmul(x, x, transpose_b=True),
    "CAST": lambda g, x: g.cast(g.cast(x, np.int32), np.float32),
    "EMBEDDING_LOOKUP": lambda g, x: g.embedding_lookup(
        g.model.constant(np.zeros(1, np.int32)), g.model.constant(MATRIX)
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_xnnpack_takes_is_what_litert_accelerates(tmp_path, name):
    """LiteRT says of a whole file whether all of it is accelerated: so of each operation alone."""
    path = write(tmp_path, lambda g, x: g.output("y", OPERATIONS[name](g, x)))
    (function,) = inspect_tflite(path).signatures
    model = CompiledModel.from_file(str(path), hardware_accel=HardwareAccelerator.CPU)
    assert (not function.left) == model.is_fully_accelerated()
    assert set(function.left) <= {name}


def test_second_copies_are_found(tmp_path):
    def build(g, x):
        model = g.model
        first, copy = (model.constant(MATRIX + 0, name) for name in ("first", "copy"))
        small = model.grid(quantize_matrix(MATRIX), "small")
        turned = model.constant(np.ascontiguousarray(MATRIX.T), "turned")
        other = model.constant(np.roll(MATRIX, 1, 0), "other")
        y = sum((g.dense(x, m) for m in (copy, small, other)), start=g.dense(x, first))
        g.output("y", g.dense(y, turned))

    # larger than what the writer stores once by itself
    global MATRIX
    before, MATRIX = MATRIX, np.random.default_rng(1).normal(size=(64, 24)).astype(np.float32)
    try:
        found = inspect_tflite(write(tmp_path, build), run=False)
    finally:
        MATRIX = before
    size = 64 * 24
    assert ("first, copy", 4 * size) in found.twice
    assert ("first, small", size) in found.twice
    assert ("first, turned", 4 * size) in found.twice
    assert not any("other" in what for what, _ in found.twice)
    assert sum(found.sizes.values()) == found.bytes


def test_a_file_of_a_converter(tmp_path, capsys):
    import tensorflow as tf

    from tf_gptopt._keras import keras

    model = keras.Sequential([keras.layers.Dense(30, "relu"), keras.layers.Dense(4)])
    model.build((1, 16))
    path = tmp_path / "dense.tflite"
    path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    capsys.readouterr()
    assert cli.main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["is_ours"], found["checksum"], found["parameters"]) == (False, None, None)
    (function,) = found["signatures"]
    assert function["operations"] == {"FULLY_CONNECTED": 2}
    assert function["left"] == {}
    assert sum(found["sizes"].values()) == path.stat().st_size
    assert found["sizes"]["other float32"] >= 4 * (16 * 30 + 30 * 4)
    assert cli.main(["inspect", str(path)]) == 0
    assert "somebody else" in capsys.readouterr().out


def test_the_table_on_the_command_line(file, tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in ("int8 dynamic", "inside; 300 tokens", "token table", "decode", "agreement", "ok"):
        assert part in out
    assert "EMBEDDING_LOOKUP" in out
    assert "stored twice │ nothing" in out
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    (run / "export" / "model.tflite").write_bytes((tmp_path / "model.tflite").read_bytes())
    assert cli.main(["inspect", "--model", str(run)]) == 0  # a run stands for its file
    assert "int8 dynamic" in capsys.readouterr().out
    assert cli.main(["inspect"]) == 2


def test_a_wrong_checksum_is_shown_and_wrong_files_are_errors(file, tmp_path, capsys):
    path = tmp_path / "model.tflite"
    data = bytearray(path.read_bytes())
    table, _ = read_weights(data)["token_embedding/embeddings"]
    data[data.index(table.tobytes()) + 100] ^= 1
    path.write_bytes(data)
    assert inspect_tflite(path, run=False).checksum == "wrong"
    for content in (b"", b"text that is no model", bytes(data[:5000]), data[:4] + b"TFL3" * 9):
        path.write_bytes(content)
        assert cli.main(["inspect", str(path)]) == 2
        assert str(path) in capsys.readouterr().err
    with pytest.raises(UserError, match="does not exist"):
        inspect_tflite(tmp_path / "none.tflite")


def test_a_file_that_litert_cannot_run_is_still_shown(tmp_path, monkeypatch):
    def build(g, x):  # there is no softmax of integers
        g.output("y", g._op("SOFTMAX", [g.cast(x, np.int32)], (1, 24), np.int32, options="Softmax"))

    found = inspect_tflite(write(tmp_path, build))
    assert "LiteRT cannot run it" in found.xnnpack
    assert found.signatures[0].operations == {"RESHAPE": 1, "GELU": 1, "CAST": 1, "SOFTMAX": 1}
    assert found.signatures[0].left is found.signatures[0].taken is None
    monkeypatch.setattr(delegation, "COMMAND", ("-c", "import os; os.abort()"))
    found = inspect_tflite(write(tmp_path, lambda g, x: g.output("y", g.gelu(x))))
    assert found.xnnpack == "LiteRT ended its process with signal 6"


def test_it_takes_no_tensorflow(file, run_child):
    out = run_child(
        f"""
        import sys
        from tf_gptopt.tflite.inspecting import inspect_tflite
        print(inspect_tflite({file.path!r}).signatures[0].left)
        print(sorted({{"tensorflow", "tf_keras", "torch"}} & set(sys.modules)))
        """,
        devices=0,
    )
    assert out.splitlines() == ["{'CAST': 2, 'EMBEDDING_LOOKUP': 2}", "[]"]


def test_blocks_have_scales(tmp_path, tiny_model):
    model = tiny_model(embedding_dim=64, num_heads=4)
    info = export_tflite(model, tmp_path / "m.tflite", QuantConfig("int4"))
    found = inspect_tflite(info.path, run=False)
    assert found.sizes["token table"] == 61 * 64 // 2
    numbers = 61 * 64 + 2 * 12 * 64**2
    assert found.sizes["scales"] >= numbers // 32 * 2  # float16
