"""Which weight of a GPT is cut along what, and back again. Needs no TensorFlow.

Weights are named and shaped as in `models/checkpoints.py`. A weight that is cut has one piece per
column of the mesh; where a size does not divide (25 heads, 50257 tokens), the first pieces are one
larger. The fused qkv kernel is `(width, 3 x heads x head_dim)`, queries, keys and values side by
side, so cutting its columns would tear them apart: it is cut by head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.models.config import GPTConfig


class Cut(NamedTuple):
    """How one weight is cut.

    Attributes:
        view: the weight's shape with the cut axis apart, and -1 there.
        axis: of `view`.
        flat: the shape of a piece, and -1 on the axis that was cut.
    """

    view: tuple[int, ...]
    axis: int
    flat: tuple[int, ...]


def cut_of(name: str, config: GPTConfig) -> Cut | None:
    """How the weight of this name is cut; None when it stays whole."""
    width, head_dim = config.embedding_dim, config.head_dim
    cuts = {
        "token_embedding/embeddings": Cut((-1, width), 0, (-1, width)),
        "token_logits/kernel": Cut((width, -1), 1, (width, -1)),
        "qkv/kernel": Cut((width, 3, -1, head_dim), 2, (width, -1)),
        "qkv/bias": Cut((3, -1, head_dim), 1, (-1,)),
        "proj/kernel": Cut((-1, head_dim, width), 0, (-1, width)),
        "fc/kernel": Cut((width, -1), 1, (width, -1)),
        "fc/bias": Cut((-1,), 0, (-1,)),
        "out/kernel": Cut((-1, width), 0, (-1, width)),
    }
    return cuts.get(re.sub(r"^block_\d+_", "", name))


def split_weight(name: str, weight: np.ndarray, config: GPTConfig, count: int) -> list[np.ndarray]:
    """The `count` pieces of a weight, or the weight alone when it stays whole."""
    cut = cut_of(name, config)
    if cut is None:
        return [weight]
    pieces = np.array_split(weight.reshape(cut.view), count, cut.axis)
    return [np.ascontiguousarray(piece).reshape(cut.flat) for piece in pieces]


def join_weight(name: str, pieces: Sequence[np.ndarray], config: GPTConfig) -> np.ndarray:
    """The weight whose pieces these are: the inverse of `split_weight`, for gradients too."""
    cut = cut_of(name, config)
    if cut is None:
        return pieces[0]
    joined = np.concatenate([piece.reshape(cut.view) for piece in pieces], cut.axis)
    return joined.reshape(cut.flat)


def sizes(total: int, count: int) -> list[int]:
    """`total` things in `count` nearly equal shares, the larger ones first."""
    return [total // count + (i < total % count) for i in range(count)]


def check_columns(config: GPTConfig, columns: int) -> None:
    """That every column has something to hold.

    Raises:
        UserError: when a block has fewer heads or neurons than there are columns.
    """
    counted: Mapping[str, int] = {
        "attention heads (num_heads)": min(config.block_heads),
        "neurons (intermediate_dim)": min(config.block_intermediate_dims),
        "tokens (vocab_size)": config.vocab_size,
    }
    for what, least in counted.items():
        if least < columns:
            raise UserError(
                f"A mesh with model={columns} divides the {what} of every block among {columns} "
                f"devices, and a block has {least}. Take model={least} or less, and give the other "
                "devices to the batch axis."
            )
