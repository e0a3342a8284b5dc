"""Reads the weights back out of a .tflite file's bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.rounding import TABLE
from tf_gptopt.tflite.tensors import TYPES, unpack_int4


def read_weights(data: Any) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """The named constants in the bytes of a .tflite file: values and, of quantized ones, scales.

    Returns:
        Values in the shapes of the file: views into `data` in its types, and int4 unpacked to int8.
        Scales float32: `(1,)` for all values, `(rows,)`, or `(rows, blocks)`.
    """
    model = schema.Model.GetRootAsModel(data, 0)
    found = {}
    for graph, tensor in constants(model):
        name = tensor_name(tensor)
        if name and name not in found:
            found[name] = _values(model, tensor), _scales(model, graph, tensor)
    return found


def constants(model: Any) -> Iterator[tuple[Any, Any]]:
    """The tensors of all subgraphs that have numbers in the file, each behind its subgraph."""
    filled = {i for i in range(model.BuffersLength()) if model.Buffers(i).DataLength()}
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        for tensor in (graph.Tensors(i) for i in range(graph.TensorsLength())):
            if tensor.Buffer() in filled:
                yield graph, tensor


def tensor_name(tensor: Any) -> str:
    """Its name in the file, or nothing."""
    return (tensor.Name() or b"").decode("utf-8", "replace")


def block_scales(graph: Any, quantization: Any) -> Any | None:
    """The tensor that holds the scales of blocks of weights; None of weights without."""
    if quantization.DetailsType() != schema.QuantizationDetails.BlockwiseQuantization:
        return None
    details = schema.BlockwiseQuantization()
    details.Init(quantization.Details().Bytes, quantization.Details().Pos)
    return graph.Tensors(details.Scales())


def held_weights(
    stored: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """A file's weights as numbers, float32, the way a model has them that computes what it does.

    Args:
        stored: what `read_weights` gives for a file that `export_tflite` wrote.
        shapes: of the model's weights, by the names that `named_weights` gives them.

    Returns:
        Arrays of these names and shapes, kernels `(in, out)`. What was folded into the layer behind
        it is not in the file: gamma is 1 then, and beta 0.

    Raises:
        UserError: when the file lacks one, or has it in another shape.
    """
    weights = {}
    for name, shape in shapes.items():
        if name not in stored and name.endswith(("/gamma", "/beta")):
            weights[name] = np.full(shape, name.endswith("/gamma"), np.float32)
            continue
        values = dequantized(*stored[name]) if name in stored else np.empty(0)
        if name == TABLE and values.shape[-1] == shape[1] + 1:  # `weights.with_even_rows`
            values = values[:, :-1]
        weights[name] = values.T if name.endswith("/kernel") else values
        if weights[name].shape != tuple(shape):
            raise UserError(f"The file does not hold the weight {name!r} in the shape {shape}.")
    return weights


def dequantized(values: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """What `read_weights` gives for a constant, as float32 numbers."""
    if scales is None:
        return np.asarray(values, np.float32)
    blocks = 1 if scales.ndim == 1 else scales.shape[1]
    rows = scales.size // blocks
    grouped = values.reshape(rows, blocks, -1) * scales.reshape(rows, blocks, 1)
    return grouped.astype(np.float32, copy=False).reshape(values.shape)


def count_weights(data: Any) -> tuple[int, int]:
    """Numbers in the named constants of a .tflite file, and those that are not zero."""
    return count_stored(read_weights(data))


def count_stored(stored: Mapping[str, tuple[np.ndarray, np.ndarray | None]]) -> tuple[int, int]:
    """`count_weights` of what `read_weights` gave."""
    arrays = [values for values, _ in stored.values()]
    return sum(a.size for a in arrays), sum(int(np.count_nonzero(a)) for a in arrays)


def _values(model: Any, tensor: Any) -> np.ndarray:
    types = {number: dtype for dtype, number in TYPES.items()}
    data = model.Buffers(tensor.Buffer()).DataAsNumpy()
    shape = tensor.ShapeAsNumpy()
    if tensor.Type() == schema.TensorType.INT4:
        return unpack_int4(data, tuple(shape))
    return data.view(types[tensor.Type()]).reshape(shape)


def _scales(model: Any, graph: Any, tensor: Any) -> np.ndarray | None:
    quantization = tensor.Quantization()
    if quantization is None:
        return None
    blocks = block_scales(graph, quantization)
    if blocks is None:
        return quantization.ScaleAsNumpy()
    return _values(model, blocks).astype(np.float32)
