"""Adaptive bits: layers go from 8 bits to 4 while the validation loss stays within a tolerance.

All layers begin with 8 bits. Every `frequency` steps the validation loss judges the last change.
Within the tolerance it stays, and the next group of layers gets 4 bits. Beyond it, the weights,
bits and ranges of the last good state come back, that group keeps 8 bits, and the next one is
tried. What comes out is a mixed scheme, each of whose layers has been trained with the bits it has.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.pruning.validation import ValidationLoss
from tf_gptopt.compression.quantization.aware_state import layer_bits, set_bits
from tf_gptopt.compression.quantization.bit_schedule import describe, matching_layers
from tf_gptopt.compression.saved_state import SavedState
from tf_gptopt.models.gpt import GPTModel

HIGH, LOW = 8, 4


@dataclasses.dataclass(eq=False)
class BitState(SavedState):
    """Where adaptive bits stand; an attribute of the model, so checkpoints hold it.

    Attributes:
        baseline: validation loss with 8 bits before the first change, in nats; None before that.
        tried: how many groups have been tried, or are being.
        done: whether there are no more.
        history: `[step, pattern, loss, kept]` of every judgement.
        weights: of the last good state, in the order of the model's.
    """

    baseline: float | None = None
    tried: int = 0
    done: bool = False
    history: list = dataclasses.field(default_factory=list)
    weights: list = dataclasses.field(default_factory=list)


class AdaptiveBits(keras.callbacks.Callback):
    """Gives groups of layers 4 bits one after the other, as far as the validation loss allows.

    ```python
    aware = quantize_aware(model, QuantConfig("int4"))
    aware.fit(data, callbacks=[AdaptiveBits(aware, dataset, tolerance=0.02, frequency=100)])
    export_tflite(aware, "model.tflite", final_config(aware))
    ```

    Every epoch's logs get `validation_loss_of_bits`, the last loss that was judged; a line on
    stderr says where it ended.

    Args:
        aware: made by `quantize_aware`; the student of a `Distiller` that trains.
        validation: a pair `(inputs, labels)`, token ids, or batches of either, read once; a
            `TokenDataset` gives its "valid" split. See `ValidationLoss`.
        tolerance: how much the loss may rise above that at 8 bits before the first change, as a
            fraction of it.
        frequency: steps between a change and its judgement.
        groups: patterns of layer names, in the order in which they are tried; default block by
            block from the first, then the token table and a head of its own. Other layers stay as
            they are.

    Attributes:
        bits: of each layer of the groups, now.

    Raises:
        UserError: for a model that is not quantization-aware, patterns that match no layer, and
            numbers out of their range.
    """

    def __init__(
        self,
        aware: GPTModel,
        validation: Any,
        *,
        tolerance: float = 0.01,
        frequency: int = 100,
        groups: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not tolerance >= 0:
            raise UserError(f"tolerance must be at least 0. Received: tolerance={tolerance!r}.")
        if isinstance(frequency, bool) or int(frequency) != frequency or frequency < 1:
            raise UserError(f"frequency is a number of steps. Received: frequency={frequency!r}.")
        self.aware, self.tolerance, self.frequency = aware, tolerance, frequency
        if groups is None:
            names = layer_bits(matching_layers(aware, ["*"]))
            heads = ["_".join(n.split("_")[:2]) + "_*" for n in names if n.startswith("block_")]
            rest = [name for name in names if not name.startswith("block_")]
            groups = list(dict.fromkeys([*heads, *rest]))
        self.groups = {pattern: matching_layers(aware, [pattern]) for pattern in groups}
        if getattr(aware, "bit_state", None) is None:  # a loaded one begins anew
            aware.bit_state = BitState()
        self.state: BitState = aware.bit_state
        self.validation_loss = ValidationLoss(aware, validation)

    @property
    def bits(self) -> dict[str, int]:
        return layer_bits(layer for layers in self.groups.values() for layer in layers)

    def on_train_begin(self, logs: Any = None) -> None:
        self._done = self._step()
        if self.state.baseline is None:
            self._give(list(self.groups), HIGH)
            self.state.baseline = self.validation_loss()
            self._try_next()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        before, self._done = self._done, self._step()
        if self._done // self.frequency > before // self.frequency and not self.state.done:
            self._judge()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None and self.state.history:
            logs["validation_loss_of_bits"] = self.state.history[-1][2]

    def on_train_end(self, logs: Any = None) -> None:
        if self.aware.distribute_strategy.extended.should_save_summary:  # the chief
            left = len(self.groups) - self.state.tried + (not self.state.done)
            print(
                f"Bits after step {self._step()}: {describe(self.bits)}; validation loss may reach "
                f"{self._limit:.4f}" + (f", {left} groups not judged." if left else "."),
                file=sys.stderr,
            )

    @property
    def _limit(self) -> float:
        return self.state.baseline * (1 + self.tolerance)

    def _judge(self) -> None:
        state, loss = self.state, self.validation_loss()
        kept = loss <= self._limit
        state.history.append([self._done, list(self.groups)[state.tried - 1], loss, kept])
        if not kept:
            for variable, value in zip(self.aware.weights, state.weights, strict=True):
                variable.assign(value)
        self._try_next()

    def _try_next(self) -> None:
        """Keep the state of now as the good one, and give the next group the low bits."""
        state, patterns = self.state, list(self.groups)
        if state.tried == len(patterns):
            state.done, state.weights = True, []
            return
        state.weights = [variable.numpy() for variable in self.aware.weights]
        self._give(patterns[state.tried : state.tried + 1], LOW)
        state.tried += 1

    def _give(self, patterns: Sequence[str], bits: int) -> None:
        for pattern in patterns:
            for layer in self.groups[pattern]:
                if layer_bits([layer])[layer.layer.name] != bits:
                    set_bits(layer, bits)

    def _step(self) -> int:
        return int(self.model.optimizer.iterations.numpy())
