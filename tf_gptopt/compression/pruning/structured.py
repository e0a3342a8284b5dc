"""Smaller models out of larger ones: whole parts leave, and what remains is copied."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.pruning.magnitude import strip_pruning
from tf_gptopt.models.gpt import GPTModel, require_gpt


def shrink(model: GPTModel, layers: int | Sequence[int]) -> GPTModel:
    """A shallower copy of `model`: some of its blocks, with everything around them.

    ```python
    student = shrink(teacher, layers=6)     # of 12 blocks: 0, 2, 4, 7, 9, 11
    ```

    A number keeps that many blocks, evenly spaced, the first and the last among them: the choice of
    DistilGPT2 (Hugging Face, 2019), which follows DistilBERT's finding that a student copied from
    its teacher's layers learns far better than a fresh one (Sanh et al. 2019, arXiv:1910.01108).
    Distil it afterwards. Removing depth buys more speed than removing width, and costs more quality
    (Muralidharan et al. 2024, "Minitron", arXiv:2407.14679).

    Args:
        model: a `GPTModel`; it stays untouched. One that is being pruned is stripped first.
        layers: how many blocks to keep, or which: their indices, ascending.

    Returns:
        A new, plain `GPTModel` with copied weights, the same dtype policy and tokenizer, made in
        the current strategy scope and not compiled.

    Raises:
        UserError: when `model` is no GPTModel or has not these blocks.
    """
    require_gpt(model)
    kept = _choose_blocks(layers, model.config.num_layers)
    model = strip_pruning(model)
    config = dataclasses.replace(
        model.config,
        num_layers=len(kept),
        num_heads=tuple(model.config.block_heads[i] for i in kept),
        intermediate_dim=tuple(model.config.block_intermediate_dims[i] for i in kept),
    )
    with _dtype_policy(model.base_layer("block_0_qkv").dtype_policy):
        small = GPTModel.from_gpt_config(config, name=model.name)
    small.tokenizer, small.sampler = model.tokenizer, model.sampler
    for layer in small.layers:
        if layer.weights:
            layer.set_weights(model.base_layer(_source_name(layer.name, kept)).get_weights())
    return small


def evenly_spaced(keep: int, num_layers: int) -> tuple[int, ...]:
    """`keep` of the blocks `0 ... num_layers - 1`, the first and (for two or more) the last too."""
    return tuple(int(i) for i in np.round(np.linspace(0, num_layers - 1, keep)))


def _choose_blocks(layers: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    if isinstance(layers, (int, np.integer)) and not isinstance(layers, bool):
        if not 1 <= layers <= num_layers:
            raise UserError(
                f"The model has {num_layers} blocks, so layers must be 1 to {num_layers}, or a "
                f"list of indices. Received: layers={layers}."
            )
        return evenly_spaced(int(layers), num_layers)
    listed = isinstance(layers, (Sequence, np.ndarray)) and not isinstance(layers, str)
    if not listed or not all(isinstance(i, (int, np.integer)) for i in layers):
        raise UserError(
            "layers must be a number of blocks or a list of their indices. "
            f"Received: layers={layers!r}."
        )
    kept = tuple(int(i) for i in layers)
    ascending = kept and all(a < b for a, b in itertools.pairwise(kept))
    if not ascending or kept[0] < 0 or kept[-1] >= num_layers:
        raise UserError(
            f"layers must list ascending indices between 0 and {num_layers - 1}, each once. "
            f"Received: layers={list(kept)}."
        )
    return kept


def _source_name(name: str, kept: tuple[int, ...]) -> str:
    """The layer that the small model's layer `name` copies: `block_1_fc` -> `block_3_fc`."""
    if not name.startswith("block_"):
        return name
    _, index, part = name.split("_", 2)
    return f"block_{kept[int(index)]}_{part}"


@contextlib.contextmanager
def _dtype_policy(policy: keras.mixed_precision.Policy) -> Iterator[None]:
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(policy)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)
