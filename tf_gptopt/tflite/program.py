"""Calls a file's signatures, over the cache of whoever asks: the weights are there once."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.tensor_buffer import TensorBuffer

from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.buckets import CAPACITY_STEP, VERIFY_LENGTH, Bucket
from tf_gptopt.tflite.cache import Inputs, KVCache
from tf_gptopt.tflite.calls import Call, Calls, cannot_run
from tf_gptopt.tflite.stacks import plan_stacks

_NEAR = 8  # tokens that a cache has room for at least


@dataclasses.dataclass(frozen=True)
class _Bound:
    """What a signature read last."""

    call: Call
    past: Inputs | None
    inputs: list[TensorBuffer]


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
        cache = metadata["cache"]
        self._stacks = plan_stacks(self.config, cache["dtype"], cache.get("scales", False))
        self._logits_affine = metadata["logits"].get("scale"), metadata["logits"].get("zero_point")
        self._model = model
        self._lock = threading.Lock()
        buckets = [Bucket(**bucket) for bucket in metadata["buckets"]]
        self._prefills = [b for b in buckets if not b.is_decode]
        self._decodes = sorted((b for b in buckets if b.is_decode), key=lambda b: b.capacity)
        self._verifies = [Bucket(**bucket) for bucket in metadata.get("verify", ())]
        self.verify_lengths = sorted({b.tokens for b in self._verifies}) or [VERIFY_LENGTH]
        self._logits_signature = metadata["logits"]["signature"]
        self._logits_rows = metadata["logits"]["rows"]
        self._logits_free = metadata["logits"].get("free", False)
        self._calls = Calls(
            model, self.config, self._stacks, metadata["logits"].get("dtype", "float32")
        )
        self._capacities: dict[str, int] = {}  # that free signatures have now
        # LiteRT knows the buffer that a signature last read by its address, and would not notice
        # that a freed one's address now belongs to another: these are not freed, though their
        # memory may be (`litert.Memory`)
        self._bound: dict[str, _Bound] = {}

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return KVCache(self.config, self._stacks)

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
        call, past = self._calls.ready(bucket.signature, size, is_free), None
        call.inputs["tokens"][:count] = ids  # behind them, ids of an earlier call are padding
        if "last" in call.inputs:
            call.inputs["last"][0] = count - 1
        if "position" in call.inputs:  # in files of format 3 and before
            call.inputs["position"][0] = start
        if "positions" in call.inputs and size == 1:
            call.inputs["positions"][0] = start
        elif "positions" in call.inputs:
            places = np.arange(start, start + size)
            np.minimum(places, len(cache.tokens) - 1, out=call.inputs["positions"])
        if bucket.capacity:
            capacity = self._capacity(cache, bucket)
            if cache.capacity != capacity:
                cache.resize(capacity)
            past = cache.inputs(bucket.group)
            if bucket.free and capacity != self._capacities.get(bucket.signature):
                self._capacities[bucket.signature] = 0  # neither, if something strikes now
                self._calls.resize(call.index, call.input_names, past.sizes)
                self._capacities[bucket.signature] = capacity
        self._run(bucket.signature, call, past)
        end = start + count
        if end > cache.capacity:
            bucket = next(b for b in self._decodes if b.capacity >= end)
            cache.resize(_rows(end + _NEAR, bucket.capacity) if bucket.free else bucket.capacity)
        cache.append(ids, call.new)
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
            call = self._calls.ready(name, size, self._logits_free)
            call.inputs["hidden"][: piece.size] = piece.reshape(-1)
            self._run(name, call)
            logits[start : start + rows] = self._as_float(call.outputs["logits"][: len(piece)])
        return logits

    def _run(self, signature: str, call: Call, past: Inputs | None = None) -> None:
        bound = self._bound.get(signature)
        try:
            if not bound or bound.call is not call or bound.past is not past:
                buffers = call.input_buffers | (past.buffers if past else {})
                bound = _Bound(call, past, [buffers[name] for name in call.input_names])
            self._model.run_by_index(call.index, bound.inputs, call.output_buffers)
        except (KeyError, RuntimeError) as error:
            raise cannot_run(error) from None
        self._bound[signature] = bound

    def _as_float(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits as float32, those of a file that gives integers as well."""
        if logits.dtype == np.float32:
            return logits.copy()
        scale, zero_point = self._logits_affine
        return (logits.astype(np.float32) - zero_point) * np.float32(scale)


def _size(count: int) -> int:
    """How many tokens a free signature reads for the sake of so many: a change of size costs it
    some milliseconds, so there are few. Five take as long as two: see `VERIFY_LENGTH`."""
    few = next((size for size in (1, VERIFY_LENGTH, 8) if count <= size), 0)
    return few or -(-count // 16) * 16


def _rows(least: int, most: int) -> int:
    """The capacity of a cache for so many tokens: with room for an eighth more, at least."""
    step = max(CAPACITY_STEP, 1 << max(0, least.bit_length() - 4))
    return min(-(-least // step) * step, most)
