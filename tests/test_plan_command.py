"""`tf-gptopt plan` from outside: its table, its JSON, its haste, and what it says to mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_plan(*words, **env):
    return subprocess.run(
        [sys.executable, "-m", "tf_gptopt", "plan", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "150", **env},
    )


def test_table_reason_and_command():
    done = run_plan("--preset", "gpt2-xl", "--devices", 8, "--memory", "16GB")
    assert done.returncode == 0, done.stderr
    for part in ("data parallel over 8", "mesh 4 x 2", "pipeline of 8", "parameters", "fits?"):
        assert part in done.stdout
    assert "--fit.pipeline 8" in done.stdout
    assert "--model.num_layers 48" in done.stdout


def test_the_documented_example_is_what_it_prints():
    from tf_gptopt.training.memory import Memory
    from tf_gptopt.training.plan import Row
    from tf_gptopt.training.plan_table import cells

    done = run_plan("--preset", "gpt2-xl", "--devices", 8, "--memory", "16GB", "--json")
    page = (Path(__file__).parents[1] / "docs" / "parallelism.md").read_text("utf-8")
    printed = []
    for values in json.loads(done.stdout)["rows"]:
        row = Row(**{**values, "memory": Memory(**values["memory"])})
        printed.append(f"| {' | '.join(cells(row))} |")
    documented = page.partition("<!-- plan")[2].splitlines()[3:]
    assert documented[: len(printed) + 1] == [*printed, ""]


def test_json_and_all_options():
    done = run_plan(
        "--preset=gpt2", "--devices=2", "--memory=24GiB", "--batch-size=16",
        "--sequence-length=512", "--precision=mixed_bfloat16", "--recompute", "--accumulate=2",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["step"] == {
        "batch_size": 16,
        "sequence_length": 512,
        "precision": "mixed_bfloat16",
        "recompute": True,
        "accumulate": 2,
    }
    assert found["recommended"] == "data parallel over 2"
    assert found["rows"][0]["memory"]["gradients"] == 4 * 124_439_808


def test_the_shape_of_a_folder(tmp_path):
    ours = {"format": "tf_gptopt", "gpt": {"vocab_size": 100, "embedding_dim": 24, "num_layers": 3}}
    ours["gpt"] |= {"num_heads": 3, "max_sequence_length": 64}
    theirs = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 24, "n_layer": 3, "n_head": 3}
    theirs |= {"n_positions": 64}
    found = []
    for name, config in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        done = run_plan("--model", tmp_path / name, "--memory", "1GB", "--json")
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert found[0]["step"]["sequence_length"] == 64


def test_it_needs_no_tensorflow():
    words = ("--preset", "gpt2-xl", "--devices", 8, "--memory", "16GB")
    done = run_plan(*words, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "tf_gptopt.training.plan" in done.stderr
    assert "tensorflow" not in done.stderr


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--preset", "gpt2-xl", "--memory", "16 apples"], "Write for example 16GB"),
        (["--preset", "gpt2-xx", "--memory", "16GB"], "Did you mean 'gpt2-xl'?"),
        (["--preset", "gpt2", "--memory", "16GB", "--devices", "0"], "1 or more"),
        (["--preset", "gpt2", "--memory", "16GB", "--batch-size", "0"], "1 or more"),
        (["--preset", "gpt2", "--memory", "16GB", "--precision", "float8"], "Unknown precision"),
        (["--preset", "gpt2", "--memory", "16GB", "--sequence-length", "4096"], "1024 tokens"),
        (["--preset", "gpt2", "--model", "x", "--memory", "16GB"], "Name one model"),
        (["--memory", "16GB"], "Name one model"),
        (["--model", "nowhere", "--memory", "16GB"], "nowhere does not exist"),
        (["--preset", "gpt2"], "memory"),
    ],
)
def test_mistakes(words, remedy):
    done = run_plan(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert remedy in done.stderr.splitlines()[-1]
