"""A batch in parts: the training loop's side of gradient accumulation."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.training.config import TrainConfig


def microbatches(batches: tf.data.Dataset, count: int) -> tf.data.Dataset:
    """Each batch as `count` batches `(inputs, labels)` of its rows, in their order.

    Args:
        batches: of `(inputs, labels)`, both `(batch, time)`; `batch` is a multiple of `count`.
            Inputs may be a dictionary of tensors, each beginning with these two axes.
        count: microbatches a batch.
    """

    def split(inputs: Any, labels: tf.Tensor) -> tuple[Any, ...]:
        rows = labels.shape[0] // count
        return tf.nest.map_structure(
            lambda x: tf.reshape(x, [count, rows, *x.shape[1:]]), (inputs, labels)
        )

    return batches.map(split).unbatch().prefetch(2)


class UpdateCount:
    """How many updates and batches the microbatches of one `fit` have made.

    Args:
        model: compiled; an optimizer without accumulation updates every time.
        accumulate: microbatches a batch.
    """

    def __init__(self, model: keras.Model, accumulate: int) -> None:
        self._optimizer = optimizer_of(model)
        self._accumulate = accumulate
        self._grows = getattr(self._optimizer, "max_accumulate", 1) > accumulate
        self._updates = self._batches = 0
        self._before = self._attempts() if self._grows else 0

    def after(self, microbatches: int) -> tuple[int, int]:
        """`(updates, batches)` after so many microbatches; batches count when they have updated.
        Waits for the device only where updates may grow."""
        updates = microbatches // self._accumulate
        if self._grows:
            updates = self._attempts() - self._before
        if updates > self._updates:
            self._updates, self._batches = updates, microbatches // self._accumulate
        return self._updates, self._batches

    def _attempts(self) -> int:
        done, skipped = self._optimizer.iterations, self._optimizer.skipped
        return int(done.numpy()) + int(skipped.numpy())


def optimizer_of(model: keras.Model) -> Any:
    """The optimizer, without a `LossScaleOptimizer` around it."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def update_size(model: keras.Model, config: TrainConfig) -> tuple[int, float | None]:
    """`(sequences of an update, gradient noise scale in sequences)`; None where it is not
    measured."""
    optimizer, microbatch = optimizer_of(model), config.batch_size // config.accumulate
    if not getattr(optimizer, "measure_noise", False):
        return config.batch_size, None
    size = int(optimizer.microbatches_per_update.numpy()) * microbatch
    return size, float(optimizer.noise_scale) * microbatch


def check_accumulation(model: keras.Model, config: TrainConfig) -> None:
    """Raise a `UserError` unless batch, replicas and a compiled optimizer fit `config`."""
    replicas = model.distribute_strategy.num_replicas_in_sync
    parts = config.accumulate * replicas
    if config.batch_size % parts:
        how = f"{replicas} replicas" if config.accumulate == 1 else f"{config.accumulate} "
        if config.accumulate > 1:
            how += f"microbatches on {replicas} replica" + "s" * (replicas > 1)
        raise UserError(
            f"The batch is divided among {how}. Received: batch_size={config.batch_size}. Take a "
            f"multiple of {parts}."
        )
    if config.max_batch_size is not None and parts == 1:
        raise UserError(
            "max_batch_size follows the gradient noise scale, which is measured by comparing parts "
            "of a batch, and this batch has one. Give accumulate=2, or leave max_batch_size out."
        )
    if not model._is_compiled:
        return
    optimizer = optimizer_of(model)
    made = getattr(optimizer, "accumulate", 1), getattr(optimizer, "max_accumulate", 1)
    if made != (config.accumulate, config.max_accumulate):
        raise UserError(
            f"The model is compiled with an optimizer of accumulate={made[0]} and max_accumulate="
            f"{made[1]}, and the configuration needs {config.accumulate} and "
            f"{config.max_accumulate}. Compile with adamw(steps, accumulate={config.accumulate}, "
            f"max_accumulate={config.max_accumulate}), or leave compile to fit."
        )
    if config.max_batch_size is not None and int(model._steps_per_execution.numpy()) > 1:
        raise UserError("With max_batch_size, compile without steps_per_execution.")
