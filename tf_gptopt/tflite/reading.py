"""Reads the weights back out of a .tflite file's bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt.tflite.tensors import TYPES, unpack_int4


def read_weights(data: Any) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """The named constants in the bytes of a .tflite file: values and, of quantized ones, scales.

    Returns:
        Values in the shapes of the file: views into `data` in its types, and int4 unpacked to int8.
        Scales float32: `(1,)` for all values, `(rows,)`, or `(rows, blocks)`.
    """
    model = schema.Model.GetRootAsModel(data, 0)
    found = {}
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        for tensor in (graph.Tensors(i) for i in range(graph.TensorsLength())):
            name = (tensor.Name() or b"").decode()
            if name and name not in found and model.Buffers(tensor.Buffer()).DataLength():
                found[name] = _values(model, tensor), _scales(model, graph, tensor)
    return found


def count_weights(data: Any) -> tuple[int, int]:
    """Numbers in the named constants of a .tflite file, and those that are not zero."""
    arrays = [values for values, _ in read_weights(data).values()]
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
    if quantization.DetailsType() != schema.QuantizationDetails.BlockwiseQuantization:
        return quantization.ScaleAsNumpy()
    details = schema.BlockwiseQuantization()
    details.Init(quantization.Details().Bytes, quantization.Details().Pos)
    return _values(model, graph.Tensors(details.Scales())).astype(np.float32)
