"""What a .tflite graph computes with: constants and tensors, and how integers mean numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

if TYPE_CHECKING:
    from tf_gptopt.tflite.graph import Graph

TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.float16): schema.TensorType.FLOAT16,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int8): schema.TensorType.INT8,
}


class Free(int):
    """A size that may be another one at run time; its value is what the file begins with.

    What is added to it or multiplied with it is free as well.
    """

    def __add__(self, other: int) -> Free:
        return Free(int(self) + int(other))

    def __mul__(self, other: int) -> Free:
        return Free(int(self) * int(other))

    __radd__, __rmul__ = __add__, __mul__


def is_one(size: int) -> bool:
    """Whether a size is 1 and stays so."""
    return size == 1 and not isinstance(size, Free)


def shape_signature(shape: Sequence[int]) -> list[int]:
    """The shape as TFLite writes one: -1 for a free size."""
    return [-1 if isinstance(size, Free) else size for size in shape]


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """numpy's broadcasting, which keeps free sizes free."""
    sizes = np.broadcast_shapes(*shapes)
    aligned = [(1,) * (len(sizes) - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(
        Free(size) if any(isinstance(shape[axis], Free) for shape in aligned) else size
        for axis, size in enumerate(sizes)
    )


class Affine(NamedTuple):
    """int8 values of a tensor: `q` means `(q - zero_point) * scale`."""

    scale: float
    zero_point: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An array in the file, known to all graphs.

    Args:
        shape: of the numbers.
        dtype: of the numbers; int8 for int4 ones as well.
        name: in the file.
        buffer: where the bytes are.
        scales: of integers: `(1,)` for all, `(rows,)`, or the constant that has those of blocks,
            float16 `(rows, blocks)`.
        is_int4: whether two numbers share a byte.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    name: str
    buffer: int
    scales: np.ndarray | Constant | None = None
    is_int4: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A value in one graph; `+`, `-`, `*` and `/` broadcast as in numpy."""

    graph: Graph
    index: int
    shape: tuple[int, ...]
    dtype: np.dtype
    affine: Affine | None = None  # of int8 ones

    def __add__(self, other: Tensor | Constant) -> Tensor:
        return self.graph.elementwise("ADD", self, other)

    def __sub__(self, other: Tensor | Constant) -> Tensor:
        return self.graph.elementwise("SUB", self, other)

    def __mul__(self, other: Tensor | Constant) -> Tensor:
        return self.graph.elementwise("MUL", self, other)

    def __truediv__(self, other: Tensor | Constant) -> Tensor:
        return self.graph.elementwise("DIV", self, other)


def pack_int4(integers: np.ndarray) -> np.ndarray:
    """Integers -8..7 two to a byte, the earlier in the lower half; an odd one out has 0 above."""
    flat = integers.reshape(-1)
    packed = np.zeros((flat.size + 1) // 2, np.uint8)
    packed[:] = flat[0::2] & 15
    packed[: flat.size // 2] |= (flat[1::2] << 4).view(np.uint8)
    return packed


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The int8 array that `pack_int4` packed."""
    flat = np.empty(2 * packed.size, np.int8)
    flat[0::2] = (packed << 4).view(np.int8) >> 4
    flat[1::2] = packed.view(np.int8) >> 4
    return flat[: int(np.prod(shape))].reshape(shape)
