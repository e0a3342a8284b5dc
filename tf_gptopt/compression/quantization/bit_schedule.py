"""Bits and ranges that change while a model trains, step by step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._keras import keras
from tf_gptopt.compression.quantization.aware_state import (
    first_config,
    layer_bits,
    quantized_layers,
    set_bits,
)
from tf_gptopt.compression.quantization.grids import LIMITS
from tf_gptopt.compression.quantization.wrapping import QuantizedLayer
from tf_gptopt.models.gpt import GPTModel

Steps = Mapping[int, int | str]
_RANGES = ("minmax", "percentile", "mse")


class BitSchedule(keras.callbacks.Callback):
    """Changes the bits of a QAT model's weights at given steps, or finds their range anew.

    ```python
    aware.fit(data, callbacks=[BitSchedule({0: 8, 200: 4})])
    BitSchedule({0: 8, 200: 4, 300: "mse"})         # at step 300 the range of least error, anew
    BitSchedule({"block_*": {0: 8, 200: 4}, "token_embedding": {0: 8}})
    strip_quantization(aware), final_config(aware)  # on the grid of the bits at the end
    ```

    A change begins at the range that the model's config asks for, of the weights of that moment;
    learned ranges begin anew there. Nothing is traced again. A step counts when it is done: 200
    means after 200 updates. What is due is a function of the step, and bits and ranges are
    variables of the model, so a run that resumes goes on where it was. A line on stderr says where
    it ended.

    Args:
        schedule: steps to bits (8 or 4) or the name of a range; or patterns of layer names to such
            steps, of which the first that matches counts. Before its first step a layer is as the
            model's config has it. Layers whose config has blocks share one scale per row while they
            have 8 bits.

    Attributes:
        bits: of each quantized layer, now.

    Raises:
        UserError: for steps and bits that are none; when training begins, for a model that is not
            quantization-aware and patterns that match no layer.
    """

    def __init__(self, schedule: Steps | Mapping[str, Steps]) -> None:
        super().__init__()
        if not isinstance(schedule, Mapping) or not schedule:
            raise UserError(
                "A BitSchedule maps steps to bits, such as {0: 8, 200: 4}. "
                f"Received: {schedule!r}."
            )
        by_pattern = all(isinstance(key, str) for key in schedule)
        self.schedule = dict(schedule) if by_pattern else {"*": schedule}
        for steps in self.schedule.values():
            _check_steps(steps)
        self.layers: list[tuple[QuantizedLayer, Steps]] = []

    @property
    def bits(self) -> dict[str, int]:
        return layer_bits(layer for layer, _ in self.layers)

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        aware = getattr(model, "student", model)  # of a Distiller
        self.layers = []
        for layer in matching_layers(aware, self.schedule):
            steps = [s for pattern, s in self.schedule.items() if _fits(layer, pattern)]
            self.layers.append((layer, steps[0]))

    def on_train_begin(self, logs: Any = None) -> None:
        self._done = self._step()
        for layer, steps in self.layers:
            past = [steps[step] for step in sorted(steps) if step < self._done]
            past = [bits for bits in past if not isinstance(bits, str)]
            if past and layer_bits([layer])[layer.layer.name] != past[-1]:
                set_bits(layer, past[-1])
        self._change(self._done - 1, self._done)  # again, where it was done: the same weights

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        before, self._done = self._done, self._step()
        self._change(before, self._done)

    def on_train_end(self, logs: Any = None) -> None:
        aware = getattr(self.model, "student", self.model)
        if aware.distribute_strategy.extended.should_save_summary:  # the chief
            print(f"Bits after step {self._step()}: {describe(self.bits)}.", file=sys.stderr)

    def _step(self) -> int:
        return int(self.model.optimizer.iterations.numpy())

    def _change(self, before: int, now: int) -> None:
        for layer, steps in self.layers:
            for step in sorted(steps):
                if before < step <= now:
                    if isinstance(steps[step], str):
                        set_bits(layer, layer_bits([layer])[layer.layer.name], steps[step])
                    else:
                        set_bits(layer, steps[step])


def matching_layers(aware: GPTModel, patterns: Iterable[str]) -> list[QuantizedLayer]:
    """The layers of a QAT model with quantized weights that a pattern matches.

    Raises:
        UserError: for a model that is not quantization-aware, and a pattern that matches none.
    """
    first_config(aware)  # or raise
    layers = quantized_layers(aware)
    names = [layer.layer.name for layer in layers]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"{pattern!r} matches no layer with quantized weights.{suggest(pattern, names)}"
            )
    return [layer for layer in layers if any(_fits(layer, pattern) for pattern in patterns)]


def describe(bits: Mapping[str, int]) -> str:
    """`{"block_0_qkv": 4, ...}` as people read it: `"12 layers int4; int8: token_embedding"`."""
    parts = []
    for count in sorted(set(bits.values())):
        names = [name for name, value in bits.items() if value == count]
        listed = len(names) if len(names) > 8 or len(names) == len(bits) else ", ".join(names)
        parts.append(f"int{count}: {listed}" if isinstance(listed, str) else f"{listed} int{count}")
    return "; ".join(parts)


def _fits(layer: QuantizedLayer, pattern: str) -> bool:
    return fnmatchcase(layer.layer.name, pattern)


def _check_steps(steps: Any) -> None:
    if not isinstance(steps, Mapping) or not steps:
        raise UserError(f"A pattern maps to steps, such as {{0: 8, 200: 4}}. Received: {steps!r}.")
    for step, value in steps.items():
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise UserError(f"A step is an integer from 0 on. Received: {step!r}: {value!r}.")
        if value not in LIMITS and value not in _RANGES:
            raise UserError(
                f"A step has the bits {' or '.join(map(str, LIMITS))}, or a range: "
                f"{', '.join(_RANGES)}. Received: {step!r}: {value!r}."
            )
