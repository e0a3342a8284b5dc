"""A teacher's likeliest tokens on disk: exact, resumable, and as good as the teacher itself."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.cache import CachedTeacher
from tf_gptopt.compression.distillation.cache_writer import cache_logits
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.distillation.losses import HiddenStates, SoftLabels
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.data.packing import DatasetInfo, SplitInfo
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.trainer import fit


def make_dataset(length: int = 8, tokens: int = 403, seed: int = 0) -> TokenDataset:
    rng = np.random.default_rng(seed)
    sizes = {"train": tokens, "valid": 50}
    streams = {name: rng.integers(0, 61, size).astype("uint16") for name, size in sizes.items()}
    info = DatasetInfo(
        **{name: SplitInfo(size, 1, size, f"{name} {seed}") for name, size in sizes.items()},
        dtype="uint16",
        vocab_size=61,
        eot_id=0,
        sequence_length=length,
        tokenizer_fingerprint="x",
        valid_fraction=0.1,
        seed=0,
    )
    return TokenDataset(info, streams, length)


def silent(*report: Any) -> None:
    pass


def rows(cached: CachedTeacher, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.load(cached.folder / f"{split}_{name}.npy") for name in ("ids", "log_probs"))


def test_rows_are_the_likeliest_tokens_and_the_rest(tiny_model: Callable, tmp_path: Path) -> None:
    teachers, dataset = [tiny_model(seed=1), tiny_model(seed=2)], make_dataset()
    reports: list[tuple] = []
    cached = cache_logits(
        teachers,
        dataset,
        tmp_path / "logits",
        k=5,
        temperature=3.0,
        teacher_weights=[1, 3],
        on_progress=lambda *report: reports.append(report),
    )
    windows = dataset.tokens("train")[: 50 * 8].reshape(50, 8).astype(np.int32)
    p = [tf.nn.softmax(teacher(windows) / 3.0).numpy() for teacher in teachers]
    p = 0.25 * p[0] + 0.75 * p[1]
    ids, log_probs = rows(cached)
    assert ids.shape == (50, 8, 5)
    assert ids.dtype == np.uint16
    found = np.exp(log_probs.astype(np.float64))
    np.testing.assert_allclose(found[..., :5], -np.sort(-p)[..., :5], rtol=5e-3)
    np.testing.assert_allclose(
        np.take_along_axis(p, ids.astype(int), -1), found[..., :5], rtol=5e-3
    )
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=5e-3)
    assert cached.bytes == (50 + 6) * 8 * (5 * 2 + 6 * 2)
    assert reports[-1][:2] == (56, 56)
    assert "tokens/s" in reports[-1][2]
    # the same call opens it; nothing is written anew
    before = (cached.folder / "train_ids.npy").stat().st_mtime_ns
    again = cache_logits(
        teachers, dataset, tmp_path / "logits", 5, temperature=3.0, teacher_weights=[1, 3]
    )
    assert (again.folder / "train_ids.npy").stat().st_mtime_ns == before


def test_batches_carry_the_rows_of_their_own_windows(tiny_model: Callable, tmp_path: Path) -> None:
    teacher, dataset = tiny_model(seed=1), make_dataset()
    cached = cache_logits(teacher, dataset, tmp_path / "logits", 4, on_progress=silent)
    seen = []
    for inputs, labels in cached.batches("train", 5, seed=7, max_batches=20):
        stream = dataset.tokens("train")
        for row, label in zip(inputs["token_ids"].numpy(), labels.numpy(), strict=True):
            (start,) = (i for i in range(0, 400, 8) if (stream[i : i + 8] == row).all())
            np.testing.assert_array_equal(label[:-1], row[1:])
            seen.append(start)
        top = tf.math.top_k(teacher(inputs["token_ids"]), 4).indices
        np.testing.assert_array_equal(inputs["teacher_ids"], top)
    assert len(set(seen[:50])) >= 45  # an epoch: nearly every window once
    # resumable by arithmetic, as the dataset itself
    later = next(iter(cached.batches("train", 5, seed=7, start_step=13)))
    expected = next(iter(cached.batches("train", 5, seed=7).skip(13)))
    np.testing.assert_array_equal(later[0]["token_ids"], expected[0]["token_ids"])


def test_a_student_learns_from_the_disk_what_the_teacher_would_say(
    tiny_model: Callable, tmp_path: Path
) -> None:
    teacher, dataset = tiny_model(seed=1), make_dataset()
    student = tiny_model(num_layers=1, embedding_dim=16, num_heads=2)
    whole = cache_logits(teacher, dataset, tmp_path / "whole", k=61, on_progress=silent)
    part = cache_logits(teacher, dataset, tmp_path / "part", k=8, on_progress=silent)
    losses = {}
    for name, given in (("live", teacher), ("whole", whole), ("part", part)):
        distiller = Distiller(student, given)
        distiller.compile(keras.optimizers.SGD(0.0), NextTokenLoss())
        batches = (part if name == "part" else whole).batches("valid", 6)
        losses[name] = distiller.evaluate(batches, verbose=0, return_dict=True)
    assert losses["whole"] == pytest.approx(losses["live"], rel=2e-3)
    # merging tokens into one event loses information, never adds any
    assert losses["part"]["distillation_loss"] < losses["live"]["distillation_loss"]
    assert losses["part"]["hard_loss"] == pytest.approx(losses["live"]["hard_loss"], rel=1e-5)

    opened = CachedTeacher.open(tmp_path / "part", dataset)
    distiller = Distiller(student, opened, alpha=0.9)
    assert distiller.teachers == ()
    config = TrainConfig(
        steps=60, batch_size=8, accumulate=2, learning_rate=1e-2, warmup_steps=2, log_every=1
    )
    seen = []
    fit(distiller, opened, config, None, [], lambda report: seen.append(report.loss))
    assert seen[-1] < 0.95 * seen[0]


def test_a_killed_writer_goes_on(tiny_model: Callable, tmp_path: Path) -> None:
    code = f"""
from __future__ import annotations
import numpy as np, sys
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation import cache_writer as writing
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.data.packing import DatasetInfo, SplitInfo
from tf_gptopt.models.checkpoints import load_checkpoint
{inspect.getsource(make_dataset)}
writing._SAVE_EVERY = 0.0
done = lambda done, total, what: (print(done, flush=True), sys.stdin.readline())
writing.cache_logits(
    load_checkpoint("teacher"), make_dataset(), "logits", 4, batch_size=8, on_progress=done
)
"""
    from tf_gptopt.models.checkpoints import save_model

    teacher, dataset = tiny_model(seed=1), make_dataset()
    save_model(teacher, tmp_path / "teacher")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):  # it waits in the report of the third batch
        assert child.stdout.readline().strip(), child.stderr.read()
        if _ < 2:
            child.stdin.write("\n")
            child.stdin.flush()
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    partial = tmp_path / "logits.partial"
    assert not (tmp_path / "logits").exists()
    done = json.loads((partial / "progress.json").read_text())["train"]
    assert done == 16  # the third was not saved yet
    with pytest.raises(UserError, match=r"There are no finished logits"):
        CachedTeacher.open(tmp_path / "logits", dataset)
    with pytest.raises(UserError, match=r"k differ"):  # another one may not go on with it
        cache_logits(teacher, dataset, tmp_path / "logits", 5)

    reports: list[int] = []
    cached = cache_logits(
        teacher,
        dataset,
        tmp_path / "logits",
        4,
        batch_size=8,
        on_progress=lambda done, total, what: reports.append(done),
    )
    assert reports[0] == done + 8
    assert not partial.exists()
    undisturbed = cache_logits(teacher, dataset, tmp_path / "other", 4, on_progress=silent)
    for split in ("train", "valid"):
        (ids, log_probs), expected = rows(cached, split), rows(undisturbed, split)
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_allclose(log_probs, expected[1], atol=2e-3)


def test_mistakes_are_explained(tiny_model: Callable, tmp_path: Path) -> None:
    teacher, student, dataset = tiny_model(seed=1), tiny_model(num_layers=1), make_dataset()
    cached = cache_logits(teacher, dataset, tmp_path / "logits", 4, on_progress=silent)
    with pytest.raises(UserError, match=r"teachers differ"):
        cache_logits(tiny_model(seed=2), dataset, tmp_path / "logits", 4)
    with pytest.raises(UserError, match=r"data differ"):
        CachedTeacher.open(tmp_path / "logits", make_dataset(seed=1))
    with pytest.raises(UserError, match=r"sequence_length, windows differ"):
        CachedTeacher.open(tmp_path / "logits", make_dataset(length=4))
    with pytest.raises(UserError, match=r"k must be between 1 and the vocabulary's 61"):
        cache_logits(teacher, dataset, tmp_path / "more", 62)
    with pytest.raises(UserError, match=r"knows 50 in a context of 32"):
        cache_logits(tiny_model(vocab_size=50), dataset, tmp_path / "more", 4)
    with pytest.raises(UserError, match=r"context of 4"):
        cache_logits(tiny_model(max_sequence_length=4), dataset, tmp_path / "more", 4)
    with pytest.raises(UserError, match=r"at temperature 2 and the loss has 3"):
        Distiller(student, cached, temperature=3.0)
    with pytest.raises(UserError, match=r"HiddenStates looks inside the teacher"):
        Distiller(student, cached, losses=[SoftLabels(), HiddenStates()])
    with pytest.raises(UserError, match="one vocabulary"):
        Distiller(tiny_model(vocab_size=62), cached)
    distiller = Distiller(student, cached)
    distiller.compile("sgd", NextTokenLoss(), run_eagerly=True)
    with pytest.raises(UserError, match=r"do not carry the cached logits"):
        distiller.evaluate(dataset.batches("valid", 6), verbose=0)
    path = tmp_path / "logits" / "train_ids.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train_ids.npy is missing or damaged"):
        CachedTeacher.open(tmp_path / "logits", dataset)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"could not be written"):
        cache_logits(teacher, dataset, tmp_path / "file" / "logits", 4)
