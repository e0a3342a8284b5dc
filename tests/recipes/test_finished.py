"""A finished stage is what its metrics.json says: files that are gone, damaged or changed since."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.runner import locked, run_stage, stage_key
from tf_gptopt.recipes.sections import TokenizerSection

QUIET = Console(quiet=True)


@pytest.fixture
def calls() -> list[Path]:
    return []


@pytest.fixture
def run(calls: list[Path], tmp_path: Path) -> Any:
    """`run(name, source)`: a stage that reads a folder and writes two files."""

    def stage(section: Any, source: Path, out: Path, seed: int, console: Console) -> dict[str, Any]:
        calls.append(out.name)
        for name in ("weights", "words"):
            (out / name).write_bytes(name.encode() * 100)
        return {"loss": 1.25}

    def run(name: str, source: Path | None = None) -> dict[str, Any]:
        inputs = {"source": source or tmp_path / "text"}
        return run_stage(stage, TokenizerSection(), inputs, tmp_path / name, 0, QUIET)

    (tmp_path / "text").mkdir()
    return run


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_finished_stage_runs_once_and_says_what_it_wrote(run, calls, tmp_path):
    first = run("a")
    assert set(first["files"]) == {"weights", "words"}
    (tmp_path / "a" / "notes.txt").write_text("a file of somebody else's is nobody's business")
    assert run("a") == first
    assert calls == ["a"]


def test_damage_is_refused_by_name_also_when_all_later_stages_are_finished(run, calls, tmp_path):
    run("a")
    run("b", tmp_path / "a")
    flip(tmp_path / "a" / "weights")
    for again in (lambda: run("a"), lambda: run("b", tmp_path / "a")):
        with pytest.raises(
            UserError, match=r"a/weights is damaged.*Restore it.*delete .*/a to run"
        ):
            again()
    assert calls == ["a", "b"]


def test_what_is_gone_is_made_again(run, calls, tmp_path):
    first = run("a")
    (tmp_path / "a" / "words").unlink()
    with pytest.raises(UserError, match=r"a/words is missing.*run that stage again"):
        run("b", tmp_path / "a")
    assert run("a")["files"] == first["files"]
    assert calls == ["a", "a"]
    assert run("b", tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[]", "null", "changed"])
def test_damaged_metrics_are_refused_by_name(run, calls, tmp_path, text):
    run("a")
    path = tmp_path / "a" / "metrics.json"
    path.write_text(path.read_text().replace("1.25", "1.75") if text == "changed" else text)
    for again in (lambda: run("a"), lambda: run("b", tmp_path / "a")):
        with pytest.raises(UserError, match=r"a/metrics\.json (has been|is) .*(damaged|not valid)"):
            again()


def test_a_stage_of_an_earlier_version_is_still_finished(run, calls, tmp_path):
    run("a")
    path = tmp_path / "a" / "metrics.json"
    metrics = json.loads(path.read_text())
    key = metrics["key"]
    path.write_text(json.dumps({"key": key, "loss": 2.5}))
    assert run("a")["loss"] == 2.5
    assert stage_key("x", TokenizerSection(), {"source": tmp_path / "a"}, 0)
    path.write_text("{}")  # of nobody
    run("a")
    assert calls == ["a", "a"]


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_the_lock_follows_no_link(tmp_path, kind):
    victim = tmp_path / "victim"
    if kind == "fifo":
        (tmp_path / "out").mkdir()
        os.mkfifo(tmp_path / "out" / ".lock")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".lock").symlink_to(victim)
    if kind == "link":
        victim.write_text("precious")
    with pytest.raises(UserError, match=r"\.lock is a link, or no file"), locked(tmp_path / "out"):
        pass
    if kind == "link":
        assert victim.read_text() == "precious"
    else:
        assert not victim.exists()


def test_a_lock_keeps_others_out_and_the_file_as_it_is(tmp_path):
    (tmp_path / ".lock").write_text("from before")
    with locked(tmp_path):
        with pytest.raises(UserError, match="Another process is working in"), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").read_text() == "from before"
