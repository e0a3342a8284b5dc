"""The gradient noise scale: how large a batch still pays.

The gradient of a batch is the true one, G, plus noise of covariance Sigma / batch size. Where the
batch is far below `tr(Sigma) / |G|^2`, twice the batch is worth two updates; far above, almost
nothing. The scale grows while the loss falls, so a run may begin with small batches and end with
large ones. McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162.

This is arithmetic of a few scalars; `AccumulatingOptimizer` measures and keeps them.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras

DECAY = 0.95  # of both averages, per update: about the last twenty count
GROW_EVERY = 20  # updates between two decisions


def estimate(
    small: tf.Tensor, big: tf.Tensor, small_size: tf.Tensor, big_size: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Unbiased estimates of `(|G|^2, tr(Sigma))`, appendix A.1 of the paper.

    Each may be negative by chance, so average many of each before dividing one by the other.

    Args:
        small: squared norm of a small batch's gradient, averaged over the parts of a large one.
        big: squared norm of the gradient of the large batch.
        small_size, big_size: the batches' sizes, in any unit; tr(Sigma) comes out in the same.
    """
    signal = (big_size * big - small_size * small) / (big_size - small_size)
    noise = (small - big) / (1.0 / small_size - 1.0 / big_size)
    return signal, noise


def ratio(signal: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
    """tr(Sigma) / |G|^2; infinite where no gradient is seen for the noise, NaN before any
    measurement."""
    drowned = tf.where(noise > 0, float("inf"), float("nan"))
    return tf.where(signal > 0, tf.maximum(noise, 0.0) / tf.where(signal > 0, signal, 1.0), drowned)


def grown(size: tf.Tensor, most: int, scale: tf.Tensor) -> tf.Tensor:
    """The size to go on with: doubled if it stays below `scale`, the noise scale in the same unit,
    and does not exceed `most`."""
    double = 2 * size
    fits = (double <= most) & (tf.cast(double, scale.dtype) <= scale)  # NaN is never larger
    return tf.where(fits, double, size)


class GradientNoiseScale(keras.callbacks.Callback):
    """Adds `gradient_noise_scale` and `update_size`, both in sequences, to the logs of each epoch.

    ```python
    optimizer = adamw(steps=2000, accumulate=2, max_accumulate=16)
    model.compile(optimizer, loss=NextTokenLoss())
    model.fit(dataset.batch(8), callbacks=[GradientNoiseScale(batch_size=8)])
    ```

    Put it before the callbacks that shall see them (TensorBoard, CSVLogger); `history` holds what
    was seen, a tuple `(update, noise scale, sequences an update)` whenever an update has changed
    its size and at each epoch's end.

    Args:
        batch_size: sequences of a batch that `fit` is given, all replicas together.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.history: list[tuple[int, float, int]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self._optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if not getattr(self._optimizer, "measure_noise", False):
            raise UserError(
                "The optimizer does not measure the gradient noise scale. Compile the model with "
                "adamw(steps, accumulate=2, measure_noise=True), or with max_accumulate=... to let "
                "the batch grow as well."
            )
        self._seen = self._per_update()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._optimizer.max_accumulate > self._seen and self._per_update() != self._seen:
            self._seen = self._per_update()
            self._measure()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        _, scale, size = self._measure()
        if logs is not None:
            logs["gradient_noise_scale"], logs["update_size"] = scale, size

    def _measure(self) -> tuple[int, float, int]:
        self.history.append(
            (
                int(self._optimizer.iterations.numpy()),
                float(self._optimizer.noise_scale) * self.batch_size,
                self._per_update() * self.batch_size,
            )
        )
        return self.history[-1]

    def _per_update(self) -> int:
        return int(self._optimizer.microbatches_per_update.numpy())
