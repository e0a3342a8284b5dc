"""Writes .tflite files: tensors and operations in, flatbuffer out. No TensorFlow is involved.

A GPT needs some twenty operations, so writing the flatbuffer directly is shorter than steering a
converter, and exact: the integers in the file are the ones that were given, every weight is stored
once however many signatures read it, and the graph holds no operation that was not asked for.

```python
model = Model()
table = model.grid(quantize_matrix(matrix, bits=4, group=32), "table")
graph = model.graph("lookup")
tokens = graph.input("tokens", [4], np.int32)
graph.output("rows", graph.embedding_lookup(tokens, table))
data = model.to_bytes()
```
"""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt.compression.quantization.grids import Grid
from tf_gptopt.tflite.graph import Graph
from tf_gptopt.tflite.tables import BufferTable, Builder
from tf_gptopt.tflite.tensors import Constant, pack_int4

# Operations of which more is used than their first version had (TFLite's op_version.cc).
_VERSIONS = {"FULLY_CONNECTED": 12, "EMBEDDING_LOOKUP": 4, "CAST": 5, "DEQUANTIZE": 3}


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
            scales: float32: integers of row r mean `array[r] * scales[r]`, or all of them
                `array * scales[0]`.
        """
        array = np.ascontiguousarray(array)
        key = None
        if array.nbytes <= 4096 and scales is None:
            key = (name, array.dtype, array.shape, array.tobytes())
            if key in self._constants:
                return self._constants[key]
        if scales is not None:
            scales = np.ascontiguousarray(scales, np.float32)
        buffer = self._add_buffer(array.reshape(-1).view(np.uint8))
        constant = Constant(array.shape, array.dtype, name, buffer, scales)
        if key is not None:
            self._constants[key] = constant
        return constant

    def grid(self, grid: Grid, name: str) -> Constant:
        """Store a quantized matrix `(rows, width)`: int8, or int4 two to a byte.

        Scales are float32, and those of blocks float16, which holds them exactly.
        """
        if grid.bits == 8:
            return self.constant(grid.integers, name, grid.scales[:, 0])
        scales: np.ndarray | Constant = grid.scales[:, 0]
        if grid.block:
            scales = self.constant(grid.scales.astype(np.float16))
        buffer = self._add_buffer(pack_int4(grid.integers))
        dtype = grid.integers.dtype
        return Constant(grid.integers.shape, dtype, name, buffer, scales, is_int4=True)

    def graph(self, signature: str) -> Graph:
        """A new graph, callable by the name `signature`."""
        graph = Graph(self, signature, len(self._model.subgraphs))
        self._model.subgraphs.append(graph.subgraph)
        self._model.signatureDefs.append(graph.signature)
        return graph

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

    def opcode(self, name: str) -> int:
        """The number of an operation in this file."""
        if name not in self._opcodes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, name)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = _VERSIONS.get(name, 1)
            self._opcodes[name] = len(self._model.operatorCodes)
            self._model.operatorCodes.append(code)
        return self._opcodes[name]

    def _add_buffer(self, data: np.ndarray) -> int:
        self._model.buffers.append(BufferTable(data))
        return len(self._model.buffers) - 1
