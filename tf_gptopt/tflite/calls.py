"""A file's signatures made ready to be called: LiteRT's buffers over arrays to fill and to read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.tensor_buffer import TensorBuffer

from tf_gptopt._errors import UserError
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.litert import aligned_zeros, host_buffer
from tf_gptopt.tflite.stacks import Stack

_FED = ("tokens", "last", "position", "positions", "hidden")  # inputs that are not the cache


@dataclasses.dataclass(frozen=True)
class Call:
    """A signature made ready: arrays to fill and read, and LiteRT's buffers over their memory.

    Args:
        index: the signature's.
        size: tokens, or rows of `logits`, that it reads.
        new: the outputs that belong into the cache, as its stacks have them.
    """

    index: int
    size: int
    input_names: list[str]
    inputs: dict[str, np.ndarray]
    input_buffers: dict[str, TensorBuffer]
    outputs: dict[str, np.ndarray]
    output_buffers: list[TensorBuffer]
    new: list[np.ndarray]


class Calls:
    """The signatures of a loaded file, each for the number of tokens that it was last asked for.

    Args:
        model: the loaded file.
        config: the model's.
        stacks: of the caches that it reads.
        logits_dtype: the type of the logits that it gives.
    """

    def __init__(
        self, model: CompiledModel, config: GPTConfig, stacks: list[Stack], logits_dtype: str
    ) -> None:
        self._model, self._config = model, config
        self._stacks, self._logits_dtype = stacks, np.dtype(logits_dtype)
        self._names = model.get_signature_list()
        self._calls: dict[str, Call] = {}
        self._memory: dict[str, np.ndarray] = {}  # of outputs, which all signatures share

    def ready(self, signature: str, size: int, free: bool = False) -> Call:
        """A signature for so many tokens, or rows of `logits`.

        Args:
            free: whether it takes any number, and has to be told.
        """
        call = self._calls.get(signature)
        if call and call.size == size:
            return call
        try:
            return self._prepare(signature, size, free)
        except (RuntimeError, LookupError, ValueError) as error:
            raise cannot_run(error) from None

    def resize(self, index: int, names: list[str], sizes: dict[str, int]) -> None:
        """Give a signature's free inputs, which are flat, their sizes."""
        try:
            for place, name in enumerate(names):
                if name in sizes:
                    self._model.resize_input_tensor(place, [sizes[name]], index)
        except RuntimeError as error:
            raise cannot_run(error) from None

    def _prepare(self, signature: str, size: int, free: bool) -> Call:
        """Make a signature's buffers, but for the cache; a free one is given its size. Outputs
        share their memory: what one call leaves there is used before the next."""
        index, names = self._model.get_signature_index(signature), self._names[signature]
        inputs = {
            name: aligned_zeros((size * self._config.embedding_dim,), np.float32)
            if name == "hidden"
            else aligned_zeros((1 if name in ("last", "position") else size,), np.int32)
            for name in names["inputs"]
            if name in _FED
        }
        rows = 1 if "last" in inputs else size  # of logits
        outputs, new = self._outputs(names["outputs"], size, rows)
        if free:
            self._calls.pop(signature, None)  # if something strikes now, its size is unknown
            self.resize(index, names["inputs"], {n: a.size for n, a in inputs.items()})
        call = Call(
            index,
            size,
            names["inputs"],
            inputs,
            {name: host_buffer(array) for name, array in inputs.items()},
            outputs,
            [host_buffer(array) for array in outputs.values()],
            new,
        )
        self._calls[signature] = call
        return call

    def _outputs(
        self, names: list[str], size: int, rows: int
    ) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """Arrays for a signature's outputs, and for each stack the whole that they are parts of."""
        found, new = {}, []
        if "hidden" in names:
            found["hidden"] = self._room("hidden", (size, self._config.embedding_dim), np.float32)
        if "logits" in names:
            shape = rows, self._config.vocab_size
            found["logits"] = self._room("logits", shape, self._logits_dtype)
        if len(names) > len(found):
            for i, stack in enumerate(self._stacks):
                new.append(self._room(f"new {i}", stack.shape(size), stack.dtype))
                found |= {f"new_{name}": part for name, part in stack.parts(new[-1]).items()}
        return {name: found[name] for name in names}, new

    def _room(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array over the memory of all outputs of this name, which grows as needed."""
        count = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.size < count:
            self._calls.clear()  # they look at what is there so far
            memory = self._memory[name] = aligned_zeros((count,), np.dtype(dtype))
        return memory[:count].reshape(shape)


def cannot_run(error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"LiteRT cannot run this file ({reason}). Copy or export it again.")
