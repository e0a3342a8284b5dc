"""The pruning wrapper: tfmot's, with masks that hold after every update.

The life of a mask: `prune` wraps the chosen Dense layers of a copy, and what is zero already is
masked from the start. After every optimizer update Keras applies a variable's *constraint*. The
wrapper is that constraint: it counts the step, shrinks the mask when the schedule says so, and
multiplies. `strip_pruning` copies the masked weights into a plain model.

So weights are sparse whenever anyone looks: in a checkpoint, a `.keras` file or in the middle of an
epoch, with any Keras optimizer, training loop or strategy. (tfmot alone masks in the forward pass,
with a merge across replicas in every layer, and leaves weights dense between two passes.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._keras import keras, tfmot
from tf_gptopt.compression.pruning.masks import choose
from tf_gptopt.compression.pruning.schedules import (
    AdaptiveSparsity,
    final_sparsity,
    read_schedule,
)
from tf_gptopt.compression.pruning.scores import importance_shape, random_numbers, score_weights
from tf_gptopt.models.layers import register

with tfmot.sparsity.keras.prune_scope():  # tfmot names its wrapper for deserializing only
    TfmotPruneLowMagnitude = keras.utils.get_registered_object("PruneLowMagnitude")


@register
class PruneLowMagnitude(TfmotPruneLowMagnitude):
    """tfmot's pruning wrapper for one Dense layer, working after the update instead of before.

    Variables, names, schedules and saved form are tfmot's. Different are *when* and *where*: the
    mask is updated and applied as the kernel's constraint, on each replica alone (equal weights
    give equal masks) and outside any layer call, where mixed precision casts nothing. The forward
    pass is the wrapped layer's own. And masks are exact: never a weight more or less for equal
    scores or for a schedule whose end its frequency does not hit, never one back to life.

    Args:
        layer: the Dense layer.
        pruning_schedule: tfmot's, or `AdaptiveSparsity`.
        score, pattern, scope, seed, refresh: as in `PruneConfig`.

    Attributes:
        importance: the variable that the score multiplies; None where it is 1.
        shares: for the global scope, `[c, c_k, f, f_k]` float64: when all kernels together go from
            a fraction c to f of zeros, this one goes from c_k to f_k. None elsewhere.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        pruning_schedule: Any,
        score: str = "magnitude",
        pattern: str = "unstructured",
        scope: str = "layer",
        seed: int = 0,
        refresh: int = 100,
        **kwargs: Any,
    ) -> None:
        layer.get_prunable_weights = lambda: [layer.kernel]  # tfmot knows Dense itself alone
        super().__init__(layer, pruning_schedule, **kwargs)
        self.score, self.pattern, self.scope = score, pattern, scope
        self.seed, self.refresh = seed, refresh
        self.importance = self.shares = None

    def build(self, input_shape: Any) -> None:
        self.layer.kernel_constraint = self._after_update
        super().build(input_shape)
        self.layer.kernel_constraint = None  # the variable has it; the layer's config must not
        extra = {"trainable": False, "experimental_autocast": False, "initializer": "ones"}
        shape = importance_shape(self.score, self.layer.kernel.shape)
        if shape is not None:
            self.importance = self.add_weight("importance", shape, tf.float32, **extra)
        if self.scope == "global":
            self.shares = self.add_weight("shares", (4,), tf.float64, **extra)

    def add_weight(self, *args: Any, **kwargs: Any) -> tf.Variable:
        """As tfmot's, but each replica writes its own mask, where tfmot would average them."""
        kwargs.pop("aggregation", None)
        return super().add_weight(*args, **kwargs)

    def call(self, inputs: tf.Tensor, training: bool | None = None, **kwargs: Any) -> tf.Tensor:
        return self.layer(inputs, **kwargs)

    def _after_update(self, kernel: tf.Variable) -> tf.Tensor:
        """The kernel's constraint: what an optimizer's update is projected to."""
        step = self.pruning_step.assign_add(1)
        _, mask, _ = self.pruning_vars[0]
        mask_now = tf.cond(
            self._due(step),
            lambda: self._shrink_mask(kernel * mask, self._fraction(step)),
            lambda: tf.convert_to_tensor(mask),
        )
        return kernel * mask_now

    def _due(self, step: tf.Tensor) -> tf.Tensor:
        due, _ = self.pruning_schedule(step)
        if isinstance(self.pruning_schedule, AdaptiveSparsity):
            return due
        return due | (step == self.pruning_schedule.end_step)

    def _fraction(self, step: tf.Tensor) -> tf.Tensor:
        """What the schedule asks for, float64: at its end exactly the fraction in the config."""
        _, fraction = self.pruning_schedule(step)
        at_end = fraction >= tf.constant(self.target_sparsity, tf.float32)
        return tf.where(
            at_end,
            tf.constant(self.target_sparsity, tf.float64),
            tf.cast(fraction, tf.float64),
        )

    def _shrink_mask(self, kernel: tf.Tensor, fraction: tf.Tensor) -> tf.Tensor:
        _, mask, threshold = self.pruning_vars[0]
        if self.shares is not None:
            c, own_c, f, own_f = tf.unstack(tf.convert_to_tensor(self.shares))
            fraction = own_c + tf.math.divide_no_nan((fraction - c) * (own_f - own_c), f - c)
        scores = score_weights(kernel, self.score, self.importance)
        kept = choose(scores, mask > 0.5, fraction, self.pattern, self.scope)
        threshold.assign(tf.reduce_min(tf.where(kept, scores, scores.dtype.max)))
        return mask.assign(tf.cast(kept, mask.dtype))

    def start(self) -> None:
        """Begin at step 0 from the weights there are: mask their zeros."""
        kernel, mask, _ = self.pruning_vars[0]
        values = kernel.numpy()
        if values.any():  # an all-zero kernel is an initial value, not a pruned one
            mask.assign((values != 0).astype(np.float32))
        self.pruning_step.assign(0)
        if self.score == "random":
            name, shape = self.layer.name, kernel.shape
            self.importance.assign(random_numbers(name, shape, self.seed))

    def prune_if_due(self) -> None:
        """Prune at step 0, if the schedule begins there; SparseGPT has done so already."""
        step = tf.zeros([], tf.int64)
        if self.score != "sparsegpt" and self._due(step):
            self.prune_to(self._fraction(step))

    def prune_to(self, fraction: float | tf.Tensor) -> None:
        """Prune now, outside of a step, to this fraction of zeros (of all kernels: see `shares`).

        Fewer zeros than there are bring no weight back.
        """
        kernel, mask, _ = self.pruning_vars[0]
        values = tf.convert_to_tensor(kernel.numpy() * mask.numpy())
        self._shrink_mask(values, tf.cast(fraction, tf.float64))
        kernel.assign(values * mask.numpy())

    def scores(self) -> np.ndarray:
        """What each weight is worth now, `(inputs, outputs)` float32."""
        values = tf.convert_to_tensor(self.layer.kernel.numpy() * self.mask_values())
        return score_weights(values, self.score, self.importance).numpy()

    def mask_values(self) -> np.ndarray:
        """The mask, 0.0 or 1.0, in the kernel's shape."""
        return self.pruning_vars[0][1].numpy()

    @property
    def steps_done(self) -> int:
        """Optimizer updates since `prune`."""
        return int(self.pruning_step.numpy())

    @property
    def target_sparsity(self) -> float:
        """The fraction of zeros at the schedule's end (of blocks, where blocks are pruned)."""
        return final_sparsity(self.pruning_schedule)

    def get_config(self) -> dict[str, Any]:
        own = ("score", "pattern", "scope", "seed", "refresh")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PruneLowMagnitude:
        config = dict(config)
        config["pruning_schedule"] = read_schedule(config["pruning_schedule"])
        config["layer"] = keras.layers.deserialize(config["layer"])
        return cls(**config)


def masked_share(layers: Sequence[PruneLowMagnitude]) -> float:
    """Fraction of zeros in the masks of all `layers` together."""
    masks = [layer.mask_values() for layer in layers]
    return 1.0 - sum(int(np.count_nonzero(mask)) for mask in masks) / sum(m.size for m in masks)


def wrappers(model: keras.Model) -> list[PruneLowMagnitude]:
    """The pruning wrappers of `model`, in the order of its layers."""
    return [layer for layer in model.layers if isinstance(layer, PruneLowMagnitude)]
