"""Taking units out of a GPT: what is left is a smaller dense model with the same function of them.

A unit is a block, an attention head, a neuron of an MLP, or a channel of the residual stream. Every
weight is a matrix between two kinds of them, so taking units out is taking rows and columns out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tf_gptopt.models.checkpoints import assign_weights, named_weights
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.gpt import GPTModel


class Units(NamedTuple):
    """One array for every group of units that compete with each other: scores, gates or indices.

    Attributes:
        layers: of the blocks, `(num_layers,)`.
        heads: per block of the model, `(num_heads,)`.
        neurons: per block of the model, `(intermediate_dim,)`.
        channels: of the residual stream, `(embedding_dim,)`.
    """

    layers: Any
    heads: list[Any]
    neurons: list[Any]
    channels: Any


def all_units(config: GPTConfig) -> Units:
    """The indices of every unit that there is."""
    return Units(
        np.arange(config.num_layers),
        [np.arange(heads) for heads in config.block_heads],
        [np.arange(neurons) for neurons in config.block_intermediate_dims],
        np.arange(config.embedding_dim),
    )


def shape_of(config: GPTConfig, kept: Units) -> GPTConfig:
    """The shape that is left of `config`."""
    return dataclasses.replace(
        config,
        num_layers=len(kept.layers),
        num_heads=tuple(len(kept.heads[i]) for i in kept.layers),
        intermediate_dim=tuple(len(kept.neurons[i]) for i in kept.layers),
        embedding_dim=len(kept.channels),
    )


def extract(model: GPTModel, kept: Units) -> GPTModel:
    """A new model out of `kept`'s units of `model`, in their order.

    Args:
        model: plain, without wrappers; it stays untouched.
        kept: indices; those of heads and neurons in blocks that go do not matter.

    Returns a plain `GPTModel` with `model`'s dtype policy, tokenizer and sampler, made in the
    current strategy scope and not compiled.
    """
    policy = model.base_layer("block_0_qkv").dtype_policy
    small = GPTModel.from_gpt_config(shape_of(model.config, kept), dtype=policy, name=model.name)
    small.tokenizer, small.sampler = model.tokenizer, model.sampler
    assign_weights(small, slice_weights(named_weights(model), model.config, kept))
    return small


def slice_weights(
    weights: Mapping[str, np.ndarray], config: GPTConfig, kept: Units
) -> dict[str, np.ndarray]:
    """The small model's weights, by its names, out of those of a model of shape `config`."""
    small = {}
    for name, array in weights.items():
        block = re.match(r"block_(\d+)_(.*)", name)
        if block is None:
            small[name] = _take(array, name, kept.channels)
        elif int(block[1]) in kept.layers:
            old = int(block[1])
            new = int(np.flatnonzero(np.asarray(kept.layers) == old)[0])
            columns = _head_columns(kept.heads[old], config.head_dim)
            inner = config.block_heads[old] * config.head_dim
            small[f"block_{new}_{block[2]}"] = _take(
                array, block[2], kept.channels, columns, inner, kept.neurons[old]
            )
    return small


def _take(
    array: np.ndarray,
    name: str,
    channels: np.ndarray,
    columns: np.ndarray | None = None,
    inner: int = 0,
    neurons: np.ndarray | None = None,
) -> np.ndarray:
    layer, _, weight = name.partition("/")
    if layer == "qkv":  # queries, keys and values side by side
        rows, columns = channels, np.concatenate([columns + part * inner for part in range(3)])
    elif layer == "proj":
        rows, columns = columns, channels
    elif layer == "fc":
        rows, columns = channels, neurons
    elif layer == "out":
        rows, columns = neurons, channels
    elif layer == "token_logits":
        return array[channels]
    else:  # embeddings (rows, width), gamma and beta (width,)
        return array[..., channels]
    return array[columns] if weight == "bias" else array[np.ix_(rows, columns)]


def _head_columns(heads: np.ndarray, head_dim: int) -> np.ndarray:
    return (np.asarray(heads)[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
