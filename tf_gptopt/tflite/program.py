"""Calls a file's signatures, over the cache of whoever asks: the weights are there once."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.tensor_buffer import TensorBuffer

from tf_gptopt._errors import UserError
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.cache import KVCache
from tf_gptopt.tflite.litert import host_buffer, zeros_for
from tf_gptopt.tflite.metadata import Bucket

_NEAR = 8  # tokens
_WITHOUT_VERIFY = 5  # tokens to verify at once, in a file whose prefill signatures have to do it


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
        threads: processor threads that it was loaded with.

    Attributes:
        verify_lengths: how many tokens `verify` reads at once, in rising order.
    """

    def __init__(
        self, model: CompiledModel, metadata: dict[str, Any], threads: int | None = None
    ) -> None:
        self.config = GPTConfig.from_dict(metadata["gpt"])
        self.threads = threads
        self._cache_kind = metadata["cache"]["dtype"], metadata["cache"].get("scales", False)
        self._logits_affine = metadata["logits"].get("scale"), metadata["logits"].get("zero_point")
        self._model = model
        self._lock = threading.Lock()
        self._names = model.get_signature_list()
        buckets = [Bucket(**bucket) for bucket in metadata["buckets"]]
        self._prefills = [b for b in buckets if not b.is_decode]
        self._decodes = sorted((b for b in buckets if b.is_decode), key=lambda b: b.capacity)
        self._verifies = [Bucket(**bucket) for bucket in metadata.get("verify", ())]
        self._groups = {b.capacity: b.group for b in buckets}
        self.verify_lengths = sorted({b.tokens for b in self._verifies}) or [_WITHOUT_VERIFY]
        self._logits_signature = metadata["logits"]["signature"]
        self._logits_rows = metadata["logits"]["rows"]
        self._calls: dict[str, _Call] = {}
        # LiteRT knows the buffer that a signature last read by its address, and would not notice
        # that a freed one's address now belongs to another: these are not freed, though their
        # memory may be (`litert.Memory`)
        self._bound: dict[str, list[TensorBuffer]] = {}
        self._outputs: dict[tuple, tuple[dict[str, np.ndarray], list[TensorBuffer]]] = {}

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return KVCache(self.config, *self._cache_kind, self._groups)

    def read(self, cache: KVCache, ids: np.ndarray) -> np.ndarray:
        """Read tokens after those in the cache; returns the last one's logits, `(vocab_size,)`."""
        with self._lock:
            while True:
                bucket = self._pick(cache, len(ids))
                piece, ids = ids[: bucket.tokens], ids[bucket.tokens :]
                logits = self._step(cache, piece, bucket)["logits"]
                if not len(ids):
                    return self._as_float(logits[0 if bucket.is_prefill else len(piece) - 1])

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
        if not cache.length or len(ids) > max((b.tokens for b in self._verifies), default=1):
            return self.read_all(cache, ids)
        with self._lock:
            outputs = self._step(cache, ids, self._pick(cache, len(ids), every=True))
            return self._as_float(outputs["logits"][: len(ids)])

    def _pick(
        self, cache: KVCache, count: int, with_hidden: bool = False, every: bool = False
    ) -> Bucket:
        """The signature that reads `count` tokens, or as many of them as any does, at least cost.

        Args:
            with_hidden: whether hidden states are needed, which only prefill signatures give.
            every: whether the logits of every token are needed, which verify signatures give.
        """
        length = cache.length
        if count == 1 and not with_hidden:
            kinds = self._decodes
        elif with_hidden or not length:
            kinds = [b for b in self._prefills if bool(b.capacity) == bool(length)]
        else:
            kinds = self._verifies + ([] if every else [b for b in self._prefills if b.capacity])
        # a cache that is larger, such as after a draft that failed, stays where it is soon again
        least = min(length + _NEAR, max(length, cache.capacity))
        fitting = [b for b in kinds if b.capacity >= least or not b.capacity]
        enough = [b for b in fitting if b.tokens >= count]
        return min(enough or fitting, key=lambda b: (b.tokens if enough else -b.tokens, b.capacity))

    def _step(self, cache: KVCache, ids: np.ndarray, bucket: Bucket) -> dict[str, np.ndarray]:
        """Read at most `bucket.tokens` ids and append their keys and values to the cache.

        Returns the signature's outputs by name: arrays that the next call writes over.
        """
        call = self._ready(bucket.signature)
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
        self._run(call, inputs)
        self._bound[bucket.signature] = inputs
        end = cache.length + len(ids)
        if end > cache.capacity:
            cache.resize(next(b.capacity for b in self._decodes if b.capacity >= end))
        cache.append(ids, call.outputs)
        return call.outputs

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden states `(time, width)` to logits `(time, vocab_size)`."""
        rows = self._logits_rows
        call = self._ready(self._logits_signature)
        inputs = [call.input_buffers["hidden"]]
        logits = np.empty((len(hidden), self.config.vocab_size), np.float32)
        for start in range(0, len(hidden), rows):
            piece = hidden[start : start + rows]
            call.inputs["hidden"][: piece.size] = piece.reshape(-1)
            self._run(call, inputs)
            logits[start : start + rows] = self._as_float(call.outputs["logits"][: len(piece)])
        return logits

    def _run(self, call: _Call, inputs: list[TensorBuffer]) -> None:
        try:
            self._model.run_by_index(call.index, inputs, call.output_buffers)
        except RuntimeError as error:
            raise _cannot_run(error) from None

    def _ready(self, signature: str) -> _Call:
        if call := self._calls.get(signature):
            return call
        try:
            return self._prepare(signature)
        except (RuntimeError, KeyError) as error:
            raise _cannot_run(error) from None

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


def _cannot_run(error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"LiteRT cannot run this file ({reason}). Copy or export it again.")
