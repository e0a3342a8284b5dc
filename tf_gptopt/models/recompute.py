"""A GPT cut into its blocks, and blocks that are computed again for their gradient.

Activation recomputation keeps the input of every block and nothing inside it: the backward pass
computes a block's inside again when its turn comes (Chen et al. 2016, "Training Deep Nets with
Sublinear Memory Cost", arXiv:1604.06174). That is a third more arithmetic, and instead of some 20
arrays of `(batch, time, width)` a block leaves one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gptopt._keras import keras


class Parts(NamedTuple):
    """A GPT as Functional models, one after another, that share its layers.

    Attributes:
        front: token ids -> the residual stream `(batch, time, width)`, and the token table.
        blocks: each from the residual stream to the residual stream.
        back: the residual stream, and the table where it is tied, -> logits.
    """

    front: keras.Model
    blocks: list[keras.Model]
    back: keras.Model


def cut(model: Any) -> Parts:
    """The parts of `model`, a `GPTModel`, wrapped or not."""
    _, table = model.base_layer("token_embedding").output
    streams = [model.base_layer("block_0_attention_norm").input]
    for i in range(model.config.num_layers):
        streams.append(model.base_layer(f"block_{i}_mlp_add").output)
    last = [streams[-1], table] if model.config.tie_embeddings else streams[-1]
    return Parts(
        keras.Model(model.inputs[0], [streams[0], table]),
        [keras.Model(start, end) for start, end in itertools.pairwise(streams)],
        keras.Model(last, model.outputs[0]),
    )


def recomputed(block: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """`block` in training, its inside computed again for the gradient. It must have no dropout,
    which would draw other masks the second time."""
    return tf.recompute_grad(lambda x: block(x, training=True))


def recomputing(model: Any) -> Callable[[tf.Tensor], tf.Tensor]:
    """The forward pass of `model` for training, every block recomputed."""
    front, blocks, back = cut(model)

    def forward(token_ids: tf.Tensor) -> tf.Tensor:
        x, table = front(token_ids, training=True)
        for block in blocks:
            x = recomputed(block)(x)
        return back([x, table] if model.config.tie_embeddings else x, training=True)

    return forward
