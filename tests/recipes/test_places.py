"""What people type: folders of runs, prompts from anywhere, one name for one argument."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.cli import main
from tf_gptopt.recipes import generate_command as command
from tf_gptopt.recipes.places import dataset_place, model_place, speaking_place, tokenizer_place
from tf_gptopt.recipes.recipe import load_recipe, parse_override


@pytest.fixture
def run(tmp_path):
    """A run that was interrupted after its third model."""
    for stage in ("tokenizer", "dataset", "train", "distill", "prune"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "metrics.json").write_text("{}")
    (tmp_path / "run" / "qat").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    return tmp_path / "run"


def test_a_run_stands_for_what_is_wanted_of_it(run, tmp_path):
    assert model_place(run) == speaking_place(run) == run / "prune"
    (run / "qat" / "metrics.json").write_text("{}")
    assert model_place(run) == run / "qat"
    (run / "export").mkdir()
    (run / "export" / "model.tflite").write_bytes(b"x")
    assert speaking_place(run) == run / "export" / "model.tflite"
    assert model_place(run) == run / "qat"
    assert dataset_place(run) == run / "dataset"
    assert tokenizer_place(run) == run / "tokenizer"
    for place in (model_place, speaking_place, dataset_place, tokenizer_place):
        assert place(run / "train") == run / "train"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match="no finished model yet"):
        model_place(empty)
    with pytest.raises(UserError, match="does not exist"):
        dataset_place(tmp_path / "absent")


@pytest.fixture
def asked(monkeypatch):
    """What `generate` asks a model for, instead of doing it."""
    seen = {}

    def stream_completion(path, prompt, **options):
        seen.update(options, path=path, prompt=prompt)
        return iter(["..."])

    monkeypatch.setattr(command.speak, "stream_completion", stream_completion)
    return seen


@pytest.mark.parametrize(
    ("words", "model", "prompt"),
    [
        (["def main("], None, "def main("),
        (["some/model", "def main("], "some/model", "def main("),
        (["--model", "some/model", "def main("], "some/model", "def main("),
        (["some/model", "--prompt", "def main("], "some/model", "def main("),
        (["--prompt", "x.tflite"], None, "x.tflite"),
        (["--prompt", "p", "--model", "m"], "m", "p"),
    ],
)
def test_model_and_prompt_with_their_names_and_without(asked, words, model, prompt):
    assert main(["generate", *words]) == 0
    assert asked["prompt"] == prompt
    assert asked["path"] == (Path(model) if model else command.speak.example_model())


def test_a_model_alone_is_no_prompt(asked, tmp_path, capsys):
    for word in (str(tmp_path), "nowhere/model.tflite"):
        assert main(["generate", word]) == 2
        said = capsys.readouterr().err
        assert f"Give a prompt as well: tf-gptopt generate {word} " in said
        assert f"--prompt {word}" in said
    assert main(["generate", "a", "b", "c"]) == 2
    assert "Put quotes around the prompt" in capsys.readouterr().err
    assert not asked


def on_stdin(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))


@pytest.mark.parametrize(
    ("raw", "prompt"),
    [
        (b"def main(\n", "def main("),
        (b"Es war\r\n", "Es war"),
        ("zwei\nZeilen für\n\n".encode(), "zwei\nZeilen für\n"),
        (b"no end", "no end"),
    ],
)
def test_a_prompt_from_standard_input(asked, monkeypatch, raw, prompt):
    for words in (["-"], ["some/model", "-"], ["--prompt", "-"]):
        on_stdin(monkeypatch, raw)
        assert main(["generate", *words]) == 0
        assert asked["prompt"] == prompt


@pytest.mark.parametrize(
    ("raw", "message"), [(b"", "no prompt"), (b"\n", "no prompt"), (b"a\xff", "0xff at offset 1")]
)
def test_a_bad_prompt_on_standard_input(asked, monkeypatch, raw, message, capsys):
    on_stdin(monkeypatch, raw)
    assert main(["generate", "-"]) == 2
    assert message in capsys.readouterr().err


def test_stop_strings_as_a_shell_hands_them_over(asked):
    words = [r"\n", r"\t.", r"a\\n", "plain", r"\d", "\n"]
    assert main(["generate", "--prompt", "x", "--stop", *words]) == 0
    assert asked["stop"] == ["\n", "\t.", r"a\n", "plain", r"\d", "\n"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("evaluate.prompt=ROMEO:", "ROMEO:"),
        ("evaluate.prompt=[x", "[x"),
        ("evaluate.prompt=12", "12"),
        ("evaluate.prompt=null", None),  # text of the validation split
        ("name=null", "null"),
        ("evaluate.prompt=a # b: c", "a # b: c"),
        ("evaluate.prompt='Once '", "Once "),
        ('evaluate.prompt="a\\nb"', "a\nb"),
        ("name = spaced ", "spaced"),
        ("name=2024", "2024"),
        ("train.fit.mesh=null", None),
        ("train.fit.mesh=batch=2,model=2", "batch=2,model=2"),
        ("export.quantization.granularity=64", 64),
        ("corpus.paths=[a.txt, b]", ["a.txt", "b"]),
        ("prune=null", None),
        ("train.fit.steps=7", 7),
    ],
)
def test_a_value_is_text_where_the_recipe_holds_text(text, value):
    key, parsed = parse_override(text)
    assert parsed == value
    assert type(parsed) is type(value)
    if key == "evaluate.prompt":
        assert load_recipe(None, {key: parsed}).evaluate.prompt == value


def test_words_of_an_option_are_joined_either_way():
    from tf_gptopt._options import spelt_out
    from tf_gptopt.recipes.sections import QatSection

    given = "--quantization.kv-cache int8 --fit.batch-size=4 --learned-ranges --out a-b.c-d"
    want = "--quantization.kv_cache int8 --fit.batch_size=4 --learned_ranges true --out a-b.c-d"
    assert spelt_out(given.split(), QatSection) == want.split()
