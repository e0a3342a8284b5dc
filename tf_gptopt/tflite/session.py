"""Calls a file's signatures and owns the KV cache between the calls.

The cache lies in aligned host arrays that LiteRT reads in place. A step returns the new tokens'
keys and values alone, and they are written to their rows: no token copies what was there before.
When the rows are used up, the cache moves once to the next capacity that has a signature.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.tensor_buffer import TensorBuffer

from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.litert import aligned_zeros, host_buffer, zeros_for
from tf_gptopt.tflite.metadata import Bucket


class KVCache:
    """Keys and values of the tokens so far: `k_{i}` and `v_{i}`, `(num_heads, capacity, head_dim)`.

    Row p belongs to position p. Rows from `length` on may hold any numbers; nothing looks at them.

    Args:
        config: the model's.
        dtype: of keys and values, `"float32"` or `"int8"`.
        scales: whether each row of a head has a scale beside it, in `k_scale_{i}` and
            `v_scale_{i}`, `(num_heads, capacity)` float32.
    """

    def __init__(self, config: GPTConfig, dtype: str = "float32", scales: bool = False) -> None:
        self.length = 0
        self.capacity = 0
        self.buffers: dict[str, TensorBuffer] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._config, self._dtype, self._scales = config, np.dtype(dtype), scales

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(array.nbytes for array in self._arrays.values())

    def resize(self, capacity: int) -> None:
        """Move to arrays of this capacity; the rows in use come along."""
        old, self._arrays = self._arrays, {}
        for i, heads in enumerate(self._config.block_heads):
            rows = (heads, capacity)
            for kind in ("k", "v"):
                self._add(f"{kind}_{i}", (*rows, self._config.head_dim), self._dtype, old)
                if self._scales:
                    self._add(f"{kind}_scale_{i}", rows, np.dtype(np.float32), old)
        self.buffers = {name: host_buffer(array) for name, array in self._arrays.items()}
        self.capacity = capacity

    def _add(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, old: dict[str, np.ndarray]
    ) -> None:
        self._arrays[name] = aligned_zeros(shape, dtype)
        if self.length:
            self._arrays[name][:, : self.length] = old.pop(name)[:, : self.length]

    def append(self, outputs: dict[str, np.ndarray], count: int) -> None:
        """Take over the first `count` rows of `new_k_{i}`, `new_v_{i}` and their scales."""
        end = self.length + count
        for name, array in self._arrays.items():
            array[:, self.length : end] = outputs[f"new_{name}"][:, :count]
        self.length = end


@dataclasses.dataclass(frozen=True)
class _Call:
    """A signature made ready: arrays to fill and read, and LiteRT's buffers over their memory."""

    index: int
    input_names: list[str]
    inputs: dict[str, np.ndarray]
    input_buffers: dict[str, TensorBuffer]
    outputs: dict[str, np.ndarray]
    output_buffers: list[TensorBuffer]


class Session:
    """A loaded file and one sequence of tokens.

    Args:
        model: the loaded file.
        metadata: what it says about itself (`metadata.read_metadata`).
    """

    def __init__(self, model: CompiledModel, metadata: dict[str, Any]) -> None:
        self.config = GPTConfig.from_dict(metadata["gpt"])
        cache = metadata["cache"]
        self.cache = KVCache(self.config, cache["dtype"], cache.get("scales", False))
        self._logits_affine = metadata["logits"].get("scale"), metadata["logits"].get("zero_point")
        self._model = model
        self._names = model.get_signature_list()
        buckets = [Bucket(**bucket) for bucket in metadata["buckets"]]
        self._prefills = [b for b in buckets if not b.is_decode]
        self._decodes = sorted((b for b in buckets if b.is_decode), key=lambda b: b.capacity)
        self._logits_signature = metadata["logits"]["signature"]
        self._logits_rows = metadata["logits"]["rows"]
        self._calls: dict[str, _Call] = {}
        self._outputs: dict[tuple, tuple[dict[str, np.ndarray], list[TensorBuffer]]] = {}

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read tokens after those in the cache; returns the last one's logits, `(vocab_size,)`.

        The array is written over by the next call. `ids` are `(time,)` int32, in the vocabulary,
        and fit the context: callers check.
        """
        while True:
            bucket = self._pick(len(ids))
            outputs = self._step(ids[: bucket.tokens], bucket)
            ids = ids[bucket.tokens :]
            if not len(ids):
                return self._as_float(outputs["logits"][0])

    def read_all(self, ids: np.ndarray) -> np.ndarray:
        """As `read`, but the logits after every token, `(time, vocab_size)`."""
        start = self.cache.length
        hidden = np.empty((len(ids), self.config.embedding_dim), np.float32)
        while (done := self.cache.length - start) < len(ids):
            bucket = self._pick(len(ids) - done, with_hidden=True)
            piece = ids[done : done + bucket.tokens]
            hidden[done : done + len(piece)] = self._step(piece, bucket)["hidden"][: len(piece)]
        return self._logits(hidden)

    def _pick(self, count: int, with_hidden: bool = False) -> Bucket:
        """The signature that reads `count` tokens, or as many of them as any does, at least cost.

        Args:
            with_hidden: whether hidden states are needed, which only prefill signatures give.
        """
        length = self.cache.length
        if count == 1 and not with_hidden:
            return next(b for b in self._decodes if b.capacity >= length)
        fitting = [
            b for b in self._prefills if (b.capacity >= length if length else not b.capacity)
        ]
        enough = [b for b in fitting if b.tokens >= count]
        return min(enough or fitting, key=lambda b: (b.tokens if enough else -b.tokens, b.capacity))

    def _step(self, ids: np.ndarray, bucket: Bucket) -> dict[str, np.ndarray]:
        """Read at most `bucket.tokens` ids and append their keys and values to the cache.

        Returns the signature's outputs by name: arrays that the next call writes over.
        """
        cache = self.cache
        call = self._calls.get(bucket.signature) or self._prepare(bucket.signature)
        call.inputs["tokens"][: len(ids)] = ids  # behind them, ids of an earlier call are padding
        if "last" in call.inputs:
            call.inputs["last"][0] = len(ids) - 1
        if "position" in call.inputs:
            call.inputs["position"][0] = cache.length
        buffers = call.input_buffers
        if bucket.capacity:
            if cache.capacity != bucket.capacity:
                cache.resize(bucket.capacity)
            buffers = buffers | cache.buffers
        inputs = [buffers[name] for name in call.input_names]
        self._model.run_by_index(call.index, inputs, call.output_buffers)
        end = cache.length + len(ids)
        if end > cache.capacity:
            cache.resize(next(b.capacity for b in self._decodes if b.capacity >= end))
        cache.append(call.outputs, len(ids))
        return call.outputs

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden states `(time, width)` to logits `(time, vocab_size)`."""
        rows = self._logits_rows
        call = self._calls.get(self._logits_signature) or self._prepare(self._logits_signature)
        inputs = [call.input_buffers["hidden"]]
        logits = np.empty((len(hidden), self.config.vocab_size), np.float32)
        for start in range(0, len(hidden), rows):
            piece = hidden[start : start + rows]
            call.inputs["hidden"][: piece.size] = piece.reshape(-1)
            self._model.run_by_index(call.index, inputs, call.output_buffers)
            logits[start : start + rows] = self._as_float(call.outputs["logits"][: len(piece)])
        return logits

    def _as_float(self, logits: np.ndarray) -> np.ndarray:
        """Logits as float32, those of a file that gives integers as well."""
        if logits.dtype == np.float32:
            return logits
        scale, zero_point = self._logits_affine
        return (logits.astype(np.float32) - zero_point) * np.float32(scale)

    def _prepare(self, signature: str) -> _Call:
        """Make a signature's buffers, but for the cache; those with equal outputs share them."""
        names = self._names[signature]
        details = self._model.get_input_tensor_details(signature)
        fed = [name for name in names["inputs"] if name in ("tokens", "last", "position", "hidden")]
        inputs = {name: zeros_for(details[name]) for name in fed}
        details = self._model.get_output_tensor_details(signature)
        key = tuple((name, *details[name]["shape"]) for name in names["outputs"])
        if key not in self._outputs:
            arrays = {name: zeros_for(details[name]) for name in names["outputs"]}
            self._outputs[key] = arrays, [host_buffer(array) for array in arrays.values()]
        call = _Call(
            self._model.get_signature_index(signature),
            names["inputs"],
            inputs,
            {name: host_buffer(array) for name, array in inputs.items()},
            *self._outputs[key],
        )
        self._calls[signature] = call
        return call
