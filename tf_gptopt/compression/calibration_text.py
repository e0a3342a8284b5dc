"""The token ids that a model is calibrated and validated on, and which of them are text.

Examples of one length are often padded. A negative id stands for what is no text, and beside labels
what lies behind the last one that counts is none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._ids import as_ids
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.models.gpt import GPTModel, require_gpt

EXAMPLES = 128
PADDING = -1  # the id of what is no text


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
