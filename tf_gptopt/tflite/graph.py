"""One function of a .tflite file: inputs, operations, outputs.

Every method returns a tensor with the shape that TFLite will infer. Sizes that are `Free` may be
others at run time: a reshape then leaves that size to TFLite, and can do so for one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt.tflite.tables import BlockScales, OperatorTable, Scales, TensorTable
from tf_gptopt.tflite.tensors import (
    TYPES,
    Affine,
    Constant,
    Free,
    Tensor,
    broadcast,
    shape_signature,
)

if TYPE_CHECKING:
    from tf_gptopt.tflite.flatbuffer import Model

_ELEMENTWISE = {
    "ADD": "Add",
    "SUB": "Sub",
    "MUL": "Mul",
    "DIV": "Div",
    "MINIMUM": "MaximumMinimum",
    "MAXIMUM": "MaximumMinimum",
}


class Graph:
    """A function in the making, callable by its signature's name."""

    def __init__(self, model: Model, signature: str, index: int) -> None:
        self.model = model
        self.subgraph = schema.SubGraphT()
        self.subgraph.name = signature
        self.subgraph.tensors, self.subgraph.operators = [], []
        self.subgraph.inputs, self.subgraph.outputs = [], []
        self.signature = schema.SignatureDefT()
        self.signature.signatureKey = signature
        self.signature.subgraphIndex = index
        self.signature.inputs, self.signature.outputs = [], []
        self._constants: dict[Constant, int] = {}

    # Interface

    def input(
        self, name: str, shape: Sequence[int], dtype: Any = np.float32, affine: Affine | None = None
    ) -> Tensor:
        tensor = self._tensor(shape, np.dtype(dtype), name, affine)
        self.subgraph.inputs.append(tensor.index)
        self.signature.inputs.append(_named(name, tensor.index))
        return tensor

    def output(self, name: str, tensor: Tensor) -> None:
        self.subgraph.tensors[tensor.index].name = name
        self.subgraph.outputs.append(tensor.index)
        self.signature.outputs.append(_named(name, tensor.index))

    # Operations

    def elementwise(
        self, name: str, a: Tensor, b: Tensor | Constant, affine: Affine | None = None
    ) -> Tensor:
        """ADD, SUB, MUL, DIV, MINIMUM or MAXIMUM, with broadcasting; of int8 tensors the result is
        rounded to `affine`."""
        shape = broadcast(a.shape, b.shape)
        return self._op(name, [a, b], shape, a.dtype, affine, options=_ELEMENTWISE[name])

    def abs(self, x: Tensor) -> Tensor:
        return self._op("ABS", [x], x.shape, options="Abs")

    def exp(self, x: Tensor) -> Tensor:
        return self._op("EXP", [x], x.shape, options="Exp")

    def rsqrt(self, x: Tensor) -> Tensor:
        return self._op("RSQRT", [x], x.shape)

    def gelu(self, x: Tensor, approximate: bool = True) -> Tensor:
        """The tanh approximation, or the exact one."""
        return self._op("GELU", [x], x.shape, options="Gelu", approximate=approximate)

    def relu(self, x: Tensor) -> Tensor:
        return self._op("RELU", [x], x.shape)

    def softmax(self, x: Tensor) -> Tensor:
        return self._op("SOFTMAX", [x], x.shape, options="Softmax", beta=1.0)

    def cast(self, x: Tensor, dtype: Any) -> Tensor:
        types = {"inDataType": TYPES[x.dtype], "outDataType": TYPES[np.dtype(dtype)]}
        return self._op("CAST", [x], x.shape, dtype, options="Cast", **types)

    def quantize(self, x: Tensor, affine: Affine) -> Tensor:
        """float32 -> int8, to the nearest, and the even one of two."""
        return self._op("QUANTIZE", [x], x.shape, np.int8, affine, options="Quantize")

    def dequantize(self, x: Tensor | Constant) -> Tensor:
        """int8, int4 or float16 -> float32. XNNPACK does it to constants once, when it loads them.

        Of constants in blocks LiteRT would make zeros.
        """
        assert not (isinstance(x, Constant) and isinstance(x.scales, Constant)), x.name
        return self._op("DEQUANTIZE", [x], x.shape, np.float32, options="Dequantize")

    def mean(self, x: Tensor) -> Tensor:
        """Over the last axis, which stays with size 1."""
        return self._reduce("MEAN", x)

    def max(self, x: Tensor) -> Tensor:
        """Over the last axis, which stays with size 1."""
        return self._reduce("REDUCE_MAX", x)

    def sum(self, x: Tensor, axis: int) -> Tensor:
        """Over `axis`, which stays with size 1."""
        return self._reduce("SUM", x, axis)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        assert math.prod(shape) == math.prod(x.shape), (x.shape, shape)
        assert sum(isinstance(size, Free) for size in shape) <= 1, shape
        new = self.model.constant(np.array(shape_signature(shape), np.int32))
        return self._op("RESHAPE", [x, new], shape, x.dtype, x.affine)

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        order = self.model.constant(np.array(axes, np.int32))
        shape = [x.shape[a] for a in axes]
        return self._op("TRANSPOSE", [x, order], shape, x.dtype, x.affine, options="Transpose")

    def split(self, x: Tensor, parts: int, axis: int) -> list[Tensor]:
        """Equal parts along `axis`."""
        at = self.model.constant(np.array(axis, np.int32))
        shape = list(x.shape)
        shape[axis] //= parts
        outputs = [self._tensor(shape, x.dtype, affine=x.affine) for _ in range(parts)]
        self._emit("SPLIT", [at, x], outputs, "Split", numSplits=parts)
        return outputs

    def slice(self, x: Tensor, begin: Sequence[int], size: Sequence[int]) -> Tensor:
        """`size` elements from `begin` on; a free size reaches to the end."""
        end = [first + count for first, count in zip(begin, size, strict=True)]
        to_end = [isinstance(count, Free) for count in size]
        assert all(e == full for e, full, free in zip(end, x.shape, to_end, strict=True) if free)
        bounds = begin, end, [1] * len(end)
        return self._op(
            "STRIDED_SLICE",
            [x, *(self.model.constant(np.array(values, np.int32)) for values in bounds)],
            size,
            x.dtype,
            x.affine,
            options="StridedSlice",
            endMask=sum(free << axis for axis, free in enumerate(to_end)),
        )

    def pad(self, x: Tensor, width: int) -> Tensor:
        """Zeros behind the last axis, which then has this width; no operation where it has it."""
        if x.shape[-1] == width:
            return x
        amounts = np.zeros((len(x.shape), 2), np.int32)
        amounts[-1, 1] = width - x.shape[-1]
        return self._op("PAD", [x, self.model.constant(amounts)], (*x.shape[:-1], width))

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
        """Rows of `table` `(rows, width)`, of integers as float32; an id out of range is an error
        at run time."""
        shape = (*ids.shape, table.shape[1])
        dtype = np.float32 if table.dtype == np.int8 else table.dtype
        return self._op("EMBEDDING_LOOKUP", [ids, table], shape, dtype)

    def dense(
        self,
        x: Tensor,
        weights: Constant | Tensor,
        bias: Constant | None = None,
        affine: Affine | None = None,
    ) -> Tensor:
        """`x @ weights.T + bias`: x `(rows, in)`, weights `(out, in)`, bias `(out,)`.

        With float32 x, integer weights and float32 bias, each row of x is quantized at run time
        (asymmetric int8, its own scale). With int8 x the bias is int32 in units of x's scale times
        the weights', and the result int8, rounded to `affine`. Sums are int32 in both.
        """
        return self._op(
            "FULLY_CONNECTED",
            [x, weights, bias],
            (*x.shape[:-1], weights.shape[0]),
            x.dtype,
            affine,
            options="FullyConnected",
            asymmetricQuantizeInputs=x.dtype != weights.dtype,
            keepNumDims=len(x.shape) != 2,
        )

    def matmul(
        self, a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False
    ) -> Tensor:
        """Of the last two axes; the axes before them are equal or broadcast."""
        rows = a.shape[-1] if transpose_a else a.shape[-2]
        columns = b.shape[-2] if transpose_b else b.shape[-1]
        batch = broadcast(a.shape[:-2], b.shape[:-2])
        flags = {"adjX": transpose_a, "adjY": transpose_b}
        return self._op(
            "BATCH_MATMUL", [a, b], (*batch, rows, columns), options="BatchMatMul", **flags
        )

    # Plumbing

    def _reduce(self, name: str, x: Tensor, axis: int = -1) -> Tensor:
        shape = list(x.shape)
        shape[axis] = 1
        axes = self.model.constant(np.array([axis % len(shape)], np.int32))
        return self._op(name, [x, axes], shape, options="Reducer", keepDims=True)

    def _op(
        self,
        name: str,
        inputs: Sequence[Tensor | Constant | None],
        shape: Sequence[int],
        dtype: Any = np.float32,
        affine: Affine | None = None,
        options: str = "",
        **values: Any,
    ) -> Tensor:
        output = self._tensor(shape, np.dtype(dtype), affine=affine)
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
        self.subgraph.operators.append(
            OperatorTable(
                opcodeIndex=self.model.opcode(name),
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
            quantization = None
            if isinstance(value.scales, Constant):
                block = value.shape[1] // value.scales.shape[1]
                quantization = BlockScales(self._index(value.scales), block)
            elif value.scales is not None:
                zeros = np.zeros(len(value.scales))
                quantization = Scales(scale=value.scales, zeroPoint=zeros)
            index = self._tensor(value.shape, value.dtype, value.name).index
            table = self.subgraph.tensors[index]
            table.buffer, table.quantization = value.buffer, quantization
            if value.is_int4:
                table.type = schema.TensorType.INT4
            self._constants[value] = index
        return self._constants[value]

    def _tensor(
        self, shape: Sequence[int], dtype: np.dtype, name: str = "", affine: Affine | None = None
    ) -> Tensor:
        shape = tuple(shape)
        table = TensorTable(shape=list(shape), type=TYPES[dtype], name=name)
        if any(isinstance(size, Free) for size in shape):
            table.shapeSignature = shape_signature(shape)
        if affine is not None:
            table.quantization = Scales(scale=[affine.scale], zeroPoint=[affine.zero_point])
        self.subgraph.tensors.append(table)
        return Tensor(self, len(self.subgraph.tensors) - 1, shape, dtype, affine)


def _named(name: str, index: int) -> schema.TensorMapT:
    return schema.TensorMapT(name=name, tensorIndex=index)
