"""The main job end to end on a tiny corpus: real training, real files, real kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STAGES = ["tokenizer", "dataset", "train", "distill", "prune", "qat", "export", "evaluate"]
RECIPE = """
name: tiny
tokenizer: {vocab_size: 400}
dataset: {sequence_length: 32, valid_fraction: 0.2}
train:
  model: {embedding_dim: 32, num_layers: 2, num_heads: 2, dropout: 0.1}
  fit: {steps: 30, batch_size: 4, checkpoint_every: 0.2}
distill: {layers: 1, fit: {steps: 12, batch_size: 4, checkpoint_every: 0.2}}
prune:
  pruning: {end_step: 8, frequency: 2}
  fit: {steps: 12, batch_size: 4, checkpoint_every: 0.2}
qat: {fit: {steps: 8, batch_size: 4, checkpoint_every: 0.2}}
evaluate: {tokens: 512, speed_tokens: 10, tolerance: 10.0, prompt: "def "}
"""


def start(out, corpus, recipe, *more):
    command = [sys.executable, "-m", "tf_gptopt", "run", recipe, "--data", corpus, "--out", out]
    return subprocess.Popen(
        [*map(str, command), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": "0"},  # the date that a file names changes its size
    )


def finish(child):
    output, _ = child.communicate(timeout=500)
    assert child.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A recipe and a corpus: the project's own sources, some sixty documents."""
    folder = tmp_path_factory.mktemp("inputs")
    recipe, corpus = folder / "tiny.yaml", folder / "corpus"
    recipe.write_text(RECIPE)
    corpus.mkdir()
    import tf_gptopt

    for i, path in enumerate(sorted(Path(tf_gptopt.__file__).parent.rglob("*.py"))):
        (corpus / f"{i:03}.py").write_text(path.read_text("utf-8"), "utf-8")
    return recipe, corpus


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    recipe, corpus = inputs
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return out, finish(start(out, corpus, recipe))


def numbers(out):
    """What must not depend on interruptions: everything but speeds, times and places."""
    report = json.loads((out / "report.json").read_text())
    rows = [{k: v for k, v in row.items() if k != "speed"} for row in report["rows"]]
    losses = [
        json.loads((out / stage / "metrics.json").read_text())["loss"]
        for stage in ("train", "distill", "prune", "qat")
    ]
    return rows, losses


def weights(out):
    return {stage: (out / stage / "model.safetensors").read_bytes() for stage in STAGES[2:6]}


def test_a_run_leaves_everything_it_promises(undisturbed):
    out, output = undisturbed
    for stage in STAGES:
        assert (out / stage / "metrics.json").is_file(), stage
        assert not (out / stage / "checkpoints").exists()
    for stage in STAGES[2:6]:
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (out / stage / name).is_file(), (stage, name)
    for name in ("model.tflite", "config.json", "tokenizer.json"):
        assert (out / "export" / name).is_file()
    assert (out / "report.json").is_file()
    assert "| **export** |" in (out / "report.md").read_text()
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert "tokens/s" in output
    assert "left" in output
    assert "completes 'def '" in output


def test_the_report_tells_what_the_stages_did(undisturbed):
    out, _ = undisturbed
    report = json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["train", "distill", "prune", "qat", "export"]
    sizes = {name: row["size"] for name, row in rows.items()}
    assert sizes["distill"]["parameters"] < sizes["train"]["parameters"]
    pruned = sizes["distill"]["nonzero"] - sizes["prune"]["nonzero"]
    kernels = 12 * 32 * 32  # one block: qkv, proj, fc, out
    assert pruned == pytest.approx(0.5 * kernels, rel=0.01)
    assert sizes["qat"]["nonzero"] <= sizes["prune"]["nonzero"] + 32 * 7  # folded norms are ones
    assert sizes["export"]["bytes"] < sizes["qat"]["bytes"]
    assert rows["export"]["loss"] == pytest.approx(rows["qat"]["loss"], abs=0.02)
    assert rows["export"]["agreement"] > 0.5
    assert report["recommended"] == "export"
    assert all(row["speed"]["decode"] > 0 for row in report["rows"])


def test_the_page_tells_of_the_text_the_stages_and_what_the_file_says(undisturbed):
    out, output = undisturbed
    page = (out / "report.md").read_text()
    data = json.loads((out / "dataset" / "metrics.json").read_text())
    tokens = data["train"]["tokens"]
    assert f"{tokens:,} tokens to train on" in page
    assert f"The vocabulary has {data['vocab_size']} entries" in page
    passes = 30 * 4 * 32 / tokens
    assert f"| 30 | 3,840 | {passes:.2f} |" in page
    assert "~~~text\ndef \n~~~\n\nsays" in page
    said = page.partition("says\n\n~~~text\n")[2].partition("\n~~~")[0]
    assert "def " + said in output
    assert f"the file to ship: {out / 'export' / 'model.tflite'}" in output
    steps = [line.split(",")[0] for line in (out / "train" / "losses.csv").read_text().splitlines()]
    assert steps == ["step", "10", "20", "30"]


def test_a_finished_run_is_not_run_again(undisturbed, inputs):
    out, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name == "metrics.json"}
    output = finish(start(out, inputs[1], inputs[0]))
    assert output.count("finished before") == len(STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name == "metrics.json"}


def test_killed_anywhere_it_ends_with_the_same_numbers(undisturbed, inputs, tmp_path):
    """SIGKILL at random moments, until one start gets through."""
    expected, _ = undisturbed
    out = tmp_path / "run"
    rng = random.Random(os.environ.get("KILL_SEED", "1"))
    kills = 0
    while kills < 4:
        child = start(out, inputs[1], inputs[0])
        # wait for output (TensorFlow takes its time), then let a random while of work pass
        for line in child.stdout:
            if "train" in line and "finished" not in line:
                break
        time.sleep(rng.uniform(0.5, 15))
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kills += 1
        for path in out.rglob("*.json"):  # no half-written file carries a final name
            json.loads(path.read_text())
    finish(start(out, inputs[1], inputs[0]))
    assert kills
    assert numbers(out) == numbers(expected)
    assert weights(out) == weights(expected)


def test_a_changed_recipe_runs_only_what_changed(undisturbed, inputs):
    out, _ = undisturbed
    trained = (out / "train" / "metrics.json").read_bytes()
    more = ("--set", "prune.pruning.sparsity=0.7", "--set", "train.fit.log_every=3")
    output = finish(start(out, inputs[1], inputs[0], *more))  # the second changes no result
    assert output.count("finished before") == 4  # tokenizer, dataset, train, distill
    assert (out / "train" / "metrics.json").read_bytes() == trained
    rows = json.loads((out / "report.json").read_text())["rows"]
    pruned = rows[1]["size"]["nonzero"] - rows[2]["size"]["nonzero"]
    assert pruned == pytest.approx(0.7 * 12 * 32 * 32, rel=0.01)


def test_two_runs_in_one_folder(tmp_path):
    from tf_gptopt._errors import UserError
    from tf_gptopt.recipes.runner import locked

    with locked(tmp_path), pytest.raises(UserError, match="Another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
