"""Activation recomputation: training that keeps the input of every block and nothing inside it.

The backward pass computes a block's inside again when its turn comes (Chen et al. 2016, "Training
Deep Nets with Sublinear Memory Cost", arXiv:1604.06174): a third more arithmetic, and instead of
some 20 arrays of `(batch, time, width)` a block leaves one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras


def recomputing(model: Any) -> Callable[[tf.Tensor], tf.Tensor]:
    """The forward pass of `model` (a `GPTModel`, wrapped or not) for training, block by block.

    It must have no dropout, which would draw other masks the second time."""
    x, table = model.base_layer("token_embedding").output
    x = model.base_layer("position_embedding").output
    first = keras.Model(model.inputs, [x, table])
    blocks = []
    for i in range(model.config.num_layers):
        end = model.base_layer(f"block_{i}_mlp_add").output
        blocks.append(keras.Model(x, end, name=f"recomputed_{i}"))
        x = end
    tied = model.config.tie_embeddings
    last = keras.Model([x, table] if tied else x, model.outputs)

    def forward(token_ids: tf.Tensor) -> tf.Tensor:
        x, table = first(token_ids, training=True)
        for block in blocks:
            x = _recomputed(block)(x)
        return last([x, table] if tied else x, training=True)

    return forward


def _recomputed(block: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    return tf.recompute_grad(lambda x: block(x, training=True))
