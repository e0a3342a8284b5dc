"""From token streams on disk to batches: a `tf.data.Dataset` whose order is arithmetic.

No buffer is shuffled and no iterator has a state worth saving: batch `k` is computed from
`(seed, k)`, so a resumed run sees exactly the batches that an undisturbed one would have seen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt.data.packing import SPLITS, DatasetInfo

# A stream up to this size is a tensor of the graph; a longer one is read through the page cache
_IN_MEMORY = 512 << 20  # bytes

Starts = Callable[[tf.Tensor], tf.Tensor]  # step -> where each window of the batch begins
Batch = tuple[tf.Tensor, tf.Tensor]  # inputs and labels, both (batch, time) int32


class TokenDataset:
    """A folder of `write_dataset`, cut into windows of `sequence_length` tokens.

    Attributes:
        info: what the folder's dataset.json says.
        sequence_length: tokens of one window.
    """

    def __init__(
        self, info: DatasetInfo, streams: dict[str, np.ndarray], sequence_length: int
    ) -> None:
        self.info = info
        self.sequence_length = sequence_length
        self._streams = streams
        self._tables: dict[str, tf.Tensor] = {}

    @classmethod
    def load(
        cls, folder: str | os.PathLike, sequence_length: int | None = None, verify: bool = True
    ) -> TokenDataset:
        """Open a folder that `write_dataset` wrote.

        Args:
            folder: with dataset.json, train.bin and valid.bin.
            sequence_length: tokens of a window; the folder's own where None.
            verify: whether to read both files and compare their sha256 (about 1 GB/s).

        Raises:
            UserError: for a missing, truncated or changed file, and for windows that are longer
                than a split.
        """
        folder = Path(folder)
        info = DatasetInfo.load(folder)
        length = info.sequence_length if sequence_length is None else sequence_length
        if length < 1:
            raise UserError(f"sequence_length must be positive. Received: {length}.")
        streams = {}
        for name in SPLITS:
            streams[name] = stream = _open(folder / f"{name}.bin", info, name, verify)
            if len(stream) <= length:
                raise UserError(
                    f"The {name} split of {folder} holds {len(stream)} tokens, and a window of "
                    f"sequence_length={length} needs {length + 1}. Use a shorter one, or make the "
                    "dataset again from more text."
                )
        return cls(info, streams, length)

    def num_tokens(self, split: str) -> int:
        """Tokens in "train" or "valid"."""
        return self.info.split(split).tokens

    def num_windows(self, split: str) -> int:
        """Windows of one pass over "train" or "valid"."""
        tokens = self.num_tokens(split)  # train is a ring, so its last token has a label too
        return (tokens if split == "train" else tokens - 1) // self.sequence_length

    def tokens(self, split: str) -> np.ndarray:
        """The stream itself, `(tokens,)` uint16 or uint32, read-only and not in memory."""
        self.info.split(split)
        return self._streams[split]

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        max_batches: int | None = None,
    ) -> tf.data.Dataset:
        """Batches of `(inputs, labels)`, both `(batch, time)` int32 of static shape; a label is the
        token after its input.

        "train" never ends. An epoch predicts every token once (bar a rest shorter than a window),
        in windows whose grid starts at another place and whose order is another permutation each
        epoch; both are functions of `(seed, epoch)`. The dataset from `start_step=k` is the one
        from 0 without its first k batches, at no cost.

        "valid" is one pass in order over windows that do not overlap, the same for every seed. What
        is left at the end and fills no batch is dropped, so that shapes stay static; a split
        smaller than one batch gives one smaller batch.

        Args:
            batch_size: global; `tf.distribute` divides it among the replicas.
            max_batches: where "valid" stops at the latest ("train" too, if given).
        """
        self.info.split(split)
        if batch_size < 1 or start_step < 0 or not (max_batches is None or max_batches > 0):
            raise UserError(
                "batch_size and max_batches must be positive and start_step not negative. Received:"
                f" {batch_size=}, {start_step=}, {max_batches=}."
            )
        if split == "train":
            count = max_batches
            starts = self._shuffled_starts(seed, batch_size)
        else:
            windows = self.num_windows("valid")
            batch_size = min(batch_size, windows)
            count = windows // batch_size - start_step
            count = max(0, count if max_batches is None else min(count, max_batches))
            starts = self._ordered_starts(batch_size)
        gather = self._gather(split, batch_size)
        last = np.iinfo(np.int64).max if count is None else start_step + count
        batches = tf.data.Dataset.range(start_step, last).map(
            lambda step: gather(starts(step)), num_parallel_calls=2, deterministic=True
        )
        if count is None:  # so that Keras asks for steps_per_epoch instead of training for ever
            batches = batches.apply(
                tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
            )
        options = tf.data.Options()
        # Workers take their shares of each batch; there are no input files to share out
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.DATA
        )
        return batches.with_options(options).prefetch(2)

    def _ordered_starts(self, batch_size: int) -> Starts:
        length = self.sequence_length

        def starts(step: tf.Tensor) -> tf.Tensor:
            return (step * batch_size + tf.range(batch_size, dtype=tf.int64)) * length

        return starts

    def _shuffled_starts(self, seed: int, batch_size: int) -> Starts:
        """`step -> (batch,) int64`: where the windows of a batch begin."""
        windows, tokens = self.num_windows("train"), self.num_tokens("train")
        length = self.sequence_length

        def starts(step: tf.Tensor) -> tf.Tensor:
            index = step * batch_size + tf.range(batch_size, dtype=tf.int64)
            epoch = index // windows
            *key, grid = (_random(seed, 4 * epoch + i) for i in range(4))
            window = _permute(index % windows, windows, tf.stack(key, axis=1))
            return (grid % tokens + window * length) % tokens

        return starts

    def _gather(self, split: str, batch_size: int) -> Callable[[tf.Tensor], Batch]:
        """`(batch,) starts -> (inputs, labels)`; the stream is a ring, as documents have no order
        and each ends with its end-of-text token."""
        stream, length = self._streams[split], self.sequence_length
        small = stream.nbytes <= _IN_MEMORY
        if small and split not in self._tables:
            with tf.device("/cpu:0"):  # where tf.data runs
                self._tables[split] = tf.constant(stream)
        table = self._tables.get(split)

        def gather(starts: tf.Tensor) -> Batch:
            rows = (starts[:, None] + tf.range(length + 1, dtype=tf.int64)) % len(stream)
            if small:
                tokens = tf.cast(tf.gather(table, rows), tf.int32)
            else:
                tokens = tf.numpy_function(
                    lambda rows: stream[rows].astype(np.int32), [rows], tf.int32, stateful=False
                )
            tokens = tf.ensure_shape(tokens, [batch_size, length + 1])
            return tokens[:, :-1], tokens[:, 1:]

        return gather


def _permute(index: tf.Tensor, size: int, key: tf.Tensor) -> tf.Tensor:
    """Where a random permutation of [0, size) sends each `index` `(n,)`, by its `key` `(n, 3)`.

    A block cipher (Simon) stands in for a table. tf.random.experimental.index_shuffle is the same
    op, but takes no key per index and leaves its rounds at 4, after which the orders of two epochs
    over a million windows still correlate by 0.95; from 16 on nothing is left to measure.
    """
    last = tf.constant(size - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=key, max_index=last, rounds=24)


def _random(seed: int, counter: tf.Tensor) -> tf.Tensor:
    """A number in [0, 2^62) for each counter, int64: output `counter` of SplitMix64 (Steele et al.
    2014). The cipher above reads the low bits of its key alone, so each has to depend on all of
    the seed."""
    start = int(np.random.SeedSequence(seed % 2**64).generate_state(1, np.uint64)[0])
    x = tf.cast(counter, tf.uint64) * _word(0x9E3779B97F4A7C15) + _word(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _word(shift))) * _word(factor)
    x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _word(31)))
    return tf.cast(tf.bitwise.right_shift(x, _word(2)), tf.int64)


def _word(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint64)


def _open(path: Path, info: DatasetInfo, split: str, verify: bool) -> np.ndarray:
    known = info.split(split)
    dtype = np.dtype(info.dtype).newbyteorder("<")
    again = "Make the dataset again."
    if not path.is_file():
        raise UserError(f"{path} is missing. {again}")
    size = path.stat().st_size
    if size != known.tokens * dtype.itemsize:
        raise UserError(
            f"{path} is truncated or belongs to another dataset: it has {size} bytes, and "
            f"{known.tokens * dtype.itemsize} were expected. {again}"
        )
    if verify:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != known.sha256:
            raise UserError(
                f"{path} is damaged or belongs to another dataset: its sha256 is not the one in "
                f"dataset.json. {again}"
            )
    return np.memmap(path, dtype, "r")
