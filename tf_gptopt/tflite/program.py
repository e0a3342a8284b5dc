"""Calls a file's signatures, over the cache of whoever asks: the weights are there once."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.tensor_buffer import TensorBuffer

from tf_gptopt._errors import UserError
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.cache import KVCache
from tf_gptopt.tflite.litert import aligned_zeros, host_buffer
from tf_gptopt.tflite.metadata import CAPACITY_STEP, Bucket

_NEAR = 8  # tokens that a cache has room for at least
_FED = ("tokens", "last", "position", "positions", "hidden")  # inputs that are not the cache
_WITHOUT_VERIFY = 5  # tokens to verify at once, in a file whose prefill signatures have to do it


@dataclasses.dataclass(frozen=True)
class _Call:
    """A signature made ready: arrays to fill and read, and LiteRT's buffers over their memory.

    Args:
        index: the signature's.
        size: tokens, or rows of `logits`, that it reads.
    """

    index: int
    size: int
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
        self._logits_dtype = metadata["logits"].get("dtype", "float32")
        self._logits_affine = metadata["logits"].get("scale"), metadata["logits"].get("zero_point")
        self._model = model
        self._lock = threading.Lock()
        self._names = model.get_signature_list()
        buckets = [Bucket(**bucket) for bucket in metadata["buckets"]]
        self._prefills = [b for b in buckets if not b.is_decode]
        self._decodes = sorted((b for b in buckets if b.is_decode), key=lambda b: b.capacity)
        self._verifies = [Bucket(**bucket) for bucket in metadata.get("verify", ())]
        self.verify_lengths = sorted({b.tokens for b in self._verifies}) or [_WITHOUT_VERIFY]
        self._logits_signature = metadata["logits"]["signature"]
        self._logits_rows = metadata["logits"]["rows"]
        self._logits_free = metadata["logits"].get("free", False)
        self._calls: dict[str, _Call] = {}
        self._capacities: dict[str, int] = {}  # that free signatures have now
        # LiteRT knows the buffer that a signature last read by its address, and would not notice
        # that a freed one's address now belongs to another: these are not freed, though their
        # memory may be (`litert.Memory`)
        self._bound: dict[str, tuple[list[TensorBuffer], list[TensorBuffer]]] = {}
        self._memory: dict[str, np.ndarray] = {}  # of outputs, which all signatures share

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return KVCache(self.config, *self._cache_kind)

    def read(self, cache: KVCache, ids: np.ndarray) -> np.ndarray:
        """Read tokens after those in the cache; returns the last one's logits, `(vocab_size,)`."""
        with self._lock:
            while True:
                bucket = self._pick(cache, len(ids))
                piece, ids = ids[: bucket.tokens], ids[bucket.tokens :]
                outputs = self._step(cache, piece, bucket)
                if not len(ids) and "logits" not in outputs:
                    return self._logits(outputs["hidden"][len(piece) - 1 : len(piece)])[0]
                if not len(ids):
                    last = 0 if bucket.is_prefill else len(piece) - 1
                    return self._as_float(outputs["logits"][last])

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
            kinds = [b for b in self._prefills if b.free or bool(b.capacity) == bool(length)]
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
        count, start, size = len(ids), cache.length, bucket.tokens
        is_free = bucket.free and bucket.is_prefill
        if is_free:
            size = min(_size(count), size, len(cache.tokens) - start)
        call = self._ready(bucket.signature, size, is_free)
        call.inputs["tokens"][:count] = ids  # behind them, ids of an earlier call are padding
        if "last" in call.inputs:
            call.inputs["last"][0] = count - 1
        if "position" in call.inputs:  # in files of format 3 and before
            call.inputs["position"][0] = start
        if "positions" in call.inputs:
            places = np.arange(start, start + size)
            np.minimum(places, len(cache.tokens) - 1, out=call.inputs["positions"])
        buffers = call.input_buffers
        if bucket.capacity:
            capacity = self._capacity(cache, bucket)
            if cache.capacity != capacity:
                cache.resize(capacity)
            past = cache.inputs(bucket.group)
            buffers = buffers | past.buffers
            if bucket.free and capacity != self._capacities.get(bucket.signature):
                self._capacities[bucket.signature] = 0  # neither, if something strikes now
                self._resize(call.index, call.input_names, past.sizes)
                self._capacities[bucket.signature] = capacity
        try:
            inputs = [buffers[name] for name in call.input_names]
        except KeyError as error:
            raise _cannot_run(error) from None
        self._run(bucket.signature, call, inputs)
        end = start + count
        if end > cache.capacity:
            bucket = next(b for b in self._decodes if b.capacity >= end)
            cache.resize(_rows(end + _NEAR, bucket.capacity) if bucket.free else bucket.capacity)
        cache.append(ids, call.outputs)
        return call.outputs

    def _capacity(self, cache: KVCache, bucket: Bucket) -> int:
        """How many rows of the cache a signature reads: what it has, if that is near enough."""
        if not bucket.free:
            return bucket.capacity
        most = bucket.capacity
        enough = _rows(cache.length + _NEAR, most)
        near = _rows(enough + 1, most)
        return cache.capacity if max(cache.length, 1) <= cache.capacity <= near else enough

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden states `(time, width)` to logits `(time, vocab_size)`."""
        name, rows = self._logits_signature, self._logits_rows
        logits = np.empty((len(hidden), self.config.vocab_size), np.float32)
        for start in range(0, len(hidden), rows):
            piece = hidden[start : start + rows]
            size = min(_size(len(piece)), rows) if self._logits_free else rows
            call = self._ready(name, size, self._logits_free)
            call.inputs["hidden"][: piece.size] = piece.reshape(-1)
            self._run(name, call, [call.input_buffers["hidden"]])
            logits[start : start + rows] = self._as_float(call.outputs["logits"][: len(piece)])
        return logits

    def _run(self, signature: str, call: _Call, inputs: list[TensorBuffer]) -> None:
        try:
            self._model.run_by_index(call.index, inputs, call.output_buffers)
        except RuntimeError as error:
            raise _cannot_run(error) from None
        self._bound[signature] = inputs, call.output_buffers

    def _ready(self, signature: str, size: int, free: bool = False) -> _Call:
        call = self._calls.get(signature)
        if call and call.size == size:
            return call
        try:
            return self._prepare(signature, size, free)
        except (RuntimeError, LookupError, ValueError) as error:
            raise _cannot_run(error) from None

    def _as_float(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits as float32, those of a file that gives integers as well."""
        if logits.dtype == np.float32:
            return logits.copy()
        scale, zero_point = self._logits_affine
        return (logits.astype(np.float32) - zero_point) * np.float32(scale)

    def _prepare(self, signature: str, size: int, free: bool) -> _Call:
        """Make a signature's buffers, but for the cache; a free one is given its size. Outputs
        share their memory: what one call leaves there is used before the next."""
        index, names = self._model.get_signature_index(signature), self._names[signature]
        inputs = {
            name: aligned_zeros((size * self.config.embedding_dim,), np.float32)
            if name == "hidden"
            else aligned_zeros((1 if name in ("last", "position") else size,), np.int32)
            for name in names["inputs"]
            if name in _FED
        }
        rows = 1 if "last" in inputs else size  # of logits
        outputs = {name: self._output(name, size, rows) for name in names["outputs"]}
        if free:
            self._calls.pop(signature, None)  # if something strikes now, its size is unknown
            self._resize(index, names["inputs"], {n: a.size for n, a in inputs.items()})
        call = _Call(
            index,
            size,
            names["inputs"],
            inputs,
            {name: host_buffer(array) for name, array in inputs.items()},
            outputs,
            [host_buffer(array) for array in outputs.values()],
        )
        self._calls[signature] = call
        return call

    def _resize(self, index: int, names: list[str], sizes: dict[str, int]) -> None:
        """Give a signature's free inputs, which are flat, their sizes."""
        try:
            for place, name in enumerate(names):
                if name in sizes:
                    self._model.resize_input_tensor(place, [sizes[name]], index)
        except RuntimeError as error:
            raise _cannot_run(error) from None

    def _output(self, name: str, size: int, rows: int) -> np.ndarray:
        """An array over the memory of all outputs of this name, which grows as needed."""
        config, dtype = self.config, np.dtype(np.float32)
        if name == "hidden":
            shape = (size, config.embedding_dim)
        elif name == "logits":
            shape, dtype = (rows, config.vocab_size), np.dtype(self._logits_dtype)
        else:  # new_k_0, new_k_scale_0
            heads = config.block_heads[int(name.rpartition("_")[2])]
            shape = (heads, size)
            if "scale" not in name:
                shape, dtype = (*shape, config.head_dim), np.dtype(self._cache_kind[0])
        count = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.size < count:
            self._calls.clear()  # they look at what is there so far
            memory = self._memory[name] = aligned_zeros((count,), dtype)
        return memory[:count].reshape(shape)


def _cannot_run(error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"LiteRT cannot run this file ({reason}). Copy or export it again.")


def _size(count: int) -> int:
    """How many tokens a free signature reads for the sake of so many: a change of size costs it
    some milliseconds, so there are few. Five take as long as two: see `plan_verifies`."""
    few = next((size for size in (1, _WITHOUT_VERIFY, 8) if count <= size), 0)
    return few or -(-count // 16) * 16


def _rows(least: int, most: int) -> int:
    """The capacity of a cache for so many tokens: with room for an eighth more, at least."""
    step = max(CAPACITY_STEP, 1 << max(0, least.bit_length() - 4))
    return min(-(-least // step) * step, most)
