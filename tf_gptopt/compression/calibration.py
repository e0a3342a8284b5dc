"""Calibration: a GPT looks at a few texts, and somebody looks at the inputs of its Dense layers.

Pruning and quantization that know the data (Wanda, SparseGPT, GPTQ, SmoothQuant) need, for each
Dense layer, what goes into it. Two ways through the model, each in bounded memory:

- `stream_inputs` runs batch after batch through all blocks. Nothing is kept. For who only looks.
- `walk_blocks` runs block after block over all batches, because whoever changes a block wants the
  next one to see what the changed block makes. Kept are the hidden states between two blocks:
  `examples x time x width` numbers in the model's compute dtype (128 x 1024 x 768 float32: 403 MB).

On top of that comes one block's inside for one batch, which is 2,048 tokens at a time by default.

Examples of one length are often padded. A negative id stands for what is no text: the model reads
some token there, and nobody looks at it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._ids import as_ids
from tf_gptopt.compression.block_parts import (
    block_part,
    dense_names,
    front_part,
    norm_names,
    stream_dtype,
)
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.models.gpt import GPTModel, require_gpt

Observe = Callable[[str, tf.Tensor], None]  # name of a Dense layer, its input (rows, in) float32
Progress = Callable[[int, int, str], None]  # done, total, what

EXAMPLES = 128
PADDING = -1  # the id of what is no text
_BATCH_TOKENS = 2048  # enough for matrix products at full speed


# Token ids


def calibration_ids(
    source: Any, examples: int | None = None, length: int | None = None
) -> np.ndarray:
    """Token ids to calibrate on.

    128 examples are what the papers of SparseGPT and Wanda take. They should be text like the text
    that the model is for.

    Args:
        source: token ids `(examples, time)` as an array, a tensor or lists, in which a negative id
            is padding; a pair `(inputs, labels)` of such arrays; a `tf.data.Dataset` of batches of
            either; or a `TokenDataset`, of whose "train" split random windows are taken, the same
            ones every time. Beside labels, inputs behind the last one that counts (not negative)
            are padding.
        examples: how many at most; the first ones of an array or a Dataset. None takes an array
            whole, and 128 of what may never end.
        length: tokens of each example, which is cut there; all there are where None.

    Returns:
        `(examples, time)` int32, -1 where there is no text.

    Raises:
        UserError: when `source` is none of these, is empty, or has shorter examples.
    """
    return _text_of(*labelled_ids(source, examples, length))


def next_token_pairs(source: Any, examples: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels `(examples, time)` int32 of what `calibration_ids` takes: those of a pair
    as they are, else each token and the one that follows it. Negative labels do not count."""
    inputs, labels = labelled_ids(source, examples)
    if labels is None:
        inputs, labels = inputs[:, :-1], inputs[:, 1:]
    return np.where(inputs < 0, 0, inputs), labels


def labelled_ids(
    source: Any, examples: int | None = None, length: int | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids as `calibration_ids` reads them, and the labels beside them, if there are any."""
    for name, value in (("examples", examples), ("length", length)):
        if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
            raise UserError(f"{name} must be a positive integer. Received: {name}={value!r}.")
    if isinstance(source, TokenDataset):
        examples = examples or EXAMPLES
        source = source.batches("train", examples, max_batches=1)
    streamed = isinstance(source, tf.data.Dataset)
    batches, most = (source, examples or EXAMPLES) if streamed else ([source], examples)
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for batch in batches:
        inputs, labels = batch, None
        if _is_pair(batch, streamed):
            inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
        ids = _token_matrix(inputs)
        if labels is not None:
            labels = _token_matrix(labels)
            if labels.shape != ids.shape:
                raise UserError(
                    "Inputs and labels must have one shape, (examples, time). Received: "
                    f"{ids.shape} and {labels.shape}."
                )
            targets.append(labels[:, :length])
        if length is not None and ids.shape[1] < length:
            raise UserError(
                f"Calibration needs examples of {length} tokens. Received: examples of "
                f"{ids.shape[1]}. Give longer ones, or a smaller length."
            )
        ids = ids[:, :length]
        if rows and ids.shape[1] != rows[0].shape[1]:
            raise UserError(
                "Calibration examples must be of one length. Received: batches of "
                f"{rows[0].shape[1]} and {ids.shape[1]} tokens. Say length=..., and all are cut."
            )
        rows.append(ids)
        if most is not None and sum(map(len, rows)) >= most:
            break
    if not sum(ids.size for ids in rows):
        raise UserError(
            "There is no calibration text: the source holds no token. Expected: token ids "
            "(examples, time), 128 examples as a rule."
        )
    return np.concatenate(rows)[:most], np.concatenate(targets)[:most] if targets else None


def _text_of(inputs: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """`inputs` with -1 for what is no text."""
    ids = np.where(inputs < 0, PADDING, inputs)
    if labels is not None:
        time = np.arange(labels.shape[1])
        end = np.max(np.where(labels >= 0, time + 1, 0), 1)  # behind the last label
        last = np.clip(end - 1, 0, None)[:, None]
        named = np.take_along_axis(labels, last, 1) == np.take_along_axis(
            inputs, np.minimum(last + 1, len(time) - 1), 1
        )  # what the last label names is text as well
        ids = np.where(time < end[:, None] + (named[:, 0] & (end > 0))[:, None], ids, PADDING)
    ids = ids[(ids >= 0).any(1)]
    if not ids.size:
        raise UserError("There is no calibration text: all labels or ids are negative.")
    return ids


def check_ids(model: GPTModel, token_ids: Any) -> np.ndarray:
    """`token_ids` as int32 `(examples, time)` that `model` can read, negative where there is no
    text; a `UserError` otherwise."""
    config = require_gpt(model).config
    ids = _token_matrix(token_ids)
    if not ids.size:
        raise UserError(f"There is no calibration text. Received: token ids of shape {ids.shape}.")
    if ids.max() >= config.vocab_size:
        raise UserError(
            f"The model knows the token ids 0 to {config.vocab_size - 1}. Received: ids "
            f"up to {ids.max()}. Encode the text with the model's own tokenizer."
        )
    if not (ids >= 0).any(1).all():
        raise UserError(
            "An example has no token: all of its ids are negative, which marks padding. Leave it "
            "out."
        )
    if ids.shape[1] > config.max_sequence_length:
        raise UserError(
            f"The model's context is {config.max_sequence_length} tokens. Received: calibration "
            f"examples of {ids.shape[1]}. Cut them: calibration_ids(..., "
            f"length={config.max_sequence_length})."
        )
    return ids


def readable(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids without negative ones, and which rows of `(examples x time, ...)` are text, bool; None
    where all are."""
    text = ids >= 0
    return np.where(text, ids, 0), None if text.all() else text.reshape(-1)


def _is_pair(batch: Any, streamed: bool) -> bool:
    """Whether it is `(inputs, labels, ...)`, and not lists of ids."""
    if streamed:
        return isinstance(batch, (tuple, list)) and bool(batch)
    return isinstance(batch, tuple) and len(batch) == 2 and getattr(batch[0], "ndim", 0) == 2


def _token_matrix(value: Any) -> np.ndarray:
    """`value` as `(examples, time)` int32."""
    return as_ids(
        value,
        "Calibration takes token ids, integers (examples, time): an array, a tensor, a "
        "tf.data.Dataset of such batches, or a TokenDataset. Encode text with a tokenizer, and cut "
        "it into examples of one length.",
        ndim=(2,),
    )


# Inputs of Dense layers


class Block:
    """One block of a GPT in front of its calibration tokens; `walk_blocks` makes them.

    Attributes:
        index: of the block; `num_layers` for the head.
        layers: names of its Dense layers, without wrappers, in the order in which they run.
    """

    def __init__(self, model: GPTModel, index: int, batches: Callable[[], Iterator[tuple]]):
        self.index = index
        self.layers = dense_names(model, index)
        self._model = model
        self._batches: Callable[[], Iterator[tuple]] | None = batches

    def inputs(self, observe: Observe, layers: Collection[str] | None = None) -> None:
        """Run all calibration tokens into the block, with the weights that it has now.

        Calls `observe(name, x)` for every Dense layer (or those named in `layers`) and every batch,
        where x is the layer's input as `(rows, in)` float32 under every dtype policy, padding left
        out.
        """
        if self._batches is None:
            raise RuntimeError(f"The walk has left block {self.index}: observe it in its turn.")
        names = [name for name in self.layers if layers is None or name in layers]
        if not names:
            return
        part = block_part(self._model, self.index, names)
        for x, text in self._batches():
            for name, rows in zip(names, part(x), strict=True):
                observe(name, _only(rows, text))

    def leave(self) -> None:
        """Called when the walk goes on."""
        self._batches = None


def walk_blocks(
    model: GPTModel,
    token_ids: Any,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
    *,
    head: bool = False,
) -> Iterator[Block]:
    """Lead calibration tokens through `model`, one block at a time.

    ```python
    for block in walk_blocks(model, ids):
        block.inputs(lambda name, x: ...)       # look, as often as you like
        ...                                     # change the block's weights, or not
    ```                                         # the next block sees what this one makes now

    Args:
        model: a `GPTModel`, plain or wrapped, of any dtype policy.
        token_ids: `(examples, time)` integers; see `calibration_ids`.
        batch_size: examples that run at once; default 2,048 tokens' worth.
        on_progress: called as `on_progress(done, total, what)` with batches done and to do; each
            block counts twice, for looking and for going on, but the last, which nothing follows.
        head: whether the head comes last, as one more block with the only layer `token_logits`.

    Raises:
        UserError: when `model` is no GPTModel, or the tokens are not for it.
    """
    ids, text = readable(check_ids(model, token_ids))
    size = _batch_size(batch_size, ids)
    blocks = model.config.num_layers
    starts = range(0, len(ids), size)

    def report(index: int, rounds: int, batch: int, what: str) -> None:
        if on_progress and index < blocks:
            done = (2 * index + rounds) * len(starts) + batch + 1
            on_progress(done, (2 * blocks - 1 + head) * len(starts), f"block {index} {what}")

    states = np.empty((*ids.shape, model.config.embedding_dim), stream_dtype(model))

    def batches(index: int) -> Iterator[tuple]:
        for batch, start in enumerate(starts):
            yield tf.constant(states[start : start + size]), _of_batch(text, start, size, ids)
            report(index, 0, batch, "observed")

    front = front_part(model)
    for start in starts:
        states[start : start + size] = front(tf.constant(ids[start : start + size]))[0].numpy()
    last = blocks if head else blocks - 1
    for index in range(last + 1):
        block = Block(model, index, functools.partial(batches, index))
        yield block
        block.leave()
        if index == last:
            return
        part = block_part(model, index, [], end=True)
        for batch, start in enumerate(starts):
            (x,) = part(tf.constant(states[start : start + size]))
            states[start : start + size] = x.numpy()
            report(index, 1, batch, "passed")


def stream_inputs(
    model: GPTModel,
    token_ids: Any,
    layers: Collection[str],
    observe: Observe,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Call `observe(name, x)` for each of `layers` and every batch, of an unchanging model.

    Half the work of `walk_blocks`, and no hidden states are kept: each batch runs through all
    blocks, one at a time, up to the last that has a layer of interest.

    Args:
        model, token_ids, batch_size: as in `walk_blocks`.
        layers: names of Dense layers, without wrappers (`token_logits` may be among them), and of
            LayerNorms, whose input is the residual stream.
        observe: x is `(rows, in)` float32, padding left out.
        on_progress: called as `on_progress(done, total, what)` with block runs done and to do.

    Raises:
        UserError: as `walk_blocks`, and for a name that is no such layer's.
    """
    ids, text = readable(check_ids(model, token_ids))
    size = _batch_size(batch_size, ids)
    blocks = model.config.num_layers
    norms = [norm_names(model, index) for index in range(blocks + 1)]
    check_layers(model, set(layers).difference(*norms))
    chosen = [
        [name for name in (*dense_names(model, index), *norms[index]) if name in layers]
        for index in range(blocks + 1)
    ]
    last = max((index for index, names in enumerate(chosen) if names), default=-1)
    front = front_part(model)
    parts = [block_part(model, i, chosen[i], end=i < last) for i in range(last + 1)]
    starts, done = range(0, len(ids), size), 0
    for start in starts:
        (x,) = front(tf.constant(ids[start : start + size]))
        for index, part in enumerate(parts):
            *inputs, x = part(x) if index < last else [*part(x), None]
            for name, rows in zip(chosen[index], inputs, strict=True):
                observe(name, _only(rows, _of_batch(text, start, size, ids)))
            done += 1
            if on_progress:
                on_progress(done, len(starts) * len(parts), f"block {index}")


def check_layers(model: GPTModel, layers: Collection[str]) -> None:
    """Raise a `UserError` unless each of `layers` names a Dense layer of `model` (or the head)."""
    known = {n for i in range(model.config.num_layers + 1) for n in dense_names(model, i)}
    for name in layers:
        if name not in known:
            raise UserError(f"{name!r} is no Dense layer of the model.{suggest(name, known)}")


def _of_batch(text: np.ndarray | None, start: int, size: int, ids: np.ndarray) -> np.ndarray | None:
    """Which rows of a batch of examples are text."""
    return None if text is None else text.reshape(ids.shape)[start : start + size].reshape(-1)


def _only(rows: tf.Tensor, text: np.ndarray | None) -> tf.Tensor:
    return rows if text is None else tf.boolean_mask(rows, text)


def _batch_size(batch_size: int | None, ids: np.ndarray) -> int:
    if batch_size is None:
        return max(1, _BATCH_TOKENS // ids.shape[1])
    if isinstance(batch_size, bool) or int(batch_size) != batch_size or batch_size < 1:
        raise UserError(f"batch_size must be a positive integer. Received: {batch_size!r}.")
    return int(batch_size)
