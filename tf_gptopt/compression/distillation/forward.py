"""A model's forward pass that also hands out what lies inside, so that each model runs once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.recompute import cut, recomputed

Forward = Callable[..., tuple[tf.Tensor | None, dict[str, tf.Tensor]]]


def forward_with_taps(model: GPTModel, taps: Sequence[str], logits: bool = True) -> Forward:
    """`forward(token_ids, training) -> (logits, {tap: its output})` over the layers of `model`.

    Args:
        model: plain or wrapped. With `model.recompute` its blocks are computed again for their
            gradient, and what is handed out is kept.
        taps: base names of layers inside the blocks, `"block_0_qkv"`.
        logits: without them the layers behind the last tap are not run, and None is handed out.
    """
    names = list(dict.fromkeys(taps))
    inside = {name: model.base_layer(name).output for name in names}
    last = [model.outputs[0]] if logits else []
    whole = keras.Model(model.inputs[0], [*last, *inside.values()])

    def forward(token_ids: Any, training: bool | None = None) -> tuple[Any, dict[str, Any]]:
        if model.recompute and training is True:
            return _recomputing(model, inside)(token_ids)
        if not names:
            return model(token_ids, training=training), {}
        outputs = tf.nest.flatten(whole(token_ids, training=training))
        found = outputs.pop(0) if logits else None
        return found, dict(zip(names, outputs, strict=True))

    return forward


def _recomputing(model: GPTModel, inside: dict[str, Any]) -> Forward:
    parts = cut(model)
    stream, blocks = model.base_layer("block_0_attention_norm").input, []
    for i in range(model.config.num_layers):
        end = f"block_{i}_mlp_add"
        names = [end, *(n for n in inside if n.startswith(f"block_{i}_") and n != end)]
        outputs = [model.base_layer(name).output for name in names]
        blocks.append((keras.Model(stream, outputs), names))
        stream = outputs[0]

    def forward(token_ids: Any) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        x, table = parts.front(token_ids, training=True)
        found = {}
        for block, names in blocks:
            outputs = tf.nest.flatten(recomputed(block)(x))
            x = outputs[0]
            found |= dict(zip(names, outputs, strict=True))
        return parts.back([x, table] if model.config.tie_embeddings else x, training=True), found

    return forward
