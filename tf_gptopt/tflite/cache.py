"""A conversation's memory: keys and values in aligned host arrays, which LiteRT reads in place.

A step returns the new tokens' keys and values alone, and they are written to their rows: no token
copies what was there before. When the rows are used up, the cache moves once to a larger capacity.

Wherever an exception or Ctrl-C strikes, `tokens[:length]` are those whose keys and values are
there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ai_edge_litert.tensor_buffer import TensorBuffer

from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.buckets import head_groups
from tf_gptopt.tflite.litert import Memory, host_buffer
from tf_gptopt.tflite.stacks import Stack

_HIDDEN = -1e9  # what the score of a row that is not in use is lowered by


class Inputs(NamedTuple):
    """Inputs of a signature by name: LiteRT's buffers, and how many elements each has."""

    buffers: dict[str, TensorBuffer]
    sizes: dict[str, int]


class KVCache:
    """Keys and values of the tokens so far: `k_{i}` and `v_{i}`, `(num_heads, capacity, head_dim)`.

    Row p belongs to position p. Rows from `length` on may hold any numbers; nothing looks at them:
    setting `length` back forgets the last tokens, at no cost.

    Args:
        config: the model's.
        stacks: how the arrays of all blocks lie in one: of keys and values, float32 or int8, and
            where each row of a head has a scale, of those: `k_scale_{i}` and `v_scale_{i}`,
            `(num_heads, capacity)` float32.

    Attributes:
        length: tokens in the cache.
        capacity: rows.
        tokens: `(context,)` int32, of which the first `length` are those in the cache.
    """

    def __init__(self, config: GPTConfig, stacks: Sequence[Stack]) -> None:
        self.length = 0
        self.capacity = 0
        self.tokens = np.zeros(config.max_sequence_length, np.int32)
        self._stacks = stacks
        self._wholes: list[np.ndarray] = []  # one for each of the stacks
        self._mask = np.zeros(0, np.float32)
        self._memory = Memory()
        self._inputs: dict[int, Inputs] = {}

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(whole.nbytes for whole in self._wholes)

    def rewind(self, ids: np.ndarray) -> int:
        """Forget all but the first tokens that `ids` begins with too, and fewer than all of `ids`:
        what is left of them to read then gives logits.

        Args:
            ids: `(time,)` int32, at least one.

        Returns:
            How many tokens are left, the new `length`.
        """
        most = min(self.length, len(ids) - 1)
        differs = self.tokens[:most] != ids[:most]
        self.length = int(differs.argmax()) if differs.any() else most
        return self.length

    def copy(self) -> KVCache:
        """The same tokens, in memory of their own."""
        other = copy.copy(self)
        other.tokens, other._memory, other._inputs = self.tokens.copy(), Memory(), {}
        if self.capacity:
            other.resize(self.capacity)
        return other

    def resize(self, capacity: int) -> None:
        """Move to arrays of this capacity; the rows in use come along."""
        length, self.length = self.length, 0  # until all have moved, none is there
        old, self._wholes, self._inputs, self.capacity = self._wholes, [], {}, 0
        memory = Memory()
        wholes = [memory.zeros(stack.shape(capacity), stack.dtype) for stack in self._stacks]
        for whole, before in zip(wholes, old, strict=False):  # there are none at first
            whole[:, :length] = before[:, :length]
        self._memory = memory  # the old one is given back here
        self._mask = memory.zeros((capacity,), np.float32)
        self._wholes, self.capacity, self.length = wholes, capacity, length

    def inputs(self, group: int) -> Inputs:
        """What a signature reads: the arrays, in groups of so many heads (`buckets.head_groups`),
        and the `mask` of the rows in use."""
        self._mask[: self.length], self._mask[self.length :] = 0, _HIDDEN
        if group not in self._inputs:
            parts = {"mask": self._mask} | {
                part: array[first : first + heads]
                for stack, whole in zip(self._stacks, self._wholes, strict=True)
                for name, array in stack.parts(whole).items()
                for part, first, heads in head_groups(name, len(array), group * (array.ndim == 3))
            }
            self._inputs[group] = Inputs(
                {name: host_buffer(part) for name, part in parts.items()},
                {name: part.size for name, part in parts.items()},
            )
        return self._inputs[group]

    def append(self, ids: np.ndarray, new: Sequence[np.ndarray]) -> None:
        """Take over what these tokens left: the first rows of an array for each of the stacks."""
        count = len(ids)
        end = self.length + count
        self.tokens[self.length : end] = ids
        for whole, rows in zip(self._wholes, new, strict=True):
            whole[:, self.length : end] = rows[:, :count]
        self.length = end
