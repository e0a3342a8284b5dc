"""When how much is pruned: tfmot's schedules, and one that listens to the validation loss."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._keras import tfmot
from tf_gptopt.compression.pruning.config import PruneConfig


class AdaptiveSparsity(tfmot.sparsity.keras.PruningSchedule):
    """No fraction is known beforehand: `adaptive.py` sets it between steps, and no step is due.

    It carries the numbers that the callback needs, so that they are saved with the wrapper.
    """

    def __init__(
        self,
        final_sparsity: float,
        initial_sparsity: float,
        begin_step: int,
        end_step: int,
        frequency: int,
        increment: float,
        tolerance: float,
    ) -> None:
        self.final_sparsity = final_sparsity
        self.initial_sparsity = initial_sparsity
        self.begin_step = begin_step
        self.end_step = end_step
        self.frequency = frequency
        self.increment = increment
        self.tolerance = tolerance

    def __call__(self, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.zeros_like(step, tf.bool), tf.constant(0.0)

    def decides_at(self, step: int) -> bool:
        """Whether the validation loss is asked after this step."""
        if not self.begin_step <= step <= self.end_step:
            return False
        return (step - self.begin_step) % self.frequency == 0 or step == self.end_step

    def get_config(self) -> dict[str, Any]:
        return {"class_name": type(self).__name__, "config": dict(vars(self))}


def make_schedule(config: PruneConfig) -> Any:
    """tfmot's schedule object for a `PruneConfig`."""
    steps = {"begin_step": config.begin_step, "frequency": config.frequency}
    if config.schedule == "constant":  # once: later updates of an exact mask change nothing
        steps["end_step"] = config.begin_step
        return tfmot.sparsity.keras.ConstantSparsity(config.sparsity, **steps)
    steps["end_step"] = config.end_step
    if config.schedule == "adaptive":
        return AdaptiveSparsity(
            config.sparsity,
            config.initial_sparsity,
            increment=config.increment,
            tolerance=config.tolerance,
            **steps,
        )
    power = 3.0 if config.schedule == "cubic" else config.power
    return tfmot.sparsity.keras.PolynomialDecay(
        config.initial_sparsity, config.sparsity, power=power, **steps
    )


def final_sparsity(schedule: Any) -> float:
    """The fraction of zeros at the end of a schedule, tfmot's or ours."""
    return getattr(schedule, "final_sparsity", getattr(schedule, "target_sparsity", 0.0))


def read_schedule(config: dict[str, Any]) -> Any:
    """The schedule that `get_config` described."""
    name = config["class_name"]
    ours = name == AdaptiveSparsity.__name__
    known = AdaptiveSparsity if ours else getattr(tfmot.sparsity.keras, name)
    return known(**config["config"])
