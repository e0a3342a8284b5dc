"""Learning rates over a run: a warm-up, then cosine, linear, constant, wsd or plateau."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._keras import keras
from tf_gptopt.models.layers import register
from tf_gptopt.training.config import SCHEDULES, TrainConfig


@register
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Update `i` (from 0) of `steps` has the learning rate

    - `peak * (i + 1) / (warmup_steps + 1)` while `i < warmup_steps`, then
    - `peak` ("constant"), or what falls from `peak` to `final * peak` at the last update and stays
      there, along a half cosine (Loshchilov & Hutter 2017, arXiv:1608.03983) or a line, or
    - "wsd", warm-up, stable, decay (Hu et al. 2024, "MiniCPM", arXiv:2404.06395): `peak` up to
      update `decay_start`, from where it falls as 1 - sqrt of the way to the end, the best of the
      shapes that Hägele et al. 2024 (arXiv:2405.18392) compared. Up to `decay_start` nothing
      depends on `steps`, so a run that stopped there can be given more of them.

    Args:
        peak: the largest learning rate.
        steps: updates of the run.
        warmup_steps: updates before the peak.
        kind: "cosine", "linear", "constant" or "wsd".
        final: the last learning rate as a fraction of `peak`.
        decay_fraction: how many of the `steps` the decay of "wsd" takes, in (0, 1].

    Raises:
        UserError: for an unknown kind, and for "plateau", which is `PlateauSchedule`.
    """

    def __init__(
        self,
        peak: float,
        steps: int,
        warmup_steps: int = 0,
        kind: str = "cosine",
        final: float = 0.1,
        decay_fraction: float = 0.2,
    ) -> None:
        if kind not in SCHEDULES:
            raise UserError(f"Unknown schedule {kind!r}.{suggest(str(kind), SCHEDULES)}")
        if kind == "plateau":
            raise UserError("The schedule 'plateau' follows the loss: make a PlateauSchedule.")
        self.peak, self.steps, self.warmup_steps = peak, steps, warmup_steps
        self.kind, self.final, self.decay_fraction = kind, final, decay_fraction

    @property
    def decay_start(self) -> int:
        """The first update whose learning rate depends on `steps`."""
        if self.kind == "constant":
            return self.steps
        if self.kind == "wsd":
            return max(self.warmup_steps, self.steps - round(self.decay_fraction * self.steps))
        return self.warmup_steps

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        rising = (step + 1.0) / (self.warmup_steps + 1.0)
        span = max(1, self.steps - 1 - self.decay_start)
        done = tf.clip_by_value((step - self.decay_start) / span, 0.0, 1.0)
        if self.kind == "constant":
            left = tf.ones_like(done)
        elif self.kind == "linear":
            left = 1.0 - done
        elif self.kind == "wsd":
            left = 1.0 - tf.sqrt(done)
        else:
            left = 0.5 * (1.0 + tf.cos(np.pi * done))
        falling = self.final + (1.0 - self.final) * left
        return self.peak * tf.where(step < self.warmup_steps, rising, falling)

    def get_config(self) -> dict[str, Any]:
        return {
            "peak": self.peak,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "kind": self.kind,
            "final": self.final,
            "decay_fraction": self.decay_fraction,
        }


@register
class PlateauSchedule(
    keras.optimizers.schedules.LearningRateSchedule, tf.__internal__.tracking.AutoTrackable
):
    """A warm-up, then `peak` times a `scale`, which is cut when the loss stops improving.

    `fit` of this package tells it the loss of every step. In a `fit` of your own a callback does,
    the training loss or a validation loss:

    ```python
    model.compile(adamw(steps=2000, schedule="plateau"), loss=NextTokenLoss())
    model.fit(data, callbacks=[Plateau()])
    ```

    (Keras's `ReduceLROnPlateau` sets a number, and does nothing to an optimizer with a schedule.)
    All that it remembers are variables, tracked by the optimizer that has the schedule: a
    `tf.train.Checkpoint` of the optimizer holds them. Make it in the strategy's scope.

    Args:
        peak: the largest learning rate.
        warmup_steps: updates before the peak.
        patience: losses without a new best after which the rate is cut.
        factor: what it is multiplied with, in (0, 1).
        final: the least scale.
        memory: share of the old value in the smoothed loss when a new one comes; 0 for a validation
            loss, which needs no smoothing. Until it has settled there is no best loss: the first
            steps' may be low by chance.
        min_improvement: by which fraction a loss must be lower to be a new best.
        scale: where the scale starts.

    Raises:
        UserError: when a number is out of its range.
    """

    def __init__(
        self,
        peak: float,
        warmup_steps: int = 0,
        patience: int = 100,
        factor: float = 0.5,
        final: float = 0.1,
        memory: float = 0.98,
        min_improvement: float = 1e-3,
        scale: float = 1.0,
    ) -> None:
        if not (patience >= 1 and 0 < factor < 1 and 0 <= memory < 1 and 0 <= final <= 1):
            raise UserError(
                "A plateau needs patience >= 1, 0 < factor < 1, 0 <= memory < 1 and 0 <= final <= "
                f"1. Received: patience={patience}, factor={factor}, memory={memory}, "
                f"final={final}."
            )
        self.peak, self.warmup_steps, self.patience = peak, warmup_steps, patience
        self.factor, self.final, self.memory = factor, final, memory
        self.min_improvement = min_improvement
        self.scale = _variable(scale, "scale")
        self.smooth = _variable(0.0, "smooth")  # of the losses, and
        self.weight = _variable(0.0, "weight")  # of those that it has seen: the mean is the ratio
        self.best = _variable(math.inf, "best")
        self.waited = _variable(0.0, "waited")  # losses since the best one or the last cut

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        rising = (tf.cast(step, tf.float32) + 1.0) / (self.warmup_steps + 1.0)
        return self.peak * tf.minimum(rising, 1.0) * self.scale

    def observe(self, loss: tf.Tensor, updates: int = 1) -> None:
        """Let a loss count, and cut the scale if it is due; nothing is fetched from the device.

        Args:
            loss: scalar. One that is not finite is left out.
            updates: of the optimizer that it is the mean of.
        """
        self._observe(tf.cast(loss, tf.float32), tf.constant(float(updates)))

    @tf.function
    def _observe(self, loss: tf.Tensor, updates: tf.Tensor) -> None:
        counts = tf.math.is_finite(loss)
        keep = tf.where(counts, self.memory**updates, 1.0)
        loss = tf.where(counts, loss, 0.0)
        weight = keep * self.weight + (1.0 - keep)
        smooth = keep * self.smooth + (1.0 - keep) * loss
        mean = tf.math.divide_no_nan(smooth, weight)
        counts &= weight >= 0.5
        improved = counts & (mean < self.best * (1.0 - self.min_improvement))
        waited = tf.where(improved, 0.0, self.waited + tf.where(counts, updates, 0.0))
        cut = waited >= self.patience
        scale = tf.where(cut, self.scale * self.factor, self.scale)
        self.smooth.assign(smooth)
        self.weight.assign(weight)
        self.best.assign(tf.where(improved, mean, self.best))
        self.waited.assign(tf.where(cut, 0.0, waited))
        self.scale.assign(tf.maximum(scale, self.final))

    def get_config(self) -> dict[str, Any]:
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "patience": self.patience,
            "factor": self.factor,
            "final": self.final,
            "memory": self.memory,
            "min_improvement": self.min_improvement,
            "scale": float(self.scale.numpy()),  # a .keras file goes on with the rate that it had
        }


class Plateau(keras.callbacks.Callback):
    """Tells the `PlateauSchedule` of a model's optimizer the loss, in a `fit` of your own.

    Args:
        monitor: "loss" is told at every step; anything else in an epoch's logs, such as "val_loss",
            at the end of each epoch: then patience counts epochs, and memory should be 0.

    Raises:
        UserError: when the optimizer has no `PlateauSchedule`, or an epoch has no `monitor`.
    """

    _supports_tf_logs = True  # leave the loss on the device

    def __init__(self, monitor: str = "loss") -> None:
        super().__init__()
        self.monitor = monitor

    def on_train_begin(self, logs: Any = None) -> None:
        self._schedule = schedule_of(self.model.optimizer)
        if not isinstance(self._schedule, PlateauSchedule):
            raise UserError(
                "Plateau needs an optimizer whose learning rate is a PlateauSchedule: "
                "adamw(steps=..., schedule='plateau'), or any other with "
                "learning_rate=PlateauSchedule(...)."
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._batches, self._sum = 0, tf.zeros([], tf.float64)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.monitor != "loss":
            return
        # Keras tells the mean since the epoch began; with steps_per_execution batch leaps
        batches, updates = batch + 1, batch + 1 - self._batches
        total = tf.cast(logs["loss"], tf.float64) * batches
        self._schedule.observe((total - self._sum) / updates, updates)
        self._batches, self._sum = batches, total

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.monitor == "loss":
            return
        if self.monitor not in (logs or {}):
            raise UserError(
                f"Plateau watches {self.monitor!r} and the epoch has {', '.join(logs or {})}. For "
                "'val_loss' give fit validation_data."
            )
        self._schedule.observe(logs[self.monitor])


def schedule_for(config: TrainConfig) -> keras.optimizers.schedules.LearningRateSchedule:
    """The learning rate that `config` describes."""
    if config.schedule == "plateau":
        return PlateauSchedule(
            config.learning_rate,
            config.warmup,
            config.plateau_patience,
            final=config.final_learning_rate,
        )
    return WarmupSchedule(
        config.learning_rate,
        config.steps,
        config.warmup,
        config.schedule,
        config.final_learning_rate,
        config.decay_fraction,
    )


def schedule_of(optimizer: Any) -> Any:
    """The schedule of an optimizer, through a loss-scaling one around it; None without one."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    rate = getattr(inner, "_learning_rate", None)
    is_schedule = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
    return rate if is_schedule else None


def learning_rate_of(optimizer: Any) -> float:
    """What the last update was made with."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    rate = inner.learning_rate
    rate = rate(inner.iterations) if callable(rate) else rate  # a legacy one's schedule
    return float(tf.convert_to_tensor(rate))  # replicas hold a copy each


def _variable(value: float, name: str) -> tf.Variable:
    every_replica_alike = tf.VariableAggregation.ONLY_FIRST_REPLICA
    return tf.Variable(
        value, trainable=False, dtype=tf.float32, name=name, aggregation=every_replica_alike
    )
