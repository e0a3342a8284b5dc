"""What a file says about itself, held against its functions before anybody relies on it.

A checksum tells damage. It does not tell a file that was written by a mistake, or edited and sealed
again: the runtime makes room, resizes and counts by these values, and LiteRT checks none of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.buckets import Bucket, head_groups
from tf_gptopt.tflite.tensors import TYPES

_MOST = 2**31 - 1  # of any size: LiteRT's are int32
_CODES = {np.dtype(dtype).name: code for dtype, code in TYPES.items()}


class Unfit(ValueError):
    """Values that are not what a file of this kind says, or not true of this one."""


def check_described(values: Mapping[str, Any], model: Any) -> None:
    """Check the values of `tf_gptopt.json`.

    Args:
        values: as they were read.
        model: the file's flatbuffer.

    Raises:
        Unfit: with the first that does not fit. Of values that make no sense at all, any error.
    """
    config = _config(values["gpt"], _length(model))
    graphs = {s.SignatureKey().decode(): s for s in _all(model, "SignatureDefs")}
    cache, logits = _mapping("cache", values["cache"]), _mapping("logits", values["logits"])
    _require(cache["dtype"] in ("float32", "int8"), "cache", "dtype", cache["dtype"])
    _require(_is_bool(cache.get("scales", False)), "cache", "scales", cache.get("scales"))
    _logits(logits)
    listed = [Bucket(**b) for b in (*values["buckets"], *values.get("verify", ()))]
    for bucket in listed:
        _bucket(bucket, config)
        tensors = _tensors(model, graphs, bucket.signature)
        _step(bucket, tensors, config, cache, logits.get("dtype", "float32"))
    _reaches("decode", [b.capacity for b in listed if b.is_decode], config)
    _reaches("prefill", [b.capacity for b in listed if b.is_prefill], config)
    verifies = [b.capacity for b in listed if not b.is_decode and not b.is_prefill]
    if verifies:
        _reaches("verify", verifies, config)
    firsts = [b for b in listed if b.is_prefill and (b.free or not b.capacity)]
    _require(firsts, "buckets", "a prefill without a cache", None)
    _head(logits, _tensors(model, graphs, logits["signature"]), config)
    _tokenizer(values["tokenizer"], config)


def _config(values: Any, most: int) -> GPTConfig:
    """The model's config; no number in it is one that could not be."""
    values = _mapping("gpt", values)
    layers = values["num_layers"]
    _require(_is_int(layers, 1, most), "gpt", "num_layers", layers)  # as many as the file has bytes
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int):
                _require(-1 <= number <= _MOST, "gpt", name, number)
    config = GPTConfig.from_dict(dict(values))
    for name in ("dropout", "layer_norm_epsilon"):
        value = getattr(config, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(is_number and 0 <= value < 1, "gpt", name, value)
    return config


def _reaches(kind: str, capacities: list[int], config: GPTConfig) -> None:
    """Signatures of a kind go on to the end of the context."""
    most, context = max(capacities, default=0), config.max_sequence_length
    _require(most == context, "buckets", f"the largest {kind} of {context} tokens", most)


def _bucket(bucket: Bucket, config: GPTConfig) -> None:
    context = config.max_sequence_length
    for name, least, most in (
        ("tokens", 1, context),
        ("capacity", 0, context),
        ("group", 0, max(config.block_heads) if bucket.capacity else 0),
    ):
        value = getattr(bucket, name)
        _require(_is_int(value, least, most), bucket.signature, name, value)
    _require(_is_bool(bucket.free), bucket.signature, "free", bucket.free)
    kinds = bucket.is_decode, bucket.is_prefill, bucket.signature.startswith("verify")
    _require(any(kinds), "buckets", "signature", bucket.signature)
    _require(not bucket.is_decode or bucket.tokens == 1, bucket.signature, "tokens", bucket.tokens)


def _step(
    bucket: Bucket,
    tensors: Mapping[str, Any],
    config: GPTConfig,
    cache: Mapping[str, Any],
    logits_dtype: str,
) -> None:
    """A prefill, decode or verify signature: its inputs and outputs, with their sizes and types."""
    name, head_dim = bucket.signature, config.head_dim
    free_tokens = bucket.free and bucket.is_prefill
    _Tensor(name, "tokens", tensors).has("int32", bucket.tokens, 1, free_tokens)
    shapes = {}  # of what is not flat: elements of one token
    if not bucket.is_prefill or "logits" in tensors:
        shapes["logits"] = config.vocab_size, logits_dtype
    if bucket.is_prefill:
        shapes["hidden"] = config.embedding_dim, "float32"
    for i, heads in enumerate(config.block_heads):
        for kind in "kv":
            shapes[f"new_{kind}_{i}"] = heads * head_dim, cache["dtype"]
            if cache.get("scales"):
                shapes[f"new_{kind}_scale_{i}"] = heads, "float32"
            if not bucket.capacity:
                continue
            groups = head_groups(f"{kind}_{i}", heads, bucket.group)
            for each, _, size in groups:
                _Tensor(name, each, tensors).has(
                    cache["dtype"], bucket.capacity, size * head_dim, bucket.free
                )
            if cache.get("scales"):
                scales = _Tensor(name, f"{kind}_scale_{i}", tensors)
                scales.has("float32", bucket.capacity, heads, bucket.free)
    for output, (elements, dtype) in shapes.items():
        rows = bucket.tokens
        if output == "logits" and bucket.is_prefill:
            rows = 1
        _Tensor(name, output, tensors).has(dtype, rows, elements, free_tokens)
    known = {*shapes, "tokens", "last", "position", "positions", "mask"}
    for other in tensors:
        _require(
            other in known or (bucket.capacity and other[:2] in ("k_", "v_")),
            name,
            other,
            "an input or output that is not known",
        )


def _head(logits: Mapping[str, Any], tensors: Mapping[str, Any], config: GPTConfig) -> None:
    """The signature that makes logits of hidden states."""
    name, rows, free = logits["signature"], logits["rows"], logits.get("free", False)
    _require(set(tensors) == {"hidden", "logits"}, name, "inputs and outputs", sorted(tensors))
    _Tensor(name, "hidden", tensors).has("float32", rows, config.embedding_dim, free)
    dtype = logits.get("dtype", "float32")
    _Tensor(name, "logits", tensors).has(dtype, rows, config.vocab_size, free)


def _logits(logits: Mapping[str, Any]) -> None:
    _require(_is_int(logits["rows"], 1, _MOST), "logits", "rows", logits["rows"])
    _require(_is_bool(logits.get("free", False)), "logits", "free", logits.get("free"))
    dtype = logits.get("dtype", "float32")
    _require(dtype in ("float32", "int8"), "logits", "dtype", dtype)
    if dtype == "int8":
        scale, zero_point = logits["scale"], logits["zero_point"]
        is_scale = isinstance(scale, float) and math.isfinite(scale) and scale > 0
        _require(is_scale, "logits", "scale", scale)
        _require(_is_int(zero_point, -128, 127), "logits", "zero_point", zero_point)


def _tokenizer(known: Any, config: GPTConfig) -> None:
    if known is None:
        return
    known, size = _mapping("tokenizer", known), config.vocab_size
    for name, most in (("eot_id", size - 1), ("vocab_size", size)):
        value = known.get(name)
        _require(value is None or _is_int(value, 0, most), "tokenizer", name, value)
    mark = known.get("fingerprint")
    _require(mark is None or isinstance(mark, str), "tokenizer", "fingerprint", mark)


class _Tensor:
    """An input or output of a signature."""

    def __init__(self, signature: str, name: str, tensors: Mapping[str, Any]) -> None:
        _require(name in tensors, signature, name, "no such input or output")
        self.signature, self.name, self.tensor = signature, name, tensors[name]

    def has(self, dtype: str, rows: int, elements: int, free: bool) -> None:
        """It holds `rows` of so many elements, or any number of rows where that is free, in a size
        of its own or together with them."""
        shape = [self.tensor.Shape(i) for i in range(self.tensor.ShapeLength())]
        sizes = [self.tensor.ShapeSignature(i) for i in range(self.tensor.ShapeSignatureLength())]
        count, fixed = math.prod(shape), [size for size in sizes if size != -1]
        if free:  # LiteRT is told what has to be free in the file
            fits = -1 in sizes and count > 0 and count % elements == 0
            fits &= not fixed or math.prod(fixed) == elements
        else:
            fits = -1 not in sizes and count == rows * elements
        fits &= self.tensor.Type() == _CODES[dtype]
        _require(fits, self.signature, self.name, f"{shape}, {sizes or 'fixed'}")


def _tensors(model: Any, graphs: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """The inputs and outputs of a signature, by name."""
    _require(isinstance(name, str) and name in graphs, "signature", "name", name)
    signature = graphs[name]
    graph = model.Subgraphs(signature.SubgraphIndex())
    maps = (*_all(signature, "Inputs"), *_all(signature, "Outputs"))
    return {m.Name().decode(): graph.Tensors(m.TensorIndex()) for m in maps}


def _all(table: Any, name: str) -> list[Any]:
    return [getattr(table, name)(i) for i in range(getattr(table, f"{name}Length")())]


def _length(model: Any) -> int:
    return len(model._tab.Bytes)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    _require(isinstance(value, dict), "it", name, value)
    return value


def _is_int(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _require(fits: Any, where: str, name: str, value: Any) -> None:
    if not fits:
        raise Unfit(f"{where}: {name} is {str(value)[:60]}")
