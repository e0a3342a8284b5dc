"""A teacher's likeliest tokens on disk: it runs once over the data, and students learn without it.

```
logits/                          written as logits.partial/ and renamed when it is whole
  cache.json                     what it was made of
  train_ids.npy                  (windows, time, k) uint16 or int32, likeliest first
  train_log_probs.npy            (windows, time, k + 1) float16; last, of all other tokens together
  valid_ids.npy, valid_log_probs.npy
```

Both splits are cut into windows that do not overlap, and a row is what the teacher says of a token
from the context inside its window. `CachedTeacher.batches` deals the same windows to the student,
so student and teacher see the same context, token for token, at any batch size, seed and number of
epochs. What is lost against a `TokenDataset` alone is that its windows begin elsewhere every epoch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._files import read_json
from tf_gptopt.compression.distillation.losses import FeatureLoss, SoftLabels
from tf_gptopt.compression.distillation.soft_labels import TopK
from tf_gptopt.compression.distillation.teachers import check_vocabulary
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.data.packing import SPLITS
from tf_gptopt.models.gpt import GPTModel

INFO_FILE = "cache.json"


class CachedTeacher(TokenDataset):
    """A dataset whose batches carry what a teacher thinks of them; `cache_logits` makes it.

    ```python
    cached = cache_logits(teacher, TokenDataset.load("data"), "logits", k=32)
    distiller = Distiller(student, teacher=cached)
    distiller.compile(adamw(steps=1000), loss=NextTokenLoss())
    distiller.fit(cached.batches("train", 8), steps_per_epoch=1000)      # or tgo.fit(...)
    ```

    Its `batches` are those of the `TokenDataset`, moved to the nearest window below that the
    teacher has seen, as `(inputs, labels)`: `inputs` holds `token_ids` `(batch, time)` int32,
    `teacher_ids` `(batch, time, k)` and `teacher_log_probs` `(batch, time, k + 1)`.

    Attributes:
        k: tokens kept of each distribution.
        temperature: of the distributions.
        bytes: on disk.
    """

    def __init__(self, folder: Path, dataset: TokenDataset, made_of: dict[str, Any]) -> None:
        super().__init__(dataset.info, dataset._streams, dataset.sequence_length)
        self.folder = folder
        self.k: int = made_of["k"]
        self.temperature: float = made_of["temperature"]
        self.vocab_size: int = made_of["vocab_size"]
        self._rows = {split: open_arrays(folder, split, made_of, "r") for split in SPLITS}

    @classmethod
    def open(cls, folder: str | os.PathLike, dataset: TokenDataset) -> CachedTeacher:
        """Open what `cache_logits` has finished, without its teacher.

        Raises:
            UserError: when it is not there or damaged, or was made of other data.
        """
        folder = Path(folder)
        if not (folder / INFO_FILE).is_file():
            raise UserError(
                f"There are no finished logits in {folder}. Write them, or finish them, with "
                "cache_logits(teacher, dataset, folder)."
            )
        made_of = read_json(folder / INFO_FILE)
        expected = made_of_data(dataset)
        check_made_of(folder, {name: made_of.get(name) for name in expected}, expected)
        return cls(folder, dataset, made_of)

    @property
    def bytes(self) -> int:
        return sum(rows.nbytes for pair in self._rows.values() for rows in pair)

    def check(
        self, student: GPTModel, soft: SoftLabels | None, features: Sequence[FeatureLoss]
    ) -> None:
        """Raise a `UserError` unless `student` can learn this from what is on disk."""
        check_vocabulary(student, self.vocab_size, self.info.tokenizer_fingerprint)
        if features:
            raise UserError(
                f"{type(features[0]).__name__} looks inside the teacher, and {self.folder} holds "
                "soft labels alone. Give the teacher itself, or learn SoftLabels only."
            )
        if soft.temperature != self.temperature:
            raise UserError(
                f"The logits in {self.folder} were written at temperature {self.temperature:g} and "
                f"the loss has {soft.temperature:g}. Take SoftLabels(temperature="
                f"{self.temperature:g}), or write them again with cache_logits(..., temperature="
                f"{soft.temperature:g})."
            )

    @staticmethod
    def target(inputs: Any) -> TopK:
        """What the teacher thinks of a batch."""
        if not isinstance(inputs, dict) or "teacher_ids" not in inputs:
            raise UserError(
                "These batches do not carry the cached logits. Give fit and evaluate those of the "
                "CachedTeacher itself: cached.batches('train', batch_size)."
            )
        log_probs = tf.cast(inputs["teacher_log_probs"], tf.float32)
        # float16 has rounded them: they are made to sum to 1 again
        return TopK(tf.cast(inputs["teacher_ids"], tf.int32), tf.nn.log_softmax(log_probs))

    def _gather(self, split: str, batch_size: int) -> Callable[[tf.Tensor], tuple[Any, tf.Tensor]]:
        tokens_of = super()._gather(split, batch_size)
        ids, log_probs = self._rows[split]
        length, k, types = self.sequence_length, self.k, (tf.as_dtype(ids.dtype), tf.float16)

        def gather(starts: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            window = (starts // length) % len(ids)
            token_ids, labels = tokens_of(window * length)
            taught = tf.numpy_function(
                lambda w: (ids[w], log_probs[w]), [window], types, stateful=False
            )
            inputs = {
                "token_ids": token_ids,
                "teacher_ids": tf.ensure_shape(taught[0], [batch_size, length, k]),
                "teacher_log_probs": tf.ensure_shape(taught[1], [batch_size, length, k + 1]),
            }
            return inputs, labels

        return gather


def made_of_data(dataset: TokenDataset) -> dict[str, Any]:
    return {
        "tokenizer": dataset.info.tokenizer_fingerprint,
        "data": {split: dataset.info.split(split).sha256 for split in SPLITS},
        "sequence_length": dataset.sequence_length,
        "windows": {split: dataset.num_windows(split) for split in SPLITS},
    }


def id_dtype(vocab: int) -> Any:
    return np.uint16 if vocab <= 1 << 16 else np.int32


def open_arrays(folder: Path, split: str, made_of: dict[str, Any], mode: str) -> list[np.ndarray]:
    """ids and log-probabilities of a split, mapped into memory."""
    windows, k = made_of["windows"][split], made_of["k"]
    arrays = []
    for name, depth, dtype in (
        ("ids", k, id_dtype(made_of["vocab_size"])),
        ("log_probs", k + 1, np.float16),
    ):
        path, shape = folder / f"{split}_{name}.npy", (windows, made_of["sequence_length"], depth)
        if mode == "w+":
            arrays.append(np.lib.format.open_memmap(path, mode, dtype, shape))
            continue
        try:
            array = np.lib.format.open_memmap(path, mode)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is missing or damaged ({error}). Delete {folder} and write it again with "
                "cache_logits."
            ) from None
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{path} holds {array.shape} {array.dtype}, and {shape} {np.dtype(dtype)} was "
                f"expected. Delete {folder} and write it again with cache_logits."
            )
        arrays.append(array)
    return arrays


def check_made_of(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    different = [name for name in expected if found.get(name) != expected[name]]
    if different:
        raise UserError(
            f"{folder} was written for other logits: {', '.join(different)} differ. Name another "
            "folder, delete this one, or give what it was written with."
        )
