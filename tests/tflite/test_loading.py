"""What the runtime loads and what it refuses: files, packed weights, without TensorFlow."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite import weight_cache
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT
from tf_gptopt.tflite.weight_cache import processor


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


def test_a_weight_cache_that_cannot_be_written_is_refused(exported, tmp_path, monkeypatch):
    _, runtime = exported("int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        TFLiteGPT(runtime.path, weight_cache=tmp_path / "file")
    monkeypatch.setattr(weight_cache, "_free_bytes", lambda folder: 2**20)
    with pytest.raises(UserError, match=r"has 1,048,576 bytes free, and packed weights may take"):
        TFLiteGPT(runtime.path, weight_cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


DAMAGE = {
    "a bit": lambda good: good[:3000] + bytes([good[3000] ^ 64]) + good[3001:],
    "a bit at the end": lambda good: good[:-1] + bytes([good[-1] ^ 1]),
    "zeros": lambda good: good[: len(good) // 2].ljust(len(good), b"\0"),
    "cut": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "text": lambda good: b"hello" * 1000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_packed_weights_are_packed_anew(exported, tmp_path, some_ids, damage):
    _, runtime = exported("int8", vocab_size=500)
    expected, cache = runtime.logits(some_ids(32)), tmp_path / "cache"
    TFLiteGPT(runtime.path, threads=1, weight_cache=cache)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    with open(file, "rb") as opened:  # by somebody who has it mapped
        before = opened.read()
        gpt = TFLiteGPT(runtime.path, threads=1, weight_cache=cache)
        opened.seek(0)
        assert opened.read() == before
    np.testing.assert_array_equal(gpt.logits(some_ids(32)), expected)
    assert [p.name for p in cache.iterdir()] == [file.name]
    assert file.read_bytes() == good


def test_each_kind_of_processor_has_packed_weights_of_its_own(exported, tmp_path, monkeypatch):
    _, runtime = exported("int8")
    TFLiteGPT(runtime.path, threads=1, weight_cache=tmp_path / "cache")
    (first,) = (tmp_path / "cache").iterdir()
    before = first.stat().st_mtime_ns, first.stat().st_ino
    monkeypatch.setattr(weight_cache, "processor", lambda: "another1")
    TFLiteGPT(runtime.path, threads=1, weight_cache=tmp_path / "cache")
    names = {p.name for p in (tmp_path / "cache").iterdir()}
    assert len(names) == 2
    assert sum("another1" in name for name in names) == 1
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == before
    assert processor() in first.name


def test_the_processor_is_what_proc_cpuinfo_says_and_does_not_change(monkeypatch):
    def name(text):
        processor.cache_clear()
        monkeypatch.setattr(weight_cache.Path, "read_text", lambda *args: text)
        return processor()

    intel = "processor\t: 0\nmodel name\t: Xeon\ncpu MHz\t\t: 2100.1\nflags\t\t: fpu avx2 avx512f\n"
    names = {
        name(intel),
        name(intel.replace("2100.1", "900.0") + intel.replace("processor\t: 0", "processor\t: 1")),
    }
    assert len(names) == 1
    names |= {
        name(intel.replace(" avx512f", "")),
        name("CPU part\t: 0xd0b\nFeatures\t: fp asimd\n"),
    }
    assert len(names) == 3
    processor.cache_clear()


def test_complete_packed_weights_need_no_folder_that_can_be_written(
    exported, tmp_path, some_ids, monkeypatch
):
    _, runtime = exported("int8")
    cache = tmp_path / "cache"
    TFLiteGPT(runtime.path, threads=1, weight_cache=cache)
    left = cache / ".killed.xnnpack.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as m:  # root may write anywhere
        for name in ("mkstemp", "mkdtemp", "TemporaryFile", "NamedTemporaryFile"):
            m.setattr(tempfile, name, refuse)
        gpt = TFLiteGPT(runtime.path, threads=1, weight_cache=cache)
        np.testing.assert_array_equal(gpt.logits(some_ids(9)), runtime.logits(some_ids(9)))
        assert len(TFLiteGPT(runtime.path, threads=1).generate([1, 2], 3)) == 5
        with pytest.raises(UserError, match="Read-only file system"):
            TFLiteGPT(runtime.path, threads=1, weight_cache=tmp_path / "other")
    assert left.exists()
    _, other = exported("int8", seed=1)
    TFLiteGPT(other.path, threads=1, weight_cache=cache)
    assert not left.exists()
    assert len(list(cache.iterdir())) == 2


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
