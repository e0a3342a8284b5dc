"""Real worker processes train as one process does, and agree on everything that they have to.

The losses of 1, 2 and 3 workers are compared with a relative tolerance of 1e-4: sums in another
order change float32 gradients by about 1e-6 of themselves, and Adam, which divides by their own
size, passes on the sign of those that are almost zero. Among the workers of one run nothing is
tolerated: every byte is the same.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tf_gptopt.data.corpus import Document
from tf_gptopt.data.packing import write_dataset
from tf_gptopt.training.launch import worker_environments

REPOSITORY = Path(__file__).resolve().parents[2]

# Trains what its arguments name, and prints one line of JSON
CODE = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
import numpy as np
import tensorflow as tf
from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
from tf_gptopt.compression.pruning.pruner import prune, strip_pruning
from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.runner import run_stage
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.strategy import choose_strategy
from tf_gptopt.training.checks import check_same
from tf_gptopt.training.trainer import fit
from tf_gptopt.training.workers import together, workers_of

folder, kinds, out = sys.argv[1], sys.argv[2].split(","), Path(sys.argv[3])
strategy, why = choose_strategy("auto")
workers = workers_of(strategy)
data = TokenDataset.load(folder)
told = {"why": why, "index": workers.index, "count": workers.count}

def sha(model):
    return hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights())).hexdigest()

def train(kind, checkpoints=None, extra=()):
    keras.utils.set_random_seed(1)
    callbacks, strip = [], lambda model: model
    settings = {"learning_rate": 1e-2, "log_every": 2, "clip_norm": None}
    with strategy.scope():
        model, teacher = (GPTModel(300, 16, 1, 2, max_sequence_length=16) for _ in range(2))
        if kind == "prune":
            model = prune(model, PruneConfig(sparsity=0.5, end_step=4, frequency=2, min_weights=1))
            callbacks, strip = pruning_callbacks(model), strip_pruning
        if kind == "qat":
            model, strip = quantize_aware(model), strip_quantization
        if kind == "distill":
            model = Distiller(student=model, teacher=teacher)
            strip = lambda distiller: distiller.student
    if kind in ("train", "accumulate"):
        settings["clip_norm"] = 0.1
    if kind == "accumulate":
        settings["accumulate"] = 3
    losses = []
    report = lambda progress: losses.append(progress.loss)
    fit(model, data, TrainConfig(6, 12, **settings), checkpoints, [*callbacks, *extra], report)
    plain = strip(model)
    zeros = sum(int((w == 0).sum()) for w in plain.get_weights() if w.ndim > 1)
    return {"losses": losses, "weights": sha(plain), "zeros": zeros}

for kind in kinds:
    told[kind] = train(kind)

# SIGTERM to a process on its own
class Preempted(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

if workers.count == 1:
    try:
        train("train", out / "checkpoints", [Preempted()])
    except SystemExit as stopped:
        told["stopped"] = stopped.code, sorted(p.name for p in (out / "checkpoints").glob("step*"))
    told["resumed"] = train("train", out / "checkpoints")

# Stages: which worker runs them, and what it is told of their results
calls, results = [], []

def prune(section, out, seed, console):
    calls.append("prune")
    return {"result": workers.index + 10}

def export(section, out, seed, console):
    calls.append("export")
    return {"result": workers.index + 20}

for _ in range(2):
    for stage in (prune, export):
        metrics = run_stage(stage, {}, {}, out / stage.__name__, 0, Console(quiet=True))
        results.append(metrics["result"])
told["stages"] = calls, results

# Which rows each worker gets
shares = []
for step, (inputs, labels) in zip(range(3), strategy.experimental_distribute_dataset(
        data.batches("train", 12, seed=5, start_step=7))):
    local = strategy.experimental_local_results(inputs)
    shares.append(np.concatenate([rows.numpy() for rows in local]).tolist())
told["shares"] = shares

# What the chief says and what all add up to
told["shared"] = workers.share({"text": "ä" * 1000, "from": workers.index})
told["total"] = workers.total([1, workers.index, 10**12])

# One that was started with something else
try:
    check_same(workers, {"seed": workers.index, "steps": 5})
    told["other"] = ""
except UserError as error:
    told["other"] = str(error)

# One that is stuck
if workers.count == 2:
    try:
        with together(workers, seconds=2.0):
            if workers.index == workers.count - 1:
                time.sleep(6)
            workers.total([1])
        told["stuck"] = ""
    except UserError as error:
        told["stuck"] = str(error)
print("TOLD", json.dumps(told), flush=True)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("dataset")
    texts = [f"def f{i}(x):\n    return {i} * x + {i * i}\n" * 9 for i in range(60)]
    write_dataset(
        [Document(str(i), text) for i, text in enumerate(texts)], tiny_tokenizer, folder, 16
    )
    return folder


def run(count, dataset, kinds, out):
    """What each of `count` workers tells."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environments = worker_environments(count, {**os.environ, "PYTHONPATH": path})
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(dataset), kinds, str(out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    told = []
    try:
        for child in children:
            output, errors = child.communicate(timeout=200)
            lines = [line for line in output.splitlines() if line.startswith("TOLD")]
            assert lines, f"exit {child.returncode}\n{output}\n{errors[-4000:]}"
            told.append(json.loads(lines[0].removeprefix("TOLD")))
    finally:
        for child in children:
            child.kill()
    return told


COMPRESSED = "prune,distill,qat"


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    return run(1, dataset, f"train,{COMPRESSED}", tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def two(dataset, tmp_path_factory):
    return run(2, dataset, f"accumulate,{COMPRESSED}", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(dataset, tmp_path_factory):
    return run(3, dataset, "train", tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("kind", COMPRESSED.split(","))
def test_two_workers_compress_as_one(kind, one, two):
    compare(one[kind], [told[kind] for told in two])


def test_three_workers_train_as_one(one, three):
    """With clipping, as the next one."""
    compare(one["train"], [told["train"] for told in three])


def test_two_workers_that_accumulate_train_as_one_that_does_not(one, two):
    compare(one["train"], [told["accumulate"] for told in two])


def compare(alone, workers):
    losses = alone["losses"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(workers[0]["losses"], losses, rtol=1e-4)
    assert all(not told["losses"] for told in workers[1:])  # the chief alone reports
    assert len({told["weights"] for told in workers}) == 1
    assert workers[0]["zeros"] == pytest.approx(alone["zeros"], abs=3)


def test_the_settings_matter(one):
    """So that equal results are not those of options that do nothing."""
    assert len({one[kind]["weights"] for kind in f"train,{COMPRESSED}".split(",")}) == 4
    assert one["prune"]["zeros"] > 1000 > one["train"]["zeros"]


def test_sigterm_ends_a_step_and_keeps_it(one):
    assert one["stopped"] == [143, ["step-00000003"]]
    assert one["resumed"]["weights"] == one["train"]["weights"]


def test_stages_run_where_they_should_and_once(one, two, three):
    for workers in ([one], two, three):
        for told in workers:
            calls, results = told["stages"]
            assert calls == (["prune"] if told["index"] else ["prune", "export"])
            assert results == [10, 20, 10, 20]  # the chief's, and again without a call


def test_workers_share_out_every_batch(one, two, three):
    for workers in (two, three):
        for step in range(3):
            whole = sorted(one["shares"][step])
            shares = [told["shares"][step] for told in workers]
            assert {len(share) for share in shares} == {12 // len(workers)}
            assert sorted(row for share in shares for row in share) == whole


def test_workers_agree_and_notice_who_is_stuck(one, two, three):
    assert "one device" in one["why"]
    for workers in (two, three):
        count = len(workers)
        assert [told["index"] for told in workers] == list(range(count))
        for told in workers:
            assert f"{count} workers" in told["why"]
            assert told["shared"] == {"text": "ä" * 1000, "from": 0}
            assert told["total"] == [count, sum(range(count)), count * 10**12]
            # the first that differs, said by all of them
            assert "Worker 1 trains another run than worker 0: seed is 1, not 0" in told["other"]
    assert "a worker is stuck" in two[0]["stuck"]
    assert "newest checkpoint" in two[0]["stuck"]
