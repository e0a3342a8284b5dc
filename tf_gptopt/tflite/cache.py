"""A conversation's memory: keys and values in aligned host arrays, which LiteRT reads in place.

A step returns the new tokens' keys and values alone, and they are written to their rows: no token
copies what was there before. When the rows are used up, the cache moves once to the next capacity
that has a signature.
"""

from __future__ import annotations

import numpy as np
from ai_edge_litert.tensor_buffer import TensorBuffer

from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.litert import aligned_zeros, host_buffer


class KVCache:
    """Keys and values of the tokens so far: `k_{i}` and `v_{i}`, `(num_heads, capacity, head_dim)`.

    Row p belongs to position p. Rows from `length` on may hold any numbers; nothing looks at them:
    setting `length` back forgets the last tokens, at no cost.

    Args:
        config: the model's.
        dtype: of keys and values, `"float32"` or `"int8"`.
        scales: whether each row of a head has a scale beside it, in `k_scale_{i}` and
            `v_scale_{i}`, `(num_heads, capacity)` float32.

    Attributes:
        length: tokens in the cache.
        capacity: rows.
        tokens: `(context,)` int32, of which the first `length` are those in the cache.
    """

    def __init__(self, config: GPTConfig, dtype: str = "float32", scales: bool = False) -> None:
        self.length = 0
        self.capacity = 0
        self.tokens = np.zeros(config.max_sequence_length, np.int32)
        self.buffers: dict[str, TensorBuffer] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._config, self._dtype, self._scales = config, np.dtype(dtype), scales

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(array.nbytes for array in self._arrays.values())

    def resize(self, capacity: int) -> None:
        """Move to arrays of this capacity; the rows in use come along."""
        old, self._arrays = self._arrays, {}
        for i, heads in enumerate(self._config.block_heads):
            rows = (heads, capacity)
            for kind in ("k", "v"):
                self._add(f"{kind}_{i}", (*rows, self._config.head_dim), self._dtype, old)
                if self._scales:
                    self._add(f"{kind}_scale_{i}", rows, np.dtype(np.float32), old)
        self.buffers = {name: host_buffer(array) for name, array in self._arrays.items()}
        self.capacity = capacity

    def _add(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, old: dict[str, np.ndarray]
    ) -> None:
        self._arrays[name] = aligned_zeros(shape, dtype)
        if self.length:
            self._arrays[name][:, : self.length] = old.pop(name)[:, : self.length]

    def append(self, ids: np.ndarray, outputs: dict[str, np.ndarray]) -> None:
        """Take over what these tokens left: the first rows of `new_k_{i}`, `new_v_{i}` and their
        scales."""
        count = len(ids)
        end = self.length + count
        self.tokens[self.length : end] = ids
        for name, array in self._arrays.items():
            array[:, self.length : end] = outputs[f"new_{name}"][:, :count]
        self.length = end
