"""A file driven by the plain interpreter, as docs/edge.md shows, says what our runtime says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite.runtime import TFLiteGPT

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "saved_models" / "example" / "model.tflite"


@pytest.fixture(scope="module")
def lines():
    text = (REPOSITORY / "docs" / "edge.md").read_text("utf-8")
    (block,) = re.findall(r"```py\n(.*?)```", text, re.S)  # which needs a file: run here
    assert len([line for line in block.splitlines() if line]) <= 31
    assert "tf_gptopt" not in block
    return block


@pytest.mark.parametrize("scheme", ["example", "float32", "int8 cache"])
def test_the_lines_of_the_docs(
    lines, scheme, exported, tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = EXAMPLE
    if scheme != "example":
        quant = QuantConfig("float32", kv_cache="int8" if scheme == "int8 cache" else "float32")
        _, gpt = exported(quant, vocab_size=300, tokenizer=tiny_tokenizer)
        path = gpt.path
    shutil.copy(path, "model.tflite")
    exec(compile(lines, "docs/edge.md", "exec"), {})
    said = capsys.readouterr().out.removesuffix("\n")
    assert said == TFLiteGPT(path).generate("def main(", 8)
    assert len(said) > len("def main(")


def test_the_example_is_a_whole(tmp_path):
    """One file: what it needs and how it was made are inside, and its report is about it."""
    shutil.copy(EXAMPLE, tmp_path)
    gpt = TFLiteGPT(tmp_path / "model.tflite")
    assert gpt.generate("def __init__(self", 20).startswith("def __init__(self")
    from tf_gptopt.tflite.inspecting import inspect_tflite

    found = inspect_tflite(gpt.path, run=False)
    assert (found.checksum, found.tokenizer["where"]) == ("ok", "inside")
    assert found.made["check"]["text"] == "given"
    assert found.made["check"]["computed"] < 0.02
    report = (EXAMPLE.parent / "report.md").read_text()
    assert f"| {found.bytes / 1e6:.2f} MB |" in report
