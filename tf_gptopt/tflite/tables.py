"""The tables of a .tflite file, written compactly: what is equal is written once.

TFLite's schema lets tables and vectors be shared, but the generated `Pack` methods write each
anew: shapes, options, and for every signature all scales again. In a small model with many
signatures that would be a third of the file, and in GPT-2's 1.6 MB a signature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema


class Builder(flatbuffers.Builder):
    """A flatbuffer in the making that writes equal parts once."""

    __slots__ = ("_written",)

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._written: dict[Any, int] = {}

    def once(self, key: Any, write: Callable[[], int]) -> int:
        """The offset of what `write` writes, from its first call with this `key`."""
        if key not in self._written:
            self._written[key] = write()
        return self._written[key]

    def CreateString(self, text: str, *args: Any) -> int:
        create = super().CreateString
        return self.once(text, lambda: create(text, *args))

    def array(self, values: Sequence[int] | np.ndarray, dtype: Any = np.int32) -> int:
        values = np.asarray(values, dtype)
        return self.once((dtype, values.tobytes()), lambda: self.CreateNumpyVector(values))


class TensorTable(schema.TensorT):
    def Pack(self, builder: Builder) -> int:
        name = builder.CreateString(self.name) if self.name else None
        quantization = self.quantization and self.quantization.Pack(builder)
        shape = builder.array(self.shape)
        signature = builder.array(self.shapeSignature) if self.shapeSignature else None
        schema.TensorStart(builder)
        schema.TensorAddShape(builder, shape)
        if signature:
            schema.TensorAddShapeSignature(builder, signature)
        schema.TensorAddType(builder, self.type)
        schema.TensorAddBuffer(builder, self.buffer)
        if name:
            schema.TensorAddName(builder, name)
        if quantization:
            schema.TensorAddQuantization(builder, quantization)
        return schema.TensorEnd(builder)


class OperatorTable(schema.OperatorT):
    def Pack(self, builder: Builder) -> int:
        options = self.builtinOptions
        if options is not None:
            key = (type(options), *vars(options).values())
            options = builder.once(key, lambda: self.builtinOptions.Pack(builder))
        inputs, outputs = builder.array(self.inputs), builder.array(self.outputs)
        schema.OperatorStart(builder)
        schema.OperatorAddOpcodeIndex(builder, self.opcodeIndex)
        schema.OperatorAddInputs(builder, inputs)
        schema.OperatorAddOutputs(builder, outputs)
        if options is not None:
            schema.OperatorAddBuiltinOptionsType(builder, self.builtinOptionsType)
            schema.OperatorAddBuiltinOptions(builder, options)
        return schema.OperatorEnd(builder)


class BufferTable(schema.BufferT):
    """A buffer whose bytes start at a multiple of 16, as the schema's `force_align` wants and the
    generated Python code forgets."""

    def Pack(self, builder: Builder) -> int:
        size = self.data.size
        if size:
            builder.StartVector(1, size, 16)
            builder.head -= size
            builder.Bytes[builder.Head() : builder.Head() + size] = memoryview(self.data)
            data = builder.EndVector()
        schema.BufferStart(builder)
        if size:
            schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


class Scales(schema.QuantizationParametersT):
    """Integers that mean `(q - zero_point) * scale`: one scale for all, or one for each row.

    TFLite insists on a zero point (8 bytes) for every scale.
    """

    def Pack(self, builder: Builder) -> int:
        scale = builder.array(self.scale, np.float32)
        zero_point = builder.array(self.zeroPoint, np.int64)

        def write() -> int:
            schema.QuantizationParametersStart(builder)
            schema.QuantizationParametersAddScale(builder, scale)
            schema.QuantizationParametersAddZeroPoint(builder, zero_point)
            return schema.QuantizationParametersEnd(builder)

        return builder.once(("scales", scale, zero_point), write)


class BlockScales(schema.QuantizationParametersT):
    """Integers with a scale for each block of neighbours in a row.

    Args:
        tensor: the scales' index in the same subgraph, float16 `(rows, blocks)`.
        block: weights of a block.
    """

    def __init__(self, tensor: int, block: int) -> None:
        super().__init__()
        self.detailsType = schema.QuantizationDetails.BlockwiseQuantization
        self.details = schema.BlockwiseQuantizationT(scales=tensor, zeroPoints=-1, blockSize=block)

    def Pack(self, builder: Builder) -> int:
        key = ("blocks", self.details.scales, self.details.blockSize)
        pack = super().Pack
        return builder.once(key, lambda: pack(builder))
