"""What a shape comes to: how many weights, and how many floating-point operations a token."""

from __future__ import annotations

import math

from tf_gptopt.models.checkpoints import weight_shapes
from tf_gptopt.models.config import GPTConfig


def weight_count(config: GPTConfig) -> int:
    """Weights of a model of this shape; a tied token table counts once."""
    return sum(math.prod(shape) for shape in weight_shapes(config).values())


def token_flops(config: GPTConfig, length: int) -> int:
    """FLOPs of one token forwards: `2 * weights + 4 * attention * length`.

    `weights` are those of the matrices (a token table counts for the logits, not for the look-up),
    `attention` is heads x head size over all blocks, which may differ in shape.

    Args:
        config: the shape.
        length: keys that each query is compared with.
    """
    shapes = weight_shapes(config)
    kernels = {name: math.prod(size) for name, size in shapes.items() if name.endswith("/kernel")}
    if config.tie_embeddings:
        kernels["token_logits"] = math.prod(shapes["token_embedding/embeddings"])
    attention = sum(heads * config.head_dim for heads in config.block_heads)
    return 2 * sum(kernels.values()) + 4 * attention * length
