"""Writes .tflite files: tensors and operations in, flatbuffer out. No TensorFlow is involved.

A GPT needs some fifteen operations, so writing the flatbuffer directly is shorter than steering a
converter, and exact: the int8 values in the file are the ones that were given, every weight is
stored once however many signatures read it, and the graph holds no operation that was not asked
for.

```python
model = Model()
table = model.constant(np.zeros([50, 8], "int8"), "table", scales=np.ones(50, "float32"))
graph = model.graph("lookup")
tokens = graph.input("tokens", [4], np.int32)
graph.output("rows", graph.embedding_lookup(tokens, table))
data = model.to_bytes()
```
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt.tflite.tables import BufferTable, Builder, OperatorTable, RowScales, TensorTable

_TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.float16): schema.TensorType.FLOAT16,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int8): schema.TensorType.INT8,
}

# Operations of which more is used than their first version had (TFLite's op_version.cc).
_VERSIONS = {"FULLY_CONNECTED": 12, "EMBEDDING_LOOKUP": 4, "CAST": 5, "DEQUANTIZE": 3}


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An array in the file, known to all graphs: `scales` (one a row) make it a quantized one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    name: str
    buffer: int
    quantization: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A value in one graph; `+`, `-` and `*` broadcast as in numpy."""

    graph: Graph
    index: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __add__(self, other: Tensor | Constant) -> Tensor:
        return self.graph.elementwise("ADD", self, other)

    def __sub__(self, other: Tensor | Constant) -> Tensor:
        return self.graph.elementwise("SUB", self, other)

    def __mul__(self, other: Tensor | Constant) -> Tensor:
        return self.graph.elementwise("MUL", self, other)


class Model:
    """A .tflite file in the making: constants, graphs (each with its signature) and metadata."""

    def __init__(self, description: str = "") -> None:
        self._model = schema.ModelT()
        self._model.version = 3
        self._model.description = description
        self._model.operatorCodes = []
        self._model.buffers = [BufferTable(np.zeros(0, np.uint8))]  # number 0 means "no data"
        self._model.subgraphs = []
        self._model.signatureDefs = []
        self._model.metadata = []
        self._constants: dict[tuple, Constant] = {}
        self._opcodes: dict[str, int] = {}

    def constant(
        self, array: np.ndarray, name: str = "", scales: np.ndarray | None = None
    ) -> Constant:
        """Store `array`; small ones of equal name and content are stored once.

        Args:
            array: float32, float16, int32 or int8.
            scales: `(rows,)` float32: row r of an int8 array means `array[r] * scales[r]`.
        """
        array = np.ascontiguousarray(array)
        key = None
        if array.nbytes <= 4096 and scales is None:
            key = (name, array.dtype, array.shape, array.tobytes())
            if key in self._constants:
                return self._constants[key]
        quantization = None
        if scales is not None:
            quantization = RowScales(scale=np.ascontiguousarray(scales, np.float32))
        buffer = self._add_buffer(array.reshape(-1).view(np.uint8))
        constant = Constant(array.shape, array.dtype, name, buffer, quantization)
        if key is not None:
            self._constants[key] = constant
        return constant

    def graph(self, signature: str) -> Graph:
        """A new graph, callable by the name `signature`."""
        return Graph(self, signature)

    def metadata(self, name: str, data: bytes) -> None:
        """Attach named bytes, as `read_metadata` gives them back."""
        entry = schema.MetadataT()
        entry.name, entry.buffer = name, self._add_buffer(np.frombuffer(data, np.uint8))
        self._model.metadata.append(entry)

    def to_bytes(self) -> bytes:
        """The finished flatbuffer."""
        size = sum(buffer.data.nbytes for buffer in self._model.buffers)
        builder = Builder(size + size // 64 + 2**20)  # it would grow by doubling and copying
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return builder.Output()

    def _add_buffer(self, data: np.ndarray) -> int:
        self._model.buffers.append(BufferTable(data))
        return len(self._model.buffers) - 1

    def _opcode(self, name: str) -> int:
        if name not in self._opcodes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, name)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = _VERSIONS.get(name, 1)
            self._opcodes[name] = len(self._model.operatorCodes)
            self._model.operatorCodes.append(code)
        return self._opcodes[name]


class Graph:
    """One function of the file: inputs, operations, outputs, under a signature's name.

    Shapes are static, and every method returns a tensor with the shape that TFLite will infer.
    """

    def __init__(self, model: Model, signature: str) -> None:
        self.model = model
        self._subgraph = schema.SubGraphT()
        self._subgraph.name = signature
        self._subgraph.tensors, self._subgraph.operators = [], []
        self._subgraph.inputs, self._subgraph.outputs = [], []
        self._constants: dict[Constant, int] = {}
        self._signature = schema.SignatureDefT()
        self._signature.signatureKey = signature
        self._signature.subgraphIndex = len(model._model.subgraphs)
        self._signature.inputs, self._signature.outputs = [], []
        model._model.subgraphs.append(self._subgraph)
        model._model.signatureDefs.append(self._signature)

    # Interface

    def input(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> Tensor:
        tensor = self._tensor(shape, np.dtype(dtype), name)
        self._subgraph.inputs.append(tensor.index)
        self._signature.inputs.append(_named(name, tensor.index))
        return tensor

    def output(self, name: str, tensor: Tensor) -> None:
        self._subgraph.tensors[tensor.index].name = name
        self._subgraph.outputs.append(tensor.index)
        self._signature.outputs.append(_named(name, tensor.index))

    # Operations

    def elementwise(self, name: str, a: Tensor, b: Tensor | Constant) -> Tensor:
        """ADD, SUB, MUL, MINIMUM, ..., with broadcasting."""
        options = {"ADD": "Add", "SUB": "Sub", "MUL": "Mul", "MINIMUM": "MaximumMinimum"}[name]
        shape = np.broadcast_shapes(a.shape, b.shape)
        return self._op(name, [a, b], shape, a.dtype, options=options)

    def minimum(self, a: Tensor, b: Tensor | Constant) -> Tensor:
        return self.elementwise("MINIMUM", a, b)

    def rsqrt(self, x: Tensor) -> Tensor:
        return self._op("RSQRT", [x], x.shape)

    def gelu(self, x: Tensor) -> Tensor:
        """The tanh approximation."""
        return self._op("GELU", [x], x.shape, options="Gelu", approximate=True)

    def softmax(self, x: Tensor) -> Tensor:
        return self._op("SOFTMAX", [x], x.shape, options="Softmax", beta=1.0)

    def cast(self, x: Tensor, dtype: Any) -> Tensor:
        types = {"inDataType": _TYPES[x.dtype], "outDataType": _TYPES[np.dtype(dtype)]}
        return self._op("CAST", [x], x.shape, dtype, options="Cast", **types)

    def dequantize(self, x: Constant) -> Tensor:
        """float16 -> float32 (XNNPACK reads the float16 weights and drops the operation)."""
        return self._op("DEQUANTIZE", [x], x.shape, np.float32, options="Dequantize")

    def mean(self, x: Tensor) -> Tensor:
        """Over the last axis, which stays with size 1."""
        axis = self.model.constant(np.array([len(x.shape) - 1], np.int32))
        shape = (*x.shape[:-1], 1)
        return self._op("MEAN", [x, axis], shape, options="Reducer", keepDims=True)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        assert math.prod(shape) == math.prod(x.shape), (x.shape, shape)
        new = self.model.constant(np.array(shape, np.int32))
        return self._op("RESHAPE", [x, new], shape, x.dtype)

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        order = self.model.constant(np.array(axes, np.int32))
        return self._op("TRANSPOSE", [x, order], [x.shape[a] for a in axes], options="Transpose")

    def split(self, x: Tensor, parts: int, axis: int) -> list[Tensor]:
        """Equal parts along `axis`."""
        at = self.model.constant(np.array(axis, np.int32))
        shape = list(x.shape)
        shape[axis] //= parts
        outputs = [self._tensor(shape, x.dtype) for _ in range(parts)]
        self._emit("SPLIT", [at, x], outputs, "Split", numSplits=parts)
        return outputs

    def slice(self, x: Tensor, begin: Sequence[int], size: Sequence[int]) -> Tensor:
        start, length = (self.model.constant(np.array(v, np.int32)) for v in (begin, size))
        return self._op("SLICE", [x, start, length], size, x.dtype, options="Slice")

    def part(self, x: Tensor, start: int, count: int) -> Tensor:
        """`x[start : start + count]`; no operation where that is all of x."""
        if count == x.shape[0]:
            return x
        rest = x.shape[1:]
        return self.slice(x, [start, *(0 for _ in rest)], [count, *rest])

    def concatenate(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        if len(parts) > 4:  # XNNPACK takes few inputs
            front = self.concatenate(parts[:4], axis)
            return self.concatenate([front, *parts[4:]], axis)
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self._op("CONCATENATION", parts, shape, options="Concatenation", axis=axis)

    def embedding_lookup(self, ids: Tensor, table: Constant | Tensor) -> Tensor:
        """Rows of `table` `(rows, width)`, int8 ones as float32; an id out of range is an error
        at run time."""
        shape = (*ids.shape, table.shape[1])
        dtype = np.float32 if table.dtype == np.int8 else table.dtype
        return self._op("EMBEDDING_LOOKUP", [ids, table], shape, dtype)

    def dense(self, x: Tensor, weights: Constant | Tensor, bias: Constant | None = None) -> Tensor:
        """`x @ weights.T + bias`: x `(rows, in)`, weights `(out, in)`, bias `(out,)` float32.

        With int8 weights each row of x is quantized at run time (asymmetric int8, its own scale)
        and the products are summed in int32.
        """
        quantized = weights.dtype == np.int8
        return self._op(
            "FULLY_CONNECTED",
            [x, weights, bias],
            (*x.shape[:-1], weights.shape[0]),
            options="FullyConnected",
            asymmetricQuantizeInputs=quantized,
            keepNumDims=len(x.shape) != 2,
        )

    def matmul(
        self, a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False
    ) -> Tensor:
        """Of the last two axes; the axes before them are equal or broadcast."""
        rows = a.shape[-1] if transpose_a else a.shape[-2]
        columns = b.shape[-2] if transpose_b else b.shape[-1]
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        flags = {"adjX": transpose_a, "adjY": transpose_b}
        return self._op(
            "BATCH_MATMUL", [a, b], (*batch, rows, columns), options="BatchMatMul", **flags
        )

    # Plumbing

    def _op(
        self,
        name: str,
        inputs: Sequence[Tensor | Constant | None],
        shape: Sequence[int],
        dtype: Any = np.float32,
        options: str = "",
        **values: Any,
    ) -> Tensor:
        output = self._tensor(shape, np.dtype(dtype))
        self._emit(name, inputs, [output], options, **values)
        return output

    def _emit(
        self,
        name: str,
        inputs: Sequence[Tensor | Constant | None],
        outputs: Sequence[Tensor],
        options: str,
        **values: Any,
    ) -> None:
        table = None
        if options:
            table = getattr(schema, options + "OptionsT")()
            for key, value in values.items():
                setattr(table, key, value)
        self._subgraph.operators.append(
            OperatorTable(
                opcodeIndex=self.model._opcode(name),
                inputs=[self._index(x) for x in inputs],
                outputs=[x.index for x in outputs],
                builtinOptionsType=getattr(schema.BuiltinOptions, options + "Options", 0),
                builtinOptions=table,
            )
        )

    def _index(self, value: Tensor | Constant | None) -> int:
        if value is None:
            return -1  # TFLite's "optional input left out"
        if isinstance(value, Tensor):
            assert value.graph is self
            return value.index
        if value not in self._constants:
            tensor = self._tensor(value.shape, value.dtype, value.name)
            self._subgraph.tensors[tensor.index].buffer = value.buffer
            self._subgraph.tensors[tensor.index].quantization = value.quantization
            self._constants[value] = tensor.index
        return self._constants[value]

    def _tensor(self, shape: Sequence[int], dtype: np.dtype, name: str = "") -> Tensor:
        tensor = TensorTable(shape=list(shape), type=_TYPES[dtype], name=name)
        self._subgraph.tensors.append(tensor)
        return Tensor(self, len(self._subgraph.tensors) - 1, tuple(map(int, shape)), dtype)


def read_weights(data: Any) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """The named constants in the bytes of a .tflite file: values and, of quantized ones, scales.

    The arrays are views into `data`, in the shapes and types of the file.
    """
    types = {number: dtype for dtype, number in _TYPES.items()}
    model = schema.Model.GetRootAsModel(data, 0)
    found = {}
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        for tensor in (graph.Tensors(i) for i in range(graph.TensorsLength())):
            name = (tensor.Name() or b"").decode()
            buffer = model.Buffers(tensor.Buffer())
            if not name or name in found or not buffer.DataLength():
                continue
            values = buffer.DataAsNumpy().view(types[tensor.Type()]).reshape(tensor.ShapeAsNumpy())
            quantization = tensor.Quantization()
            scales = quantization.ScaleAsNumpy() if quantization is not None else None
            found[name] = values, scales
    return found


def count_weights(data: Any) -> tuple[int, int]:
    """Numbers in the named constants of a .tflite file, and those that are not zero."""
    arrays = [values for values, _ in read_weights(data).values()]
    return sum(a.size for a in arrays), sum(int(np.count_nonzero(a)) for a in arrays)


def _named(name: str, index: int) -> schema.TensorMapT:
    return schema.TensorMapT(name=name, tensorIndex=index)
