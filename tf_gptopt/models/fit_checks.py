"""What goes into `fit` and what its loss comes to: mistakes that would end in a message about
something else, or in none at all."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras, refuse_keras3

_SETS_RATE = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)
_COPIES = (
    "The labels are the inputs, so the model learns to copy each token instead of predicting the "
    "next one. Shift them by one: inputs = ids[:, :-1], labels = ids[:, 1:]."
)


class CheckedFit:
    """A mixin, named before `keras.Model`: looks at what goes into `fit` and at how it ended."""

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        *,
        class_weight: None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """`keras.Model.fit`, which warns of labels that are the inputs and of a hopeless loss.

        Raises:
            UserError: for callbacks that would do nothing, and weights of classes.
        """
        check_callbacks(callbacks, self.optimizer)
        refuse_class_weight(class_weight)
        x = watch_labels(x, y)
        history = super().fit(x, y, batch_size, epochs, verbose, callbacks, **kwargs)
        losses = history.history
        warn_of((losses.get("hard_loss") or losses.get("loss") or [None])[-1], self)
        return history

    def train_on_batch(self, *args: Any, class_weight: None = None, **kwargs: Any) -> Any:
        """`keras.Model.train_on_batch`."""
        refuse_class_weight(class_weight)
        return super().train_on_batch(*args, **kwargs)


def check_ids(inputs: Any) -> None:
    """What a GPT is called with, `(batch, time)` token ids.

    Raises:
        UserError: for text, for a single sequence and for anything else of another rank.
    """
    for ids in tf.nest.flatten(inputs):
        rank, shape = getattr(ids.shape, "rank", len(ids.shape)), _readable(ids.shape)
        if getattr(ids.dtype, "name", ids.dtype) in ("string", "object") or ids.dtype == str:
            raise UserError(
                "A GPT takes token ids, and these are strings. Encode the texts with a tokenizer "
                "(tokenizer.encode(text) gives the ids), or let tf_gptopt.write_dataset do it: its "
                "TokenDataset.load(folder).batches('train', 8) is what fit takes."
            )
        if rank in (0, 1):
            raise UserError(
                "A GPT takes batches of sequences of token ids, (batch, time), and this is one "
                f"sequence or one token. Received: shape {shape}. Batch a dataset of sequences "
                "with dataset.batch(8, drop_remainder=True); cut a long row of ids into windows "
                "with ids[: len(ids) // time * time].reshape(-1, time), or give a single one as "
                "ids[None]."
            )
        if rank not in (None, 2):
            raise UserError(
                "A GPT takes token ids, (batch, time), one integer for each token. Received: shape "
                f"{shape}. Turn one-hot vectors into ids with ids.argmax(-1)."
            )


def check_label_shape(labels: Any, of_logits: tf.TensorShape, loss: Any) -> None:
    """Labels of a loss over token ids, `(batch, time)`, where their shape is known beforehand, and
    that of the logits, `(batch, time, vocab_size)`.

    Raises:
        UserError: when there is not one for each token.
    """
    if not tf.is_tensor(labels):
        return
    if isinstance(loss, keras.losses.CategoricalCrossentropy) and labels.shape.rank == 2:
        raise UserError(
            "CategoricalCrossentropy takes one-hot labels, (batch, time, vocab_size), and these "
            f"are token ids. Received: shape {_readable(labels.shape)}. Compile with "
            "tf_gptopt.NextTokenLoss() or SparseCategoricalCrossentropy(from_logits=True)."
        )
    if not takes_ids(loss):
        return
    if labels.dtype == tf.string:
        raise UserError(
            "Labels are token ids, and these are strings. Encode the texts with a tokenizer; the "
            "labels are the inputs shifted by one: inputs = ids[:, :-1], labels = ids[:, 1:]."
        )
    if labels.shape.rank is None or of_logits.rank != 3:
        return
    shape, (batch, time, vocab_size) = _readable(labels.shape), of_logits
    if labels.shape.rank == 3 and labels.shape[-1] == vocab_size != 1:
        raise UserError(
            f"Labels are token ids, (batch, time), and these are one-hot. Received: shape {shape}. "
            "Give labels.argmax(-1), or compile with "
            "keras.losses.CategoricalCrossentropy(from_logits=True)."
        )
    short = labels.shape.rank > 1 and None not in (time, labels.shape[1]) and (
        time != labels.shape[1]
    )  # fmt: skip
    if labels.shape.rank < 2 or short:
        raise UserError(
            f"There is a label for each token of the inputs, {_readable((batch, time))}. Received: "
            f"labels of shape {shape}. They are the inputs shifted by one: inputs = ids[:, :-1], "
            "labels = ids[:, 1:]."
        )


def check_callbacks(callbacks: Any, optimizer: Any = None) -> None:
    """Raise a `UserError` for callbacks of Keras 3, for TensorBoard's without TensorBoard, and for
    those that set the learning rate of an optimizer that has a schedule."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    rate = getattr(inner, "_learning_rate", None)
    has_schedule = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
    for callback in callbacks if isinstance(callbacks, Iterable) else [callbacks]:
        refuse_keras3(callback, "callback")
        if has_schedule and isinstance(callback, _SETS_RATE):
            raise UserError(
                f"{type(callback).__name__} sets a learning rate, and the optimizer's schedule "
                "would set another one before each update. Take one of them: adamw(steps, "
                'schedule="constant", warmup_steps=0) has a rate that callbacks can set, and '
                'schedule="plateau" with tf_gptopt.Plateau() lowers it where the loss stands still.'
            )
        if isinstance(callback, keras.callbacks.TensorBoard) and not find_spec("tensorboard"):
            raise UserError(
                "The callback TensorBoard needs the package of that name: pip install tensorboard. "
                "tf_gptopt.Monitor(log_dir) writes loss, learning rate and speed without it."
            )


def refuse_class_weight(class_weight: Any) -> None:
    """Keras weighs a whole row by the class of its largest label."""
    if class_weight is not None:
        raise UserError(
            "class_weight is for one label a row, and a GPT has one for each token. Give "
            "sample_weight, (batch, time), for example weights[labels] of an array with one "
            "number for each token of the vocabulary."
        )


def takes_ids(loss: Any) -> bool:
    """Whether a compiled loss compares logits with token ids."""
    losses = tf.nest.flatten(loss)
    return len(losses) == 1 and (
        isinstance(losses[0], keras.losses.SparseCategoricalCrossentropy)
        or hasattr(losses[0], "ignore_label")
    )


def watch_labels(x: Any, y: Any) -> Any:
    """`x`; labels that are their own inputs are told: of arrays at once, of a `tf.data.Dataset` as
    its first batch comes."""
    if isinstance(x, tf.data.Dataset):
        # one that brings its own iterator, as DTensor's does, would lose it
        return _watched(x) if type(x).__iter__ is tf.data.Dataset.__iter__ else x
    if y is not None and isinstance(x, (np.ndarray, tf.Tensor, list)):
        try:
            some = [np.asarray(each[:64]) for each in (x, y)]
        except ValueError:  # numpy's, about lists that make no array
            raise UserError(
                "The sequences are of different lengths, and fit takes arrays (batch, time). Pad "
                "them with any token, and their labels with -1, which NextTokenLoss ignores; or "
                "pack the texts with tf_gptopt.write_dataset."
            ) from None
        if some[0].ndim == 2 and np.array_equal(*some):
            warnings.warn(_COPIES, stacklevel=3)
    return x


def _watched(dataset: tf.data.Dataset) -> tf.data.Dataset:
    spec = dataset.element_spec
    pair = spec[:2] if isinstance(spec, tuple) and len(spec) in (2, 3) else ()
    ids = [
        one
        for one in pair
        if isinstance(one, tf.TensorSpec) and one.dtype.is_integer and one.shape.rank == 2
    ]
    if len(ids) < 2 or not ids[0].shape[1:].is_compatible_with(ids[1].shape[1:]):
        return dataset

    def look(number: tf.Tensor, batch: tuple) -> tuple:
        x, y = batch[0], tf.cast(batch[1], batch[0].dtype)
        if number == 0 and tf.reduce_all(tf.equal(x, y)):
            tf.print("Warning:", _COPIES, output_stream=sys.stderr)
        return batch

    return dataset.enumerate().map(look)


def doubt(loss: float, vocab_size: int) -> str | None:
    """What a training's last loss, in nats a token, says against it, in a sentence."""
    guess = math.log(vocab_size)
    if not math.isfinite(loss):
        return (
            f"The loss is {loss}: the training has diverged, and the weights are of no use. Lower "
            "the learning rate, or compile with tf_gptopt.adamw, which skips such updates."
        )
    if loss == 0.0:
        return (
            "The loss is exactly 0, so nothing was learnt: every label is ignored (a negative one "
            "marks padding), or the text is known by heart. Look at the labels."
        )
    if loss > 1.2 * guess + 0.5:
        return (
            f"The loss is {loss:.4g} at the end, and guessing at random among {vocab_size:,} "
            f"tokens gives {guess:.4g}: the model is worse than an untrained one. Lower the "
            "learning rate, and check that the labels are the next tokens of the inputs."
        )
    return None


def warn_of(loss: Any, model: Any) -> None:
    """Warn where the last loss of a `fit` says that `model` has learnt nothing."""
    config = getattr(getattr(model, "student", model), "config", None)
    if loss is not None and config is not None and takes_ids(model.loss):
        found = doubt(float(loss), config.vocab_size)
        if found:
            warnings.warn(found, stacklevel=3)


def _readable(shape: Any) -> str:
    sizes = ["any" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
