"""Calls a file's signatures, over the cache of whoever asks: the weights are there once."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.tensor_buffer import TensorBuffer

from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.cache import KVCache
from tf_gptopt.tflite.litert import host_buffer, zeros_for
from tf_gptopt.tflite.metadata import Bucket


@dataclasses.dataclass(frozen=True)
class _Call:
    """A signature made ready: arrays to fill and read, and LiteRT's buffers over their memory."""

    index: int
    input_names: list[str]
    inputs: dict[str, np.ndarray]
    input_buffers: dict[str, TensorBuffer]
    outputs: dict[str, np.ndarray]
    output_buffers: list[TensorBuffer]


class Program:
    """A loaded file. Threads may share it, each with a cache of its own: calls wait for each other.

    Ids that come in are int32 `(time,)`, at least one, of the vocabulary, and fit into the context
    behind the tokens in the cache: callers check.

    Args:
        model: the loaded file.
        metadata: what it says about itself (`metadata.read_metadata`).
    """

    def __init__(self, model: CompiledModel, metadata: dict[str, Any]) -> None:
        self.config = GPTConfig.from_dict(metadata["gpt"])
        self._cache_kind = metadata["cache"]["dtype"], metadata["cache"].get("scales", False)
        self._logits_affine = metadata["logits"].get("scale"), metadata["logits"].get("zero_point")
        self._model = model
        self._lock = threading.Lock()
        self._names = model.get_signature_list()
        buckets = [Bucket(**bucket) for bucket in metadata["buckets"]]
        self._prefills = [b for b in buckets if not b.is_decode]
        self._decodes = sorted((b for b in buckets if b.is_decode), key=lambda b: b.capacity)
        self._verifies = [Bucket(**bucket) for bucket in metadata.get("verify", ())]
        self._logits_signature = metadata["logits"]["signature"]
        self._logits_rows = metadata["logits"]["rows"]
        self._calls: dict[str, _Call] = {}
        self._outputs: dict[tuple, tuple[dict[str, np.ndarray], list[TensorBuffer]]] = {}

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return KVCache(self.config, *self._cache_kind)

    def read(self, cache: KVCache, ids: np.ndarray) -> np.ndarray:
        """Read tokens after those in the cache; returns the last one's logits, `(vocab_size,)`."""
        with self._lock:
            while True:
                bucket = self._pick(cache, len(ids))
                outputs = self._step(cache, ids[: bucket.tokens], bucket)
                ids = ids[bucket.tokens :]
                if not len(ids):
                    return self._as_float(outputs["logits"][0])

    def read_all(self, cache: KVCache, ids: np.ndarray) -> np.ndarray:
        """As `read`, but the logits after every token, `(time, vocab_size)`."""
        hidden = np.empty((len(ids), self.config.embedding_dim), np.float32)
        done = 0
        with self._lock:
            while done < len(ids):
                bucket = self._pick(cache, len(ids) - done, with_hidden=True)
                piece = ids[done : done + bucket.tokens]
                outputs = self._step(cache, piece, bucket)
                hidden[done : done + len(piece)] = outputs["hidden"][: len(piece)]
                done += len(piece)
            return self._logits(hidden)

    def verify(self, cache: KVCache, ids: np.ndarray) -> np.ndarray:
        """As `read_all`, for a few tokens: in one call where the file has a `verify_{n}`."""
        fitting = [b for b in self._verifies if b.tokens >= len(ids) and b.capacity >= cache.length]
        if len(ids) == 1 or not cache.length or not fitting:
            return self.read(cache, ids)[None] if len(ids) == 1 else self.read_all(cache, ids)
        bucket = min(fitting, key=lambda b: (b.tokens, b.capacity))
        with self._lock:
            return self._as_float(self._step(cache, ids, bucket)["logits"][: len(ids)])

    def _pick(self, cache: KVCache, count: int, with_hidden: bool = False) -> Bucket:
        """The signature that reads `count` tokens, or as many of them as any does, at least cost.

        Args:
            with_hidden: whether hidden states are needed, which only prefill signatures give.
        """
        length = cache.length
        if count == 1 and not with_hidden:
            return next(b for b in self._decodes if b.capacity >= length)
        fitting = [
            b for b in self._prefills if (b.capacity >= length if length else not b.capacity)
        ]
        enough = [b for b in fitting if b.tokens >= count]
        return min(enough or fitting, key=lambda b: (b.tokens if enough else -b.tokens, b.capacity))

    def _step(self, cache: KVCache, ids: np.ndarray, bucket: Bucket) -> dict[str, np.ndarray]:
        """Read at most `bucket.tokens` ids and append their keys and values to the cache.

        Returns the signature's outputs by name: arrays that the next call writes over.
        """
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
        cache.append(ids, call.outputs)
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
        """A copy of logits as float32, those of a file that gives integers as well."""
        if logits.dtype == np.float32:
            return logits.copy()
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
