"""AdamW as GPTs are trained with it: decay on matrices only, clipped gradients, a warm-up."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras
from tf_gptopt.models.layers import register
from tf_gptopt.training.accumulation import AccumulatingOptimizer
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.schedules import schedule_for


@register
class AdamW(AccumulatingOptimizer, keras.optimizers.AdamW):
    """Keras's AdamW (Loshchilov & Hutter 2019), but only matrices decay, and the update is fused.

    Biases and the scales of norms have one axis and do not decay; token and position tables do.
    Moments and weights change in place in one pass (`ResourceApplyAdam`) instead of a dozen, which
    halves the cost of an update on a CPU. Works under every strategy that Keras's own does.

    It accumulates gradients over microbatches, skips updates that are not finite and measures the
    gradient noise scale: see `AccumulatingOptimizer` for these arguments and attributes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["jit_compile"] = False  # nothing is left to fuse
        super().__init__(*args, **kwargs)

    def _apply_weight_decay(self, variables: Any) -> None:
        pass  # `update_step` does it

    def _use_weight_decay(self, variable: tf.Variable) -> bool:
        return len(variable.shape) > 1 and super()._use_weight_decay(variable)

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
        index = self._index_of(variable)
        m, v = self._momentums[index], self._velocities[index]
        dtype = variable.dtype
        learning_rate = tf.cast(self.learning_rate, dtype)
        step = tf.cast(self.iterations + 1, dtype)
        beta_1, beta_2 = tf.constant(self.beta_1, dtype), tf.constant(self.beta_2, dtype)
        if self.weight_decay and self._use_weight_decay(variable):
            tf.raw_ops.ResourceApplyGradientDescent(  # weight -= (rate * decay) * weight
                var=variable.handle,
                alpha=learning_rate * tf.cast(self.weight_decay, dtype),
                delta=variable.value(),
            )
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=m.handle,
            v=v.handle,
            beta1_power=tf.pow(beta_1, step),
            beta2_power=tf.pow(beta_2, step),
            lr=learning_rate,
            beta1=beta_1,
            beta2=beta_2,
            epsilon=tf.constant(self.epsilon, dtype),
            grad=tf.convert_to_tensor(gradient),
        )


def adamw(
    steps: int,
    learning_rate: float = 1e-3,
    *,
    warmup_steps: int | None = None,
    schedule: str = "cosine",
    final_learning_rate: float = 0.1,
    weight_decay: float = 0.1,
    beta_1: float = 0.9,
    beta_2: float = 0.95,
    epsilon: float = 1e-8,
    clip_norm: float | None = 1.0,
    decay_fraction: float = 0.2,
    plateau_patience: int = 100,
    accumulate: int = 1,
    max_accumulate: int | None = None,
    measure_noise: bool = False,
) -> AdamW:
    """The optimizer for a run of `steps` updates; make it inside the strategy's scope.

    ```python
    model.compile(adamw(steps=2000), loss=NextTokenLoss())
    model.compile(adamw(steps=500, accumulate=4), loss=NextTokenLoss())   # 2000 steps of `fit`
    ```

    Keras's `LearningRateScheduler` and `ReduceLROnPlateau` set the rate of an optimizer without a
    schedule: `schedule="constant", warmup_steps=0`.

    Args: as `TrainConfig`; `epsilon` is added to the root of the mean squared gradient. The last
        three are of `AccumulatingOptimizer`: `accumulate` steps of `fit` are one update.

    Raises:
        UserError: when a number is out of its range.
    """
    config = TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        schedule=schedule,
        final_learning_rate=final_learning_rate,
        weight_decay=weight_decay,
        beta_1=beta_1,
        beta_2=beta_2,
        clip_norm=clip_norm,
        decay_fraction=decay_fraction,
        plateau_patience=plateau_patience,
    )
    return _make(config, epsilon, accumulate, max_accumulate, measure_noise)


def optimizer_for(config: TrainConfig, epsilon: float = 1e-8) -> AdamW:
    """The optimizer that `config` describes."""
    measure = config.accumulate > 1 or config.max_batch_size is not None
    return _make(config, epsilon, config.accumulate, config.max_accumulate, measure)


def _make(
    config: TrainConfig,
    epsilon: float,
    accumulate: int,
    max_accumulate: int | None,
    measure_noise: bool,
) -> AdamW:
    # one rate for all updates is a number, which Keras's callbacks can set
    is_number = config.schedule == "constant" and config.warmup == 0
    return AdamW(
        config.learning_rate if is_number else schedule_for(config),
        weight_decay=config.weight_decay,
        beta_1=config.beta_1,
        beta_2=config.beta_2,
        epsilon=epsilon,
        global_clipnorm=config.clip_norm,
        accumulate=accumulate,
        max_accumulate=max_accumulate,
        measure_noise=measure_noise,
    )
