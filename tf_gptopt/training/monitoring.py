"""What TensorBoard shows of a training, in a `fit` of this package or of your own."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError, reason_of
from tf_gptopt._keras import keras
from tf_gptopt.training.callbacks import Progress
from tf_gptopt.training.flops import Utilisation
from tf_gptopt.training.precision import compute_dtype
from tf_gptopt.training.schedules import learning_rate_of


class Monitor(keras.callbacks.Callback):
    """Writes scalars for TensorBoard: loss, learning rate, tokens/s, utilisation and more.

    ```python
    model.fit(data, callbacks=[Monitor("logs", batch_shape=(8, 256))])
    ```

    and then `tensorboard --logdir logs`. The steps are the optimizer's updates, so a run that goes
    on draws on. Also written is what the optimizer knows: `loss_scale` under mixed_float16,
    `gradient_noise_scale` in batches where it is measured, `skipped_updates`. In a cluster the
    chief alone writes. (`fit` of this package does all that by `TrainConfig(tensorboard=True)`.)

    Args:
        log_dir: the folder; made if it is absent.
        batch_shape: sequences of a global batch and tokens of a sequence, which tokens/s and
            utilisation need; without it they are left out.
        every: batches between two points.

    Raises:
        UserError: when the folder cannot be written.
    """

    _supports_tf_logs = True  # leave the loss on the device

    def __init__(
        self,
        log_dir: str | os.PathLike,
        batch_shape: tuple[int, int] | None = None,
        every: int = 10,
    ) -> None:
        super().__init__()
        self.log_dir, self.batch_shape, self.every = Path(log_dir), batch_shape, every
        self._writer: Any = None
        self._utilisation: Utilisation | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        if self.batch_shape and self._utilisation is None:
            dtype = compute_dtype(self.model)
            self._utilisation = Utilisation(self.model, self.batch_shape[1], dtype)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._since: tuple[int, float] | None = None  # the first step of a run compiles

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now, before = time.perf_counter(), self._since
        if before is None:
            self._since = batch, now
        elif (batch + 1) // self.every > (before[0] + 1) // self.every:
            self._since = batch, now
            scalars = {"loss": float(logs["loss"])}
            if self._utilisation is not None:
                tokens = (batch - before[0]) * math.prod(self.batch_shape)
                scalars["tokens_per_second"] = tokens / (now - before[1])
                scalars["mfu"] = self._utilisation(scalars["tokens_per_second"])
            self.write(int(self.model.optimizer.iterations.numpy()), scalars)

    def on_train_end(self, logs: Any = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def follow(
        self, model: keras.Model, on_progress: Callable[[Progress], Any]
    ) -> Callable[[Progress], Any]:
        """`on_progress`, which also writes the report of this package's `fit`."""
        self.set_model(model)

        def both(report: Progress) -> None:
            on_progress(report)
            scalars = {"loss": report.loss, "tokens_per_second": report.tokens_per_second}
            if report.mfu is not None:
                scalars["mfu"] = report.mfu
            self.write(report.step, scalars)

        return both

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write `scalars` and the optimizer's own at `step`; those that are not finite are not."""
        if not self.model.distribute_strategy.extended.should_save_summary:
            return
        if self._writer is None:
            try:
                self.log_dir.mkdir(parents=True, exist_ok=True)
                self._writer = tf.summary.create_file_writer(str(self.log_dir))
            except (OSError, tf.errors.OpError) as error:
                raise UserError(
                    f"The folder {self.log_dir} for TensorBoard cannot be written "
                    f"({reason_of(error)}). Choose another one or mend its permissions."
                ) from None
        with self._writer.as_default():
            for name, value in {**scalars, **optimizer_scalars(self.model.optimizer)}.items():
                if math.isfinite(value):
                    tf.summary.write(name, tf.constant(value, tf.float32), step, _scalar())
        self._writer.flush()


def _scalar() -> Any:
    """Tells TensorBoard to draw a curve; `tf.summary.scalar` would need TensorBoard to be there."""
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = "scalars"
    return metadata


def optimizer_scalars(optimizer: Any) -> dict[str, float]:
    """What the optimizer says of its last update: its learning rate, and more if it knows more."""
    scalars = {"learning_rate": learning_rate_of(optimizer)}
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if inner is not optimizer:
        scalars["loss_scale"] = float(tf.convert_to_tensor(optimizer.loss_scale))
    if getattr(inner, "measure_noise", False):
        scalars["gradient_noise_scale"] = float(tf.convert_to_tensor(inner.noise_scale))
    if hasattr(inner, "skipped"):
        scalars["skipped_updates"] = float(tf.convert_to_tensor(inner.skipped))
    return scalars
