"""A run's folder: named after its text, checked whole before it is touched, nobody else's."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.cli import main
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.recipe import Recipe, load_recipe, packaged_recipes
from tf_gptopt.recipes.run_folder import run_name
from tf_gptopt.recipes.runner import find_stage, require_same_text, run_recipe, run_stage
from tf_gptopt.recipes.sections import (
    CorpusSection,
    DatasetSection,
    EvaluateSection,
    ModelSection,
    TokenizerSection,
    TrainSection,
)
from tf_gptopt.recipes.shapes import check_recipe
from tf_gptopt.training.config import TrainConfig

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts of which somebody mistakes one for the other."""
    folder = tmp_path_factory.mktemp("texts")
    for name, verb in (("fox", "jumps over"), ("dog", "sleeps beside")):
        lines = (f"Line {i}: the quick brown {name} {verb} {i * i} others.\n" for i in range(400))
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def recipe(texts):
    return Recipe(
        corpus=CorpusSection((str(texts / "fox.txt"),)),
        tokenizer=TokenizerSection(300),
        dataset=DatasetSection(16, 0.2),
        train=TrainSection(ModelSection(16, 1, 2), TrainConfig(steps=3, batch_size=2)),
        distill=None,
        prune=None,
        qat=None,
        evaluate=EvaluateSection(tokens=256, speed_tokens=4, tolerance=10.0),
    )


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "done"
    run_recipe(recipe, out, QUIET)
    return out


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_runs_are_named_after_their_text():
    assert run_name("python", [], is_default=True) == "python"  # the recipe names its text itself
    assert run_name("python", ["books/novel.txt"], is_default=True) == "novel"
    assert run_name("quick", ["novel.txt"], is_default=False) == "quick-novel"
    assert run_name("quick", ["a.jsonl.gz", "b", "c"], is_default=False) == "quick-a-and-2-more"
    assert run_name("stories", ["stories.txt"], is_default=False) == "stories"
    assert run_name("python", ["src/"], is_default=True) == "src"
    assert run_name("python", ["x/../书 一.TXT"], is_default=True) == "书-一"
    assert run_name("python", ["notes v1.2.txt"], is_default=True) == "notes-v1.2"
    assert run_name("python", ["example.txt"], is_default=True) == "example-text"  # not the shipped
    assert run_name("python", ["..."], is_default=True) == "text"


def test_the_command_finds_the_folder_by_itself(texts, tmp_path, monkeypatch):
    from tf_gptopt.recipes import runner

    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(runner, "run_recipe", lambda recipe, out, **more: seen.append((out, more)))
    text = str(texts / "fox.txt")
    data = ["--data", text]
    for words in (
        [],
        data,
        ["quick", *data],
        ["--set", f"corpus.paths=[{text}]"],
        [*data, "--out", "mine", "--replace"],
        [*data, "--set", "name=other"],
    ):
        assert main(["run", *words]) == 0
    names = ["python", "fox", "quick-fox", "fox"]
    assert [out for out, _ in seen[:4]] == [Path("saved_models") / name for name in names]
    assert seen[4] == (Path("mine"), {"replace": True})
    assert seen[5] == (Path("saved_models/other-fox"), {"replace": False})


def test_other_text_leaves_a_finished_run_alone(done, recipe, texts, tmp_path):
    before = contents(done)
    other = dataclasses.replace(recipe, corpus=CorpusSection((str(texts / "dog.txt"),)))
    held_out = dataclasses.replace(recipe.corpus, valid=(str(texts / "dog.txt"),))
    for changed in (other, dataclasses.replace(recipe, corpus=held_out)):
        with pytest.raises(UserError, match=r"other text than this \(.*fox.txt.*--out.*--replace"):
            run_recipe(changed, done, QUIET)
    assert contents(done) == before
    stages = tmp_path / "stages"  # made by commands of their own
    shutil.copytree(done, stages)
    (stages / "recipe.json").unlink()
    with pytest.raises(UserError, match="other text than this"):
        run_recipe(other, stages, QUIET)
    shutil.rmtree(stages / "train")  # an unfinished one costs nobody anything
    require_same_text(stages, other.corpus)
    for seed in (1, 0):  # the same text under another seed is no other text
        again = dataclasses.replace(recipe, seed=seed)
        assert run_recipe(again, done, QUIET).recommended == "export"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.model.num_heads": 500}, "train: A head is embedding_dim // num_heads wide"),
        ({"tokenizer.vocab_size": 200}, "vocab_size must be at least 257"),
        ({"dataset.sequence_length": 0}, "sequence_length must be at least 1"),
        ({"dataset.valid_fraction": 1.5}, "valid_fraction"),
        ({"train.fit.sequence_length": 512}, "train: The dataset's sequences hold 256"),
        ({"train.fit.pipeline": 9}, "train: 4 blocks cannot be divided among 9"),
        ({"train.fit.mesh": "model=8"}, "train: .*8 devices, and a block has 6"),
        ({"train.fit.recompute": True, "train.model.dropout": 0.1}, "train: .*dropout=0.1"),
        ({"distill.layers": 5}, "distill: The model has 4 blocks"),
        ({"distill.layers": 0}, "layers must be at least 1"),
        ({"distill.student.embedding_dim": 200}, "distill: The model is 192 wide"),
        ({"distill.student.num_heads": 7}, "distill: Block 0 has 6 of num_heads"),
        ({"distill.student.layers": [0, 4]}, "distill: .*between 0 and 3"),
        ({"distill.teachers": ["nowhere"]}, "distill: nowhere does not exist"),
        ({"draft.layers": 3}, "draft: The model has 2 blocks"),
        ({"qat.quantization.float_layers": ["block_2_*"]}, "qat: .*'block_2_.*matches no layer"),
        ({"export.quantization.layers": {"blok_0_fc": "int8"}}, "export: .*mean 'block_0_fc'"),
        ({"prune.pruning.layers": ["block_2_*"]}, "prune: .*'block_2_.*names no Dense layer"),
        ({"evaluate.tokens": 0}, "tokens must be at least 1"),
        ({"qat.calibration": 0}, "calibration must be at least 1"),
        ({"corpus.paths": ["nowhere.txt"]}, "nowhere.txt does not exist"),
        ({"corpus.valid": ["nowhere.txt"]}, "nowhere.txt does not exist"),
    ],
)
def test_a_recipe_is_checked_whole(values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_recipe(load_recipe(None, values), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_good_recipes_pass():
    for name in packaged_recipes():
        check_recipe(load_recipe(name))
    check_recipe(load_recipe(None, {"distill.student.parameters": 0.5, "distill.rounds": 2}))
    check_recipe(load_recipe(None, {"qat.quantization.float_layers": ["block_1_*"]}))


def test_a_mistaken_value_destroys_no_stage(done):
    """The command of one stage, over a folder that holds its finished work."""
    before = contents(done)
    wide = TrainSection(ModelSection(16, 1, 17), TrainConfig(steps=3, batch_size=2))
    longer = TrainSection(ModelSection(16, 1, 2), TrainConfig(steps=3, sequence_length=32))
    for section in (wide, longer):
        inputs = {"dataset_folder": done / "dataset"}
        with pytest.raises(UserError, match=r"num_heads=17|hold 16 tokens"):
            run_stage(find_stage("train"), section, inputs, done / "train", 0, QUIET)
    with pytest.raises(UserError, match="There is no dataset"):
        run_stage(find_stage("train"), wide, {"dataset_folder": done}, done / "train", 0, QUIET)
    assert contents(done) == before


def test_a_run_is_named_wherever_a_stage_is(done, tmp_path, capsys):
    text, out = str(done), tmp_path / "file"
    assert main(["export", "--model", text, "--out", str(out)]) == 0
    assert f"--model {text} is a run: {done / 'train'}" in capsys.readouterr().out
    small = ["--layers", "1", "--steps", "1", "--batch-size", "2"]
    student = str(tmp_path / "student")
    for model in ("--teacher", "--model"):  # its name, and that of all commands
        assert main(["distill", model, text, "--dataset", text, "--out", student, *small]) == 0
    assert "finished before" in capsys.readouterr().out
    several = [*small, "--teachers", f"[{text}]"]
    words = ["--model", text, "--dataset", text, "--out", str(tmp_path / "taught")]
    assert main(["distill", *words, *several]) == 0
    with pytest.raises(UserError, match="There is no model in"):
        check_recipe(load_recipe(None, {"distill.teachers": [str(done / "dataset")]}))
    for models in (["--model", text, str(out)], [text, str(out)]):
        few = ["--dataset", text, "--tokens", "64"]
        assert main(["evaluate", *models, *few, "--out", str(tmp_path / "report")]) == 0
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["tflite", "tflite"]
    measure = ["--options", "int8", "--tokens", "64"]
    table = str(tmp_path / "table.json")
    for words in ([text, "--data", text], ["--model", text, "--dataset", text]):
        assert main(["sensitivity", *words, *measure, "--out", table]) == 0
    assert main(["plan", "--model", text, "--memory", "1GB"]) == 0
    assert main(["generate", "--model", text, "--prompt", "Line", "--max-new-tokens", "2"]) == 0
    tokens = ["dataset", "--data", text, "--tokenizer", text, "--out", str(tmp_path / "data")]
    assert main(tokens) == 2
    assert "--data takes text" in capsys.readouterr().err


def test_other_text_may_take_the_place(done, recipe, texts):
    other = dataclasses.replace(recipe, corpus=CorpusSection((str(texts / "dog.txt"),)))
    before = (done / "train" / "model.safetensors").read_bytes()
    run_recipe(other, done, QUIET, replace=True)
    assert (done / "train" / "model.safetensors").read_bytes() != before
    run_recipe(other, done, QUIET)  # it is this text's now
