"""Writing a `CachedTeacher`: resumable, and whole or absent under its final name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._clock import clock
from tf_gptopt._errors import UserError
from tf_gptopt._files import read_json, sync, write_json
from tf_gptopt.compression.calibration import Progress
from tf_gptopt.compression.distillation.cache import (
    INFO_FILE,
    CachedTeacher,
    check_made_of,
    id_dtype,
    made_of_data,
    open_arrays,
)
from tf_gptopt.compression.distillation.losses import SoftLabels
from tf_gptopt.compression.distillation.teachers import (
    as_teachers,
    check_vocabulary,
    teacher_shares,
)
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.data.packing import SPLITS
from tf_gptopt.models.gpt import GPTModel

_FORMAT = "tf_gptopt.teacher.1"
_PROGRESS_FILE = "progress.json"
_SAVE_EVERY = 10.0  # seconds of work that a kill may cost
_LEAST = 1e-30  # of a probability whose logarithm is taken


def cache_logits(
    teacher: Any,
    dataset: TokenDataset,
    folder: str | os.PathLike,
    k: int = 32,
    *,
    temperature: float = SoftLabels.temperature,
    teacher_weights: Sequence[float] | None = None,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> CachedTeacher:
    """Write the `k` likeliest tokens that `teacher` expects after every token of `dataset`.

    The same call goes on where it was stopped, however it was; one that is finished is opened. A
    row takes `4 k + 2` bytes (`6 k + 2` for vocabularies above 65,536 tokens).

    Args:
        teacher: as in `Distiller`, one or several.
        dataset: both of its splits are written.
        folder: made; while it is unfinished it is called `folder`.partial.
        k: tokens kept of each distribution; the others become one event, "another one".
        temperature: of the softmax; the loss must have the same, as what was left out cannot be
            brought to another one.
        teacher_weights: of several teachers.
        batch_size: windows that the teacher reads at a time.
        on_progress: called as `on_progress(windows done, of, speed and time left in words)`;
            default a line on stderr every ten seconds.

    Raises:
        UserError: when the teacher does not know the dataset's tokens, when the folder holds
            something else, and when it cannot be written.
    """
    teachers = as_teachers(teacher)
    shares = teacher_shares(teacher_weights, len(teachers))
    SoftLabels(temperature)  # checks it
    vocab = teachers[0].config.vocab_size
    if not isinstance(k, int) or not 1 <= k <= vocab:
        raise UserError(
            f"k must be between 1 and the vocabulary's {vocab} tokens. Received: k={k}."
        )
    for one in teachers:
        _check_teacher(one, vocab, dataset)
    made_of = {
        "format": _FORMAT,
        "teachers": [_fingerprint(one) for one in teachers],
        "shares": list(shares),
        "k": k,
        "temperature": float(temperature),
        "vocab_size": vocab,
        **made_of_data(dataset),
    }
    folder = Path(folder)
    if (folder / INFO_FILE).is_file():
        check_made_of(folder, read_json(folder / INFO_FILE), made_of)
        return CachedTeacher(folder, dataset, made_of)
    partial = folder.with_name(f"{folder.name}.partial")
    with _writing(folder):
        done = _begin(partial, made_of)
        answer = _top_k(teachers, shares, k, float(temperature))
        total = {split: dataset.num_windows(split) for split in SPLITS}
        report = _Report(on_progress, sum(total.values()), sum(done.values()), dataset)
        for split in SPLITS:
            arrays, saved = open_arrays(partial, split, made_of, "r+"), time.monotonic()
            stream, length = dataset.tokens(split), dataset.sequence_length
            for first in range(done[split], total[split], batch_size):
                last = min(first + batch_size, total[split])
                windows = np.asarray(stream[first * length : last * length], np.int32)
                for array, found in zip(
                    arrays, answer(tf.constant(windows.reshape(-1, length))), strict=True
                ):
                    array[first:last] = found.numpy()
                done[split] = last
                report(sum(done.values()))
                if time.monotonic() - saved > _SAVE_EVERY:
                    _save(partial, arrays, done)
                    saved = time.monotonic()
            _save(partial, arrays, done)
        (partial / _PROGRESS_FILE).unlink()
        sync(partial)
        os.replace(partial, folder)
        sync(folder.parent)
    return CachedTeacher(folder, dataset, made_of)


def _top_k(
    teachers: Sequence[GPTModel], shares: Sequence[float], k: int, temperature: float
) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """`(windows, time)` token ids -> ids and log-probabilities as they are written."""
    dtype = id_dtype(teachers[0].config.vocab_size)

    @tf.function(reduce_retracing=True)
    def answer(token_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        p = tf.add_n(
            [
                share * tf.nn.softmax(one(token_ids, training=False) / temperature)
                for share, one in zip(shares, teachers, strict=True)
            ]
        )
        top, ids = tf.math.top_k(p, k)
        # 1 - sum of the likeliest is rounding where they are nearly all, and so the rest is summed
        below = tf.reduce_sum(tf.where(p < top[..., -1:], p, 0.0), -1)
        rest = tf.maximum(below, 1.0 - tf.reduce_sum(top, -1))[..., None]
        log_probs = tf.math.log(tf.maximum(tf.concat([top, rest], -1), _LEAST))
        return tf.cast(ids, dtype), tf.cast(log_probs, tf.float16)

    return answer


def _check_teacher(teacher: GPTModel, vocab: int, dataset: TokenDataset) -> None:
    check_vocabulary(teacher, vocab, dataset.info.tokenizer_fingerprint)
    if dataset.info.vocab_size > vocab or dataset.sequence_length > (
        teacher.config.max_sequence_length
    ):
        raise UserError(
            f"The dataset has {dataset.info.vocab_size} tokens in windows of "
            f"{dataset.sequence_length}, and the teacher knows {vocab} in a context of "
            f"{teacher.config.max_sequence_length}. Open the dataset with a shorter "
            "sequence_length, or make it with the teacher's tokenizer."
        )


def _fingerprint(model: GPTModel) -> str:
    """sha256 (hex) of a model's shape and weights."""
    digest = hashlib.sha256(repr(sorted(model.config.to_dict().items())).encode())
    for weight in model.weights:
        digest.update(np.ascontiguousarray(weight.numpy()).tobytes())
    return digest.hexdigest()


def _begin(partial: Path, made_of: dict[str, Any]) -> dict[str, int]:
    """Windows of each split that are done already; files of the right size wherever they lie."""
    if (partial / INFO_FILE).is_file():
        check_made_of(partial, read_json(partial / INFO_FILE), made_of)
        return read_json(partial / _PROGRESS_FILE)
    shutil.rmtree(partial, ignore_errors=True)  # killed before it had begun
    partial.mkdir(parents=True)
    for split in SPLITS:
        for array in open_arrays(partial, split, made_of, "w+"):
            array.flush()
    done = dict.fromkeys(SPLITS, 0)
    write_json(partial / _PROGRESS_FILE, done)
    write_json(partial / INFO_FILE, made_of)
    return done


def _save(partial: Path, arrays: Sequence[np.ndarray], done: dict[str, int]) -> None:
    for array in arrays:
        array.flush()  # to the disk, before the word that it is there
    write_json(partial / _PROGRESS_FILE, done)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The logits could not be written to {folder} ({error.strerror or error}). Free some "
            "space there; the same call then goes on where it stopped."
        ) from None


class _Report:
    """Says how far it is, how fast, and how long it will take."""

    def __init__(
        self, on_progress: Progress | None, total: int, done: int, dataset: TokenDataset
    ) -> None:
        self._tell, self._total, self._begun = on_progress or self._print, total, done
        self._length, self._start = dataset.sequence_length, time.monotonic()
        self._printed = self._start

    def __call__(self, done: int) -> None:
        speed = (done - self._begun) / max(1e-9, time.monotonic() - self._start)
        left = clock((self._total - done) / max(1e-9, speed))
        what = f"{speed * self._length:,.0f} tokens/s  {left} left"
        self._tell(done, self._total, what)

    def _print(self, done: int, total: int, what: str) -> None:
        if time.monotonic() - self._printed >= 10 or done == total:
            self._printed = time.monotonic()
            print(f"window {done:,}/{total:,}  {what}", file=sys.stderr, flush=True)
