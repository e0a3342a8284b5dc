"""Recipes of which a few bytes ask for much: a sentence within a second, in bounded memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.recipes.recipe import Recipe, load_recipe, parse_override, read_scheme


def laughs(levels: int) -> str:
    """Nested aliases that stand for 10 ** levels values."""
    text = "&a0 [l,l,l,l,l,l,l,l,l,l]"
    for i in range(1, levels):
        text = f"&a{i} [{text}{f',*a{i - 1}' * 9}]"
    return text


HOSTILE = {
    "aliases.yaml": f"train: {laughs(9)}\n",
    "aliases in a list.yaml": f"corpus: {{paths: {laughs(9)}}}\n",
    "aliases on top.yaml": f"{laughs(9)}\n",
    "recursive.yaml": "train: &t {model: *t}\n",
    "flow.yaml": "name: " + "[" * 20_000 + "]" * 20_000,
    "block.yaml": "".join(" " * i + "a:\n" for i in range(600)),
    "digits.yaml": "train: {fit: {steps: " + "9" * 5000 + "}}\n",
    "digits.toml": "seed = " + "9" * 5000 + "\n",
    "deep.toml": "a = " + "[" * 20_000 + "]" * 20_000,
    "long.yaml": "name: " + "a" * 2_000_000 + "\n",
    "name.yaml": "name: " + "a" * 300 + "\n",
    "escape.yaml": 'name: "\\e[2Jx"\n',
    "null.yaml": 'name: "a\\0b"\n',
    "itself.yaml": "quantization: &s {folder}/itself.yaml\nqat: {{quantization: *s}}\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_sentence_at_once(tmp_path: Path, name: str) -> None:
    text = HOSTILE[name]
    path = tmp_path / name
    path.write_text(text.format(folder=tmp_path) if "{folder}" in text else text)
    load_recipe("quick")  # what is imported once is not the file's
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert time.process_time() - began < 3  # some took minutes, or all memory
    assert len(str(caught.value)) < 1000


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            load_recipe(str(path))


def test_an_option_is_bounded_too() -> None:
    with pytest.raises(UserError, match="values"):
        parse_override(f"corpus.paths={laughs(9)}")


def test_ordinary_aliases_and_schemes_by_file_still_work(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("train: {fit: &fit {steps: 7}}\nqat: {fit: *fit}\n")
    recipe = load_recipe(str(path))
    assert (recipe.train.fit.steps, recipe.qat.fit.steps) == (7, 7)
    (tmp_path / "a.yaml").write_text("quantization: int4-gptq\n")
    (tmp_path / "b.yaml").write_text(f"quantization: {tmp_path}/a.yaml\n")
    assert read_scheme(str(tmp_path / "b.yaml")) == read_scheme("int4-gptq")
    assert Recipe(name="Größe 1").name == "Größe 1"
