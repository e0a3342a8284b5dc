"""A .tflite file carries tokenizer, config and how it was made, under one checksum."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import zipfile

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt._tokenizer import Tokenizer
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite.bundle import append_files, read_files
from tf_gptopt.tflite.convert import build_tflite, export_tflite
from tf_gptopt.tflite.metadata import read_metadata, seal_file
from tf_gptopt.tflite.runtime import TFLiteGPT

NAMES = ["tokenizer.json", "tokenizer_config.json", "config.json", "made.json"]
BUCKETS = {"prefill_lengths": [8], "decode_capacities": [32]}


@pytest.fixture
def bundle(tmp_path, tiny_model, tiny_tokenizer):
    """A file alone in its folder."""
    model = tiny_model(vocab_size=300)
    export_tflite(model, tmp_path / "out" / "m.tflite", tokenizer=tiny_tokenizer, **BUCKETS)
    alone = tmp_path / "alone" / "m.tflite"
    alone.parent.mkdir()
    shutil.copy(tmp_path / "out" / "m.tflite", alone)
    return alone


def test_a_file_alone_speaks(bundle, tiny_tokenizer):
    given = TFLiteGPT(bundle, tokenizer=tiny_tokenizer).generate("def test", 20)
    gpt = TFLiteGPT(bundle)
    assert gpt.generate("def test", 20) == given
    assert gpt.tokenizer.fingerprint == tiny_tokenizer.fingerprint
    assert gpt.tokenizer.eot_token == "<|endoftext|>"


def test_the_weight_cache_does_not_mind_the_archive(bundle, tmp_path):
    texts = [
        TFLiteGPT(bundle, weight_cache=folder).generate([5], 20)
        for folder in (None, tmp_path / "packed", tmp_path / "packed")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(list((tmp_path / "packed").iterdir())) == 1


def test_any_zip_tool_reads_it(bundle, tiny_model):
    with zipfile.ZipFile(bundle) as archive:
        assert archive.namelist() == NAMES
        assert archive.testzip() is None
    if shutil.which("unzip"):
        shown = subprocess.run(["unzip", "-l", bundle], capture_output=True, text=True)
        assert shown.returncode == 0
        assert "made.json" in shown.stdout
        assert not shown.stderr
    files = read_files(bundle)
    model = tiny_model(vocab_size=300)
    assert json.loads(files["config.json"]) == model.config.to_dict()
    made = json.loads(files["made.json"])
    assert set(made["versions"]) == {"tf_gptopt", "tensorflow", "tf_keras", "ai-edge-litert"}
    assert made["date"].endswith("+00:00")
    assert made["quantization"] == QuantConfig().for_model(model.config).to_dict()
    assert made["parameters"] == model.count_params()
    assert 0.9 * model.count_params() < made["nonzero"] < model.count_params()
    assert 0 < made["check"]["computed"] < made["check"]["allowed"]


def test_only_the_date_differs(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    model, path = tiny_model(vocab_size=300), tmp_path / "m.tflite"
    contents = []
    for seconds in (0, 0, 10**9):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(seconds))
        export_tflite(model, path, tokenizer=tiny_tokenizer, **BUCKETS)
        contents.append((path.read_bytes(), read_files(path)))
    assert contents[0] == contents[1]
    first, later = contents[0][1], contents[2][1]
    assert json.loads(later["made.json"])["date"] == "2001-09-09T01:46:40+00:00"
    assert [name for name in NAMES if first[name] != later[name]] == ["made.json"]


def test_the_tokenizer_inside_comes_before_the_one_beside(bundle, tiny_tokenizer):
    other = json.loads(read_files(bundle)["tokenizer.json"])
    other["model"]["vocab"] = {k: 299 - v for k, v in other["model"]["vocab"].items()}
    wrong = Tokenizer(json.dumps(other))
    wrong.save(bundle.parent)
    assert TFLiteGPT(bundle).tokenizer.fingerprint == tiny_tokenizer.fingerprint
    with pytest.raises(UserError, match="is not the one"):
        TFLiteGPT(bundle, tokenizer=wrong)


def test_a_tokenizer_inside_that_does_not_fit_is_refused(bundle, tiny_tokenizer):
    files = read_files(bundle)
    other = json.loads(files["tokenizer.json"])
    other["model"]["merges"] = other["model"]["merges"][:-1]
    append_files(bundle, {**files, "tokenizer.json": json.dumps(other).encode()})
    seal_file(bundle)
    with pytest.raises(UserError, match="is not the one"):
        TFLiteGPT(bundle).generate("text")


def test_files_without_an_archive_are_read_as_before(tmp_path, tiny_model, tiny_tokenizer):
    from tf_gptopt.models.checkpoints import named_weights

    model = tiny_model(vocab_size=300)
    data, _ = build_tflite(model.config, named_weights(model), QuantConfig(), tiny_tokenizer)
    (tmp_path / "m.tflite").write_bytes(data)
    gpt = TFLiteGPT(tmp_path / "m.tflite")
    assert read_files(gpt.path) == {}
    with pytest.raises(UserError, match=r"no tokenizer in .* and no tokenizer\.json beside"):
        gpt.generate("text")
    tiny_tokenizer.save(tmp_path)
    assert gpt.generate("text", 3).startswith("text")


def test_weights_that_look_like_the_end_of_an_archive_are_none(tmp_path, tiny_model):
    from tf_gptopt.models.checkpoints import named_weights

    model = tiny_model(vocab_size=300)
    data, _ = build_tflite(model.config, named_weights(model), QuantConfig("float32"))
    looks = b"PK\5\6" + bytes(18)  # as zipfile takes it for one
    (tmp_path / "m.tflite").write_bytes(data + looks + bytes(400))
    assert zipfile.is_zipfile(tmp_path / "m.tflite")
    assert read_files(tmp_path / "m.tflite") == {}


@pytest.mark.parametrize("inside", [True, False])
def test_the_tokenizer_is_the_one_that_was_there_on_loading(
    tmp_path, tiny_model, tiny_tokenizer, inside
):
    """The file and its folder are replaced, and then deleted, before text first comes in."""
    model, path = tiny_model(vocab_size=300), tmp_path / "there" / "m.tflite"
    info = export_tflite(model, path, tokenizer=tiny_tokenizer)
    if not inside:
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"PK\x03\x04")])
        seal_file(path)
    expected = TFLiteGPT(path).generate("some text", 5)
    first, second = (TFLiteGPT(path) for _ in range(2))
    changed = json.loads((path.parent / "tokenizer.json").read_text())
    changed["model"]["vocab"] = {k: 299 - v for k, v in changed["model"]["vocab"].items()}
    export_tflite(
        tiny_model(seed=1, vocab_size=300), path, tokenizer=Tokenizer(json.dumps(changed))
    )
    assert first.generate("some text", 5) == expected
    shutil.rmtree(path.parent)
    assert second.generate("some text", 5) == expected
    assert info.path == str(path)


def test_text_needs_no_folder_to_write_to(bundle, tiny_tokenizer, monkeypatch):
    expected = TFLiteGPT(bundle).generate("some text", 5)

    def refuse(*args, **options):
        raise OSError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    gpt = TFLiteGPT(bundle)
    assert gpt.generate("some text", 5) == expected
    assert gpt.tokenizer.eot_id == tiny_tokenizer.eot_id == 0


def test_a_flipped_byte_anywhere_is_noticed(bundle):
    data = bundle.read_bytes()
    start = data.index(b"PK\x03\x04")
    rng = np.random.default_rng(0)
    places = [*rng.integers(16, start, 20), *rng.integers(start, len(data), 60), len(data) - 1]
    assert start > len(data) // 2
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.integers(8)
        bundle.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|not one that"):
            read_metadata(bundle)
    for length in (start, start + 100, len(data) - 1):
        bundle.write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged"):
            read_metadata(bundle)
    bundle.write_bytes(data)
    read_metadata(bundle)


def test_a_damaged_archive_is_an_error_without_the_checksum_too(bundle):
    data = bytearray(bundle.read_bytes())
    data[data.index(b"PK\x03\x04") + 200] ^= 255
    bundle.write_bytes(data)
    with pytest.raises(UserError, match=r"archive inside .* is damaged"):
        TFLiteGPT(bundle, verify=False).generate("text")


def test_it_takes_no_tensorflow(bundle, run_child):
    out = run_child(
        f"""
        import sys
        from tf_gptopt.tflite.runtime import TFLiteGPT
        print(TFLiteGPT({str(bundle)!r}).tokenizer.vocab_size)
        print(sorted({{"tensorflow", "tf_keras", "torch"}} & set(sys.modules)))
        """,
        devices=0,
    )
    assert out.splitlines() == ["300", "[]"]
