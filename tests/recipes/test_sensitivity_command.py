"""`tf-gptopt sensitivity`: from texts or a dataset to a table, a plot and a scheme for a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt._options import Options
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.data.corpus import Document
from tf_gptopt.data.packing import write_dataset
from tf_gptopt.evaluation.sensitivity_table import Sensitivity
from tf_gptopt.models.checkpoints import save_model
from tf_gptopt.recipes.recipe import load_recipe, read_scheme
from tf_gptopt.recipes.sensitivity_command import sensitivity_command

TEXT = Path(__file__).read_text("utf-8")


@pytest.fixture
def folder(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model(vocab_size=300, embedding_dim=32, num_layers=1, num_heads=4)
    model.tokenizer = tiny_tokenizer
    save_model(model, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(folder, *words):
    options = Options("sensitivity", "which layers")
    return sensitivity_command(options, [str(folder / "model"), *map(str, words)])


def test_from_a_text_to_a_scheme(folder, capsys):
    files = {name: folder / name for name in ("t.json", "p.svg", "mixed.yaml")}
    assert not run(
        folder, "--data", folder / "text.txt", "--tokens", 256, "--out", files["t.json"],
        "--options", "int8", "int4", "prune 50%", "--plot", files["p.svg"],
        "--bytes", "1.5", "--scheme", files["mixed.yaml"],
    )  # fmt: skip
    table = Sensitivity.load(files["t.json"])
    assert table.tokens == 256
    assert len(table.rows) == 5 + 5 + 4
    assert table.quantization == QuantConfig.from_recipe("int4")
    output = capsys.readouterr().out
    assert all(row.layer in output for row in table.rows)
    assert "uniform int4: " in output
    assert files["mixed.yaml"].read_text() in output
    scheme = read_scheme(str(files["mixed.yaml"]))
    assert scheme == QuantConfig.from_sensitivity(table, bytes=1.5)
    (folder / "recipe.yaml").write_text(f"export: {{quantization: {files['mixed.yaml']}}}")
    assert load_recipe(folder / "recipe.yaml").export.quantization == scheme
    assert "<svg" in files["p.svg"].read_text()


def test_from_a_dataset_with_calibration(folder, tiny_tokenizer, capsys):
    documents = [Document(str(i), TEXT[i::4]) for i in range(4)]
    write_dataset(documents, tiny_tokenizer, folder / "data", 24, valid_fraction=0.3)
    assert not run(
        folder, "--data", folder / "data", "--tokens", 100, "--options", "prune50",
        "--score", "wanda", "--loss", 10,
    )  # fmt: skip
    output = capsys.readouterr().out
    assert "96 held-out tokens" in output  # whole windows of the dataset's length
    assert "weights: float16" in output  # nothing else was measured


def test_calibration_is_what_follows_in_the_text(folder, capsys):
    words = ("--data", folder / "text.txt", "--options", "prune50", "--score", "wanda")
    assert not run(folder, *words, "--tokens", 128)
    with pytest.raises(UserError, match="too short"):
        run(folder, *words, "--tokens", 10**6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bytes", "1.0", "--loss", "0.1"], "one budget"),
        (["--bytes", "much"], "such as 1.0"),
        (["--scheme", "x.yaml"], "needs a budget"),
        (["--options", "int7"], "Did you mean 'int8'"),
        (["--quantization", "int4-gtpq"], "Did you mean 'int4-gptq'"),
        (["--score", "wandaa"], "Did you mean 'wanda'"),
        (["--bytes", "7"], "bytes at least"),
    ],
)
def test_mistakes(folder, words, message):
    with pytest.raises(UserError, match=message):
        run(folder, "--data", folder / "text.txt", "--tokens", "64", *words)


def test_texts_that_cannot_be_read(folder):
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        run(folder, "--data", folder / "nowhere.txt")
    (folder / "short.txt").write_text("too short")
    with pytest.raises(UserError, match="too short"):
        run(folder, "--data", folder / "short.txt")
