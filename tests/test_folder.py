"""Files of one save change together, wherever it is killed; every writer of several sees to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import killed_at_each_step

from tf_gptopt._errors import UserError
from tf_gptopt._files import atomic_path, write_bytes
from tf_gptopt._folder import SAVED, changing, settled
from tf_gptopt._tokenizer import Tokenizer

Save = Callable[[Path, int], Any]  # version 0 or 1 of something into a folder
THEIRS = "notes.txt"  # a file that is not ours


@pytest.fixture
def two_tokenizers(tiny_tokenizer: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """A byte-level BPE, and one that has neither vocab.json nor merges.txt."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    words = Backend(models.WordLevel({"<|endoftext|>": 0, "a": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return tiny_tokenizer, Tokenizer(words.to_str())


def _plain(folder: Path, version: int) -> None:
    with changing(folder, ["a", "b"]) as new:
        (new / "a").write_text(f"a{version}")
        if version == 0:
            (new / "b").write_text("b0")
        (new / "deep").mkdir()
        (new / "deep" / "c").write_text(f"c{version}")


@pytest.fixture(params=["plain", "tokenizer", "model", "dataset", "report"])
def save(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Save:
    if request.param == "plain":
        return _plain
    if request.param == "report":
        monkeypatch.setattr("tf_gptopt.evaluation.report.markdown", lambda report, title: title)
        return _save_report
    tokenizers = request.getfixturevalue("two_tokenizers")
    if request.param == "tokenizer":
        return lambda folder, version: tokenizers[version].save(folder)
    if request.param == "dataset":
        from tf_gptopt.data.corpus import Document
        from tf_gptopt.data.packing import write_dataset

        texts = [[Document(f"{i}", f"{i} said {v}. " * 20) for i in range(9)] for v in (0, 1)]
        return lambda folder, version: write_dataset(texts[version], tokenizers[0], folder, 16)
    from tf_gptopt.models import checkpoints

    build = request.getfixturevalue("tiny_model")
    models = [build(seed, vocab_size=300, dropout=0.1 * seed) for seed in (0, 1)]
    weights = {id(model): checkpoints.named_weights(model) for model in models}
    monkeypatch.setattr(checkpoints, "named_weights", lambda model: weights[id(model)])
    return lambda folder, version: checkpoints.save_model(
        models[version], folder, tokenizer=tokenizers[version]
    )


def _save_report(folder: Path, version: int) -> None:
    from tf_gptopt.evaluation import report

    made = report.Report((), version, None, f"report {version}")
    report.write_report(made, folder, f"version {version}")


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in it, hidden files and folders too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_killed_anywhere_the_folder_is_the_old_one_or_the_new_one(
    save: Save, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    save(old, 0)
    save(new, 1)
    for folder in (old, new):
        (folder / THEIRS).write_text("theirs")
    expected = [contents(old), contents(new)]
    assert not any(name.startswith(".") for name in (*expected[0], *expected[1]))
    seen, between = set(), 0
    every = 1 if "plain" in request.node.name else 3
    for step in killed_at_each_step(lambda: save(tmp_path / "folder", 1), every):
        folder = tmp_path / "folder"
        if step > 1:  # the first began without a folder, and left none or nothing
            between += (folder / SAVED).is_dir()
            settled(folder)
            names = {name: data for name, data in contents(folder).items() if name[0] != "."}
            assert names in expected, f"killed before step {step}"
            seen.add(expected.index(names))
            save(folder, 1)
            assert contents(folder) == expected[1]  # and what was left is gone
            shutil.rmtree(folder)
        shutil.copytree(old, folder, dirs_exist_ok=True)
    assert seen == {0, 1}
    assert between > 1  # also amid the moving


def test_a_reader_finishes_a_save_that_was_killed(
    tmp_path: Path, two_tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    """Whoever loads the folder, whatever it holds, sees all of the new version."""
    first, second = two_tokenizers
    loaded = set()
    for _ in killed_at_each_step(lambda: second.save(tmp_path / "t"), every=2):
        if (tmp_path / "t" / SAVED).is_dir():
            loaded.add(Tokenizer.load(tmp_path / "t").fingerprint)
            assert not (tmp_path / "t" / "vocab.json").exists()  # it was the other tokenizer's
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        first.save(tmp_path / "t")
    assert loaded == {second.fingerprint}


def test_a_save_that_cannot_be_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / SAVED).mkdir()
    (tmp_path / SAVED / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match=r"cut short after its last byte.*by hand"):
        Tokenizer.load(tmp_path)
    assert (tmp_path / SAVED / "tokenizer.json").exists()


def test_an_error_in_the_block_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    _plain(tmp_path, 0)
    before = contents(tmp_path)

    def fail() -> None:
        with changing(tmp_path) as new:
            (new / "a").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert contents(tmp_path) == before
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError):  # said before anything has changed
        _plain(tmp_path, 1)
    assert (tmp_path / "deep" / "c").read_text() == "c0"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "deep"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a").symlink_to("victim")
    _plain(tmp_path, 1)
    assert (tmp_path / "a").read_text() == "a1"
    assert (tmp_path / "victim").read_text() == "precious"


def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    left = []
    for _ in killed_at_each_step(lambda: write_bytes(path, b"new")):
        left.append(sum(name.endswith(".tmp") for name in os.listdir(tmp_path)))
    assert max(left) == 1  # a next write took it away
    with atomic_path(path) as temporary:
        write_bytes(path, b"newer")  # another write at the same time
        assert temporary.exists()
    assert os.listdir(tmp_path) == ["x.json"]
