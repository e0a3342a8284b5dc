"""A recipe with a draft leaves draft.tflite beside the file, and the report says what it brings."""

from __future__ import annotations

import json
from pathlib import Path

from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.recipe import load_recipe
from tf_gptopt.recipes.runner import run_recipe

RECIPE = """
name: drafted
tokenizer: {vocab_size: 400}
dataset: {sequence_length: 32, valid_fraction: 0.2}
train:
  model: {embedding_dim: 32, num_layers: 2, num_heads: 2}
  fit: {steps: 4, batch_size: 4}
distill: null
prune: null
qat: null
draft: {fit: {steps: 4, batch_size: 4}}
evaluate: {tokens: 256, speed_tokens: 10, tolerance: 10.0, prompt: "def "}
"""


def test_a_draft_is_made_and_measured(tmp_path, capsys):
    from tf_gptopt.tflite.runtime import TFLiteGPT

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    sources = sorted(Path(__file__).parent.glob("*.py"))
    recipe = load_recipe(tmp_path / "recipe.yaml", {"corpus.paths": [str(p) for p in sources]})
    report = run_recipe(recipe, tmp_path / "run", Console())
    export = tmp_path / "run" / "export"
    model, draft = (TFLiteGPT(export / f"{name}.tflite") for name in ("model", "draft"))
    assert (model.config.num_layers, draft.config.num_layers) == (2, 1)
    plain = model.generate("def ", 20)
    model.reset()
    assert model.generate("def ", 20, draft=export / "draft.tflite") == plain
    assert model.draft_stats.tokens == 19
    found = report.speculative
    assert (found.name, found.draft) == ("export", "draft.tflite")
    assert found.tokens_per_call >= 1
    assert min(found.plain, found.speculative, found.ratio) > 0
    assert found.in_words() in (tmp_path / "run" / "report.md").read_text()
    stored = json.loads((tmp_path / "run" / "report.json").read_text())
    assert type(report).from_dict(stored) == report
    capsys.readouterr()
    run_recipe(recipe, tmp_path / "run", Console())
    assert "draft  a student that guesses ahead · finished before" in capsys.readouterr().out
