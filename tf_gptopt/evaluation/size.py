"""How much room a model takes: parameters, those that are not zero, bytes, gzip bytes."""

from __future__ import annotations

import dataclasses
import os
import zlib
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Size:
    """What a model weighs.

    Args:
        parameters: numbers that training can change, counted once (a tied table is one).
        nonzero: those of them that are not zero.
        bytes: the size of the file that holds them.
        gzip_bytes: the size of that file after gzip at its default level: what a download weighs.
    """

    parameters: int
    nonzero: int
    bytes: int
    gzip_bytes: int


def file_bytes(path: str | os.PathLike) -> tuple[int, int]:
    """Bytes of a file, and of the same after gzip (level 6), read in pieces."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)  # 31: with a gzip header
    packed = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            packed += len(packer.compress(piece))
    return Path(path).stat().st_size, packed + len(packer.flush())
