"""Learning rates over a training run: a linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._keras import keras
from tf_gptopt.models.layers import register
from tf_gptopt.training.config import SCHEDULES


@register
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Update `i` (from 0) of `steps` has the learning rate

    - `peak * (i + 1) / (warmup_steps + 1)` while `i < warmup_steps`, then
    - `peak` ("constant"), or what falls from `peak` to `final * peak` at the last update and stays
      there, along a half cosine (Loshchilov & Hutter 2017) or a line.

    Args:
        peak: the largest learning rate.
        steps: updates of the run.
        warmup_steps: updates before the peak.
        kind: "cosine", "linear" or "constant".
        final: the last learning rate as a fraction of `peak`.

    Raises:
        UserError: for an unknown kind.
    """

    def __init__(
        self,
        peak: float,
        steps: int,
        warmup_steps: int = 0,
        kind: str = "cosine",
        final: float = 0.1,
    ) -> None:
        if kind not in SCHEDULES:
            raise UserError(f"Unknown schedule {kind!r}.{suggest(str(kind), SCHEDULES)}")
        self.peak, self.steps, self.warmup_steps = peak, steps, warmup_steps
        self.kind, self.final = kind, final

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        rising = (step + 1.0) / (self.warmup_steps + 1.0)
        span = max(1, self.steps - 1 - self.warmup_steps)
        done = tf.clip_by_value((step - self.warmup_steps) / span, 0.0, 1.0)
        if self.kind == "constant":
            falling = tf.ones_like(done)
        elif self.kind == "linear":
            falling = 1.0 - (1.0 - self.final) * done
        else:
            falling = self.final + (1.0 - self.final) * 0.5 * (1.0 + tf.cos(np.pi * done))
        return self.peak * tf.where(step < self.warmup_steps, rising, falling)

    def get_config(self) -> dict[str, Any]:
        return {
            "peak": self.peak,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "kind": self.kind,
            "final": self.final,
        }
