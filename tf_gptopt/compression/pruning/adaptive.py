"""Adaptive sparsity: it rises while the validation loss stays within a tolerance.

After every `frequency` steps the validation loss judges the last rise. Within the tolerance, the
weights and masks become the last good state and sparsity rises by `increment`. Beyond it, the last
good state comes back and the next rise, from there, is half as large. Pruning stops at `sparsity`,
at `end_step`, or when rises have become an eighth of the first; the masks then stand still.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from tf_gptopt._keras import keras
from tf_gptopt.compression.pruning.allocation import allocate
from tf_gptopt.compression.pruning.validation import ValidationLoss
from tf_gptopt.compression.pruning.wrapper import masked_share, wrappers
from tf_gptopt.compression.saved_state import SavedState
from tf_gptopt.models.gpt import GPTModel

_SMALLEST = 1 / 8  # of the first increment


@dataclasses.dataclass(eq=False)
class AdaptiveState(SavedState):
    """Where adaptive pruning stands; an attribute of the model, so checkpoints hold it.

    Attributes:
        baseline: validation loss before the first rise, in nats a token; None before that.
        good, good_loss: sparsity and loss of the last state within the tolerance.
        tried: sparsity that is being tried.
        increment: of the next rise.
        done: whether pruning has stopped.
        history: `[step, sparsity, loss, kept]` of every judgement.
        weights: of the last good state, in the order of `AdaptivePruning`'s variables.
    """

    baseline: float | None = None
    good: float = 0.0
    good_loss: float = 0.0
    tried: float = 0.0
    increment: float = 0.0
    done: bool = False
    history: list = dataclasses.field(default_factory=list)
    weights: list = dataclasses.field(default_factory=list)


class AdaptivePruning(keras.callbacks.Callback):
    """Raises the sparsity of a pruned model, and lowers it again, as its validation loss says.

    Every epoch's logs get `adaptive_loss`, the last validation loss, and `adaptive_sparsity`, the
    last good sparsity; a line on stderr says where it stopped, and why.

    Args:
        pruned: made by `prune` with `schedule="adaptive"`.
        validation: a pair `(inputs, labels)`, token ids, or batches of either, read once; a
            `TokenDataset` gives its "valid" split. See `ValidationLoss`.
    """

    def __init__(self, pruned: GPTModel, validation: Any) -> None:
        super().__init__()
        self.pruned, self.layers = pruned, wrappers(pruned)
        self.schedule = self.layers[0].pruning_schedule
        if getattr(pruned, "pruning_state", None) is None:  # a loaded one begins anew
            pruned.pruning_state = AdaptiveState()
        self.state: AdaptiveState = pruned.pruning_state
        self.validation_loss = ValidationLoss(pruned, validation)
        masks = [layer.pruning_vars[0][1] for layer in self.layers]
        self.variables = [*pruned.trainable_weights, *masks]

    @property
    def stopped_at(self) -> float | None:
        """The sparsity at which pruning stopped; None while it goes on."""
        return self.state.good if self.state.done else None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all pruned kernels now."""
        return masked_share(self.layers)

    def on_train_begin(self, logs: Any = None) -> None:
        self._seen = self.layers[0].steps_done
        if self._seen == 0 and self.state.baseline is None and self.schedule.decides_at(0):
            self._judge(0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        seen, self._seen = self._seen, self.layers[0].steps_done
        if any(self.schedule.decides_at(step) for step in range(seen + 1, self._seen + 1)):
            self._judge(self._seen)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None and self.state.history:
            logs["adaptive_loss"] = self.state.history[-1][2]
            logs["adaptive_sparsity"] = self.state.good

    def _judge(self, step: int) -> None:
        state, schedule = self.state, self.schedule
        if state.done:
            return
        loss = self.validation_loss()
        if state.baseline is None:
            state.baseline, state.increment = loss, schedule.increment
            state.good = state.tried = self.sparsity
        limit = state.baseline * (1.0 + schedule.tolerance)
        kept = loss <= limit
        state.history.append([step, state.tried, loss, kept])
        if kept:
            state.good, state.good_loss = state.tried, loss
            state.weights = [variable.numpy() for variable in self.variables]
        else:
            for variable, value in zip(self.variables, state.weights, strict=True):
                variable.assign(value)
            state.increment /= 2
        reason = self._reason_to_stop(step)
        if reason:
            state.done, state.weights = True, []
            self._say(f"Pruning stopped at {state.good:.1%} zeros after step {step}: {reason}.")
            return
        least = schedule.initial_sparsity if state.good < schedule.initial_sparsity else 0.0
        state.tried = min(max(state.good + state.increment, least), schedule.final_sparsity)
        if self.layers[0].scope == "global":
            allocate(self.layers, state.tried)
        for layer in self.layers:
            layer.prune_to(state.tried)

    def _reason_to_stop(self, step: int) -> str:
        state, schedule = self.state, self.schedule
        within = (
            f"validation loss {state.good_loss:.4f} is within {schedule.tolerance:.1%} of "
            f"{state.baseline:.4f}"
        )
        if state.good >= schedule.final_sparsity:
            return f"{within}, and that is what was asked for"
        if step >= schedule.end_step:
            return f"{within}, and end_step is reached"
        if state.increment < schedule.increment * _SMALLEST:
            _, tried, loss, _ = state.history[-1]
            return f"{within}, and {tried:.1%} was too much ({loss:.4f})"
        return ""

    def _say(self, line: str) -> None:
        if self.pruned.distribute_strategy.extended.should_save_summary:  # the chief
            print(line, file=sys.stderr, flush=True)
