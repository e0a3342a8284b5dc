"""Updates that were skipped because something was not finite: a report, and after ten in a row the
end of the run, with advice. `AccumulatingOptimizer` skips and counts; this reads its counters."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras

PATIENCE = 10  # skipped updates in a row


@dataclasses.dataclass(frozen=True)
class Skips:
    """What an optimizer has skipped.

    Attributes:
        total: since the optimizer was made.
        in_a_row: since the last update that was done.
        last: the number of the update (from 1) that was skipped last; 0 for none.
        loss_scale: of a `LossScaleOptimizer`; None without one.
    """

    total: int
    in_a_row: int
    last: int
    loss_scale: float | None

    @classmethod
    def of(cls, optimizer: Any) -> Skips | None:
        """Read the counters; None where `optimizer` has none: it skips nothing."""
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if not hasattr(inner, "skipped_in_a_row"):
            return None
        counters = (inner.skipped, inner.skipped_in_a_row, inner.last_skipped)
        scale = None if inner is optimizer else float(optimizer.loss_scale)
        return cls(*(int(counter.numpy()) for counter in counters), scale)


class NonFiniteGuard(keras.callbacks.Callback):
    """Says when `adamw` skipped updates, and stops the training after ten in a row.

    ```python
    model.compile(adamw(steps=2000), loss=NextTokenLoss())
    model.fit(dataset, callbacks=[NonFiniteGuard()])
    ```

    `trainer.fit` has one built in. Where the optimizer is wrapped in Keras's `LossScaleOptimizer`
    (mixed_float16), an update that overflowed and lowered the scale is a skipped update too.

    Args:
        every: batches between two looks at the counters, which wait for the device.
        say: given each report; None prints it on stderr.

    Raises:
        UserError: when the optimizer skips nothing (it is none of `adamw`); and from `fit` after
            ten skipped updates in a row.
    """

    _supports_tf_logs = True  # leave the loss on the device

    def __init__(self, every: int = 10, say: Callable[[str], Any] | None = None) -> None:
        super().__init__()
        self.every, self.say = every, say or _print
        self._begun: Skips | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        if not self.begin(self.model):
            raise UserError(
                "The optimizer does not skip updates that are not finite, so there is nothing to "
                "guard. Compile the model with adamw(steps)."
            )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (batch + 1) % self.every == 0:
            self.look(float(logs["loss"]) if "loss" in logs else math.nan)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.look(float(logs["loss"]) if "loss" in logs else math.nan)

    def begin(self, model: keras.Model) -> bool:
        """Count from here on; False where the optimizer of `model` has no counters."""
        self.set_model(model)
        self._begun = self._seen = Skips.of(model.optimizer)
        return self._begun is not None

    def look(self, loss: float, step: int | None = None) -> Skips | None:
        """Report what is new, and raise after ten in a row.

        Args:
            loss: the latest, for the message.
            step: how the caller counts updates; None counts the optimizer's.
        """
        if self._begun is None:
            return None
        skips, seen = Skips.of(self.model.optimizer), self._seen
        self._seen = skips
        if skips.total > seen.total:
            self.say(report(skips, skips.total - seen.total))
        if min(skips.in_a_row, skips.total - self._begun.total) >= PATIENCE:
            raise UserError(hopeless(self.model, loss, skips.last if step is None else step, skips))
        return skips


def report(skips: Skips, new: int) -> str:
    """`new` updates were skipped, in a sentence."""
    what = "1 update was" if new == 1 else f"{new} updates were"
    scale = "" if skips.loss_scale is None else f"; the loss scale is {skips.loss_scale:g} now"
    return (
        f"{what} skipped, the last one number {skips.last}: its loss or gradient was not finite "
        f"({skips.total} so far, {skips.in_a_row} in a row{scale})"
    )


def weights_are_finite(model: keras.Model) -> bool:
    """Whether no trainable weight is NaN or infinite."""
    sums = [tf.cast(tf.reduce_sum(weight), tf.float32) for weight in model.trainable_variables]
    return math.isfinite(float(tf.add_n(sums)))


def hopeless(model: keras.Model, loss: float, step: int, skips: Skips | None = None) -> str:
    """Why the training of `model` has to end at `step`, and what to change."""
    sound = weights_are_finite(model)
    if not math.isfinite(loss):
        what = f"The loss is {loss} at step {step}"
    elif not sound:
        what = f"Weights are NaN or infinite at step {step}"
    else:
        what = f"The gradient is not finite at step {step}, though the loss is {loss:.4g}"
    if skips is not None and skips.in_a_row:
        what += f", and {skips.in_a_row} updates in a row were skipped"
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    rate, clip = float(optimizer.learning_rate), getattr(optimizer, "global_clipnorm", None)
    calm = f"Lower learning_rate (it is {rate:.3g} here), raise warmup_steps"
    calm += "" if clip else " or set clip_norm to 1"
    if skips is not None and skips.loss_scale is not None and sound:
        bottom = (
            "is 1, its least" if skips.loss_scale <= 1 else f"has fallen to {skips.loss_scale:g}"
        )
        return (
            f"{what}: float16 overflows. The loss scale {bottom}. Use mixed_bfloat16 or float32, "
            f"which do not. Otherwise: {calm}. Weights are as they were before; checkpoints stay."
        )
    if sound:
        return (
            f"{what}: the data or the model gives something that is not finite; under XLA so "
            f"does a label outside the vocabulary. {calm}. Weights are as they were before the "
            "first of them; checkpoints stay."
        )
    return (
        f"{what}: the training has diverged. {calm}; under mixed_float16 use float32 or "
        "mixed_bfloat16. Checkpoints are from before and stay."
    )


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
