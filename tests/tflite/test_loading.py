"""What the runtime loads and what it refuses: files, packed weights, without TensorFlow."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        TFLiteGPT(tmp_path / "no.tflite")
    for content in (b"", b"TFL3", b"hello, this is some text", bytes(1000)):
        (tmp_path / "text.tflite").write_bytes(content)
        with pytest.raises(UserError, match=r"not a \.tflite file"):
            TFLiteGPT(tmp_path / "text.tflite")


def test_a_tflite_file_of_another_maker_is_refused(tmp_path):
    from tf_gptopt.tflite.flatbuffer import Model

    model = Model()
    graph = model.graph("f")
    graph.output("y", graph.softmax(graph.input("x", [1, 4])))
    (tmp_path / "model.tflite").write_bytes(model.to_bytes())
    with pytest.raises(UserError, match="not one that tf_gptopt wrote"):
        TFLiteGPT(tmp_path / "model.tflite")


def test_a_newer_format_is_refused(tmp_path, tiny_model, monkeypatch):
    from tf_gptopt.tflite import metadata

    export_tflite(tiny_model(), tmp_path / "new.tflite", QuantConfig("float32"))
    TFLiteGPT(tmp_path / "new.tflite")
    monkeypatch.setattr(metadata, "FORMAT_VERSION", 3)
    with pytest.raises(UserError, match="has format 4"):
        TFLiteGPT(tmp_path / "new.tflite")


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    """A small .tflite file."""
    from tf_gptopt.models.gpt import GPTModel

    path = tmp_path_factory.mktemp("good") / "model.tflite"
    model = GPTModel(61, 24, 2, 3, max_sequence_length=32)
    export_tflite(model, path, prefill_lengths=[8], decode_capacities=[32])
    return path


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.7, 0.99, 0.99999])
def test_a_file_cut_short_is_refused(good_file, tmp_path, share):
    content = good_file.read_bytes()
    (tmp_path / "cut.tflite").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"damaged|cut short"):
        TFLiteGPT(tmp_path / "cut.tflite")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_byte_is_noticed(good_file, tmp_path, data):
    flipped = bytearray(good_file.read_bytes())
    at = data.draw(st.integers(0, len(flipped) - 1))
    flipped[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "flipped.tflite").write_bytes(flipped)
    with pytest.raises(UserError, match=r"damaged|not a \.tflite|not one that|has format"):
        TFLiteGPT(tmp_path / "flipped.tflite")


def test_the_weight_cache_is_filled_once_and_changes_nothing(exported, tmp_path, some_ids):
    _, runtime = exported("int8")
    expected = runtime.logits(some_ids(32))
    cache = tmp_path / "cache"
    for _ in range(2):
        cached = TFLiteGPT(runtime.path, threads=1, weight_cache=cache)
        np.testing.assert_array_equal(cached.logits(some_ids(32)), expected)
        files = [(p.name, p.stat().st_mtime_ns, p.stat().st_ino) for p in cache.iterdir()]
        assert len(files) == 1
    _, other = exported("int8", seed=1)
    cached = TFLiteGPT(other.path, threads=1, weight_cache=cache)
    np.testing.assert_array_equal(cached.logits(some_ids(32)), other.logits(some_ids(32)))
    assert len(list(cache.iterdir())) == 2
    assert files[0] in [(p.name, p.stat().st_mtime_ns, p.stat().st_ino) for p in cache.iterdir()]


def test_a_weight_cache_that_cannot_be_written_is_refused(exported, tmp_path):
    _, runtime = exported("int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        TFLiteGPT(runtime.path, weight_cache=tmp_path / "file")


# What it needs


def test_the_runtime_needs_no_tensorflow_and_says_nothing(speaking, tmp_path):
    import subprocess
    import sys

    code = f"""
import sys
from tf_gptopt.tflite.runtime import TFLiteGPT
gpt = TFLiteGPT({str(speaking.path)!r})
text = "".join(gpt.stream("import os", max_new_tokens=5))
print(gpt.logits([1, 2, 3]).shape)
heavy = {{"tensorflow", "tf_keras", "keras", "torch", "tensorflow_model_optimization"}}
print(sorted(heavy & set(sys.modules)))
"""
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
        timeout=60,
    )
    assert (child.stdout, child.stderr) == ("(3, 300)\n[]\n", "")


def test_the_file_can_be_moved(speaking, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in (speaking.path.name, "tokenizer.json"):
        shutil.copy(speaking.path.parent / name, tmp_path / "elsewhere" / name)
    moved = TFLiteGPT(tmp_path / "elsewhere" / speaking.path.name)
    assert moved.generate("import os", 5) == speaking.generate("import os", 5)
