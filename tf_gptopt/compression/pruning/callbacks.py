"""What `fit` calls for a pruned model: a watch, fresh importance, adaptive sparsity."""

from __future__ import annotations

from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras, tfmot
from tf_gptopt.compression.pruning.adaptive import AdaptivePruning
from tf_gptopt.compression.pruning.allocation import allocate
from tf_gptopt.compression.pruning.schedules import AdaptiveSparsity
from tf_gptopt.compression.pruning.scores import MEASURED, Measurement
from tf_gptopt.compression.pruning.wrapper import masked_share, wrappers
from tf_gptopt.models.gpt import GPTModel, require_gpt


def pruning_callbacks(model: GPTModel, validation: Any = None) -> list[keras.callbacks.Callback]:
    """What `fit` needs for a pruned model: tfmot's `UpdatePruningStep`, and what its schedule asks.

    A watch adds `sparsity` to every epoch's logs, and raises when an epoch has passed without one
    pruning step, as under an optimizer that ignores variable constraints. For the scores gradient,
    taylor and wanda, and for the global scope, `PruningRefresh` measures again while sparsity
    rises. For the adaptive schedule, `AdaptivePruning` comes last.

    Masks are exact without these callbacks as well; importance and shares are then those that
    `prune` has measured, and adaptive prunes nothing.

    Args:
        model: made by `prune`; in a `Distiller`, its student.
        validation: for the adaptive schedule, what its loss is measured on: a pair `(inputs,
            labels)`, token ids, or batches of either (a `TokenDataset` gives its "valid" split).

    Raises:
        UserError: when nothing in `model` is wrapped for pruning, or `validation` is missing.
    """
    layers = wrappers(require_gpt(model))
    if not layers:
        raise UserError(
            "The model is not wrapped for pruning, so there is nothing to call back. "
            "Make one with prune(model, PruneConfig(...)) and train that."
        )
    callbacks = [tfmot.sparsity.keras.UpdatePruningStep(), PruningWatch(model)]
    if layers[0].score in MEASURED or layers[0].scope == "global":
        callbacks.append(PruningRefresh(model))
    if isinstance(layers[0].pruning_schedule, AdaptiveSparsity):
        if validation is None:
            raise UserError(
                "schedule='adaptive' follows the validation loss. Give pruning_callbacks(model, "
                "validation=...) token ids (examples, time), a tf.data.Dataset or a TokenDataset."
            )
        callbacks.append(AdaptivePruning(model, validation))
    return callbacks


class PruningWatch(keras.callbacks.Callback):
    """Reports `sparsity` after each epoch, and notices when pruning does not happen."""

    def __init__(self, pruned: GPTModel) -> None:
        super().__init__()
        self.layers = wrappers(pruned)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.steps_before = [layer.steps_done for layer in self.layers]

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        trained = any(layer.trainable for layer in self.layers)
        if trained and self.steps_before == [layer.steps_done for layer in self.layers]:
            raise UserError(
                "An epoch passed without a pruning step. Either every step was skipped because its "
                "gradients were not finite, or the optimizer ignores variable constraints: use one "
                "of tf_keras.optimizers."
            )
        if logs is not None:
            logs["sparsity"] = masked_share(self.layers)


class PruningRefresh(keras.callbacks.Callback):
    """Measures importance and shares again, every `refresh` steps while the schedule rises.

    A function of the step alone, so a resumed run measures where an undisturbed one does. A model
    that comes from a `.keras` file has no calibration text, and keeps the importance it has.
    """

    def __init__(self, pruned: GPTModel) -> None:
        super().__init__()
        self.layers = wrappers(pruned)
        ids = getattr(pruned, "calibration_ids", None)
        self.measure = Measurement(pruned, self.layers, ids) if ids is not None else None

    def on_train_begin(self, logs: Any = None) -> None:
        self._seen = self.layers[0].steps_done

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        first, seen = self.layers[0], self._seen
        self._seen, every = first.steps_done, first.refresh
        schedule = first.pruning_schedule
        rising = schedule.begin_step <= self._seen < schedule.end_step
        if not rising or self._seen // every == seen // every:
            return
        if self.measure:
            self.measure()
        if first.scope == "global":
            allocate(self.layers, first.target_sparsity)
