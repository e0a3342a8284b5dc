"""Calibration: a GPT looks at a few texts, and somebody looks at the inputs of its Dense layers.

Pruning and quantization that know the data (Wanda, SparseGPT, GPTQ, SmoothQuant) need, for each
Dense layer, what goes into it. Two ways through the model, each in bounded memory:

- `stream_inputs` runs batch after batch through all blocks. Nothing is kept. For who only looks.
- `walk_blocks` runs block after block over all batches, because whoever changes a block wants the
  next one to see what the changed block makes. Kept are the hidden states between two blocks:
  `examples x time x width` numbers in the model's compute dtype (128 x 1024 x 768 float32: 403 MB).

On top of that comes one block's inside for one batch, which is 2,048 tokens at a time by default.

What is no text (`calibration_text.py`) the model reads as some token, and nobody looks at it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError, suggest
from tf_gptopt.compression.block_parts import (
    block_part,
    dense_names,
    front_part,
    norm_names,
    stream_dtype,
)
from tf_gptopt.compression.calibration_text import check_ids, readable
from tf_gptopt.models.gpt import GPTModel

Observe = Callable[[str, tf.Tensor], None]  # name of a Dense layer, its input (rows, in) float32
Progress = Callable[[int, int, str], None]  # done, total, what

_BATCH_TOKENS = 2048  # enough for matrix products at full speed


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
