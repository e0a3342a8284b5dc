"""A file's functions by the sizes that they take, as its metadata lists them."""

from __future__ import annotations

import dataclasses

ALIGNMENT = 64  # bytes: what LiteRT wants of host memory that it reads in place
# rows: free capacities are multiples of it, so that groups of heads begin where LiteRT can read
CAPACITY_STEP = 32
# tokens of a draft and one more: XNNPACK multiplies as many with a matrix in one pass over it, on a
# processor with AVX-512 (others: 4)
VERIFY_LENGTH = 5


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A prefill, decode or verify signature: `tokens` at once, over `capacity` rows of cache (or
    none), of which each input holds those of `group` heads (0: of all).

    A `free` one takes any smaller cache as well, and if it is a prefill, fewer tokens.
    """

    signature: str
    tokens: int
    capacity: int
    group: int = 0
    free: bool = False

    @property
    def is_decode(self) -> bool:
        return self.signature.startswith("decode")

    @property
    def is_prefill(self) -> bool:
        return self.signature.startswith("prefill")


def head_groups(name: str, heads: int, group: int) -> list[tuple[str, int, int]]:
    """The inputs that a block's keys or values come in by: name, first head, number of heads.

    Args:
        name: `"k_0"`: one input of that name, or with a `group` of 4 those named `"k_0_0"`,
            `"k_0_4"`, ..., for the heads from there on.
        heads: the block's.
        group: heads to an input, 0 for all.
    """
    if not group:
        return [(name, 0, heads)]
    return [(f"{name}_{at}", at, min(group, heads - at)) for at in range(0, heads, group)]
