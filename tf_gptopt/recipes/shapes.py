"""What each stage makes of a model's shape: a run is checked whole before it writes anything.

Needs no TensorFlow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from tf_gptopt._errors import UserError, suggest
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.data.corpus import corpus_files
from tf_gptopt.data.packing import DatasetInfo
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.recipes.places import model_place
from tf_gptopt.recipes.recipe import Recipe
from tf_gptopt.recipes.sections import ModelSection
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.memory import split_blocks
from tf_gptopt.training.parallel.mesh import Mesh
from tf_gptopt.training.plan import folder_shape

ROAD = ("train", "distill", "prune", "qat", "quantize", "export", "draft")
_MATRICES = ("qkv", "proj", "fc", "out")  # of a block


def check_recipe(recipe: Recipe) -> None:
    """Raise a `UserError` that names the stage for anything in a recipe that cannot be: text that
    is not there, a shape that is none, parts that a model does not have."""
    corpus_files(list(recipe.corpus.paths) or None)
    if recipe.corpus.valid:
        corpus_files(list(recipe.corpus.valid))
    context = recipe.dataset.sequence_length
    shape = None
    for name in ROAD:
        section = getattr(recipe, name)
        if section is None:
            continue
        try:
            if name == "train":
                shape = first_shape(section.model, recipe.tokenizer.vocab_size, context)
            shape = shape_after(section, shape, context)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def check_stage(name: str, section: Any, inputs: Mapping[str, Any]) -> None:
    """The same for one stage, from the folders that it reads."""
    dataset, context = inputs.get("dataset_folder"), None
    if dataset is not None:
        info = DatasetInfo.load(dataset)
        context = info.sequence_length
    folder = inputs.get("model_folder", inputs.get("teacher_folder"))
    if name == "train":
        shape_after(section, first_shape(section.model, info.vocab_size, context), context)
    elif folder is not None:
        shape_after(section, folder_shape(folder), context)


def first_shape(model: ModelSection, vocab_size: int, context: int) -> GPTConfig:
    """The teacher's shape."""
    values = dataclasses.asdict(model)
    return GPTConfig(vocab_size=vocab_size, max_sequence_length=context, **values)


def shape_after(section: Any, shape: GPTConfig | None, context: int | None) -> GPTConfig | None:
    """The shape that a stage leaves of a model of `shape`; None where only its training will tell.

    Args:
        section: the stage's.
        shape: None where it is not known, which leaves out what depends on it.
        context: tokens of the dataset's sequences; None for a stage that reads no dataset.

    Raises:
        UserError: for what a model of this shape does not have, or cannot be trained with.
    """
    for folder in getattr(section, "teachers", ()):
        if not (model_place(folder) / "config.json").is_file():
            raise UserError(f"There is no model in {folder}, which is named as a teacher.")
    if shape is not None:
        target = getattr(section, "student", None) or getattr(section, "target", None)
        if target is None and hasattr(section, "layers"):
            target = ShrinkConfig(layers=section.layers)
        if target is not None:
            shape = target.left_of(shape)
    if shape is not None and getattr(section, "quantization", None):
        section.quantization.layers_to_quantize(_matrices(shape))
    if shape is not None and getattr(section, "pruning", None):
        dense = _matrices(shape)[1:]
        for pattern in section.pruning.layers:
            if not any(fnmatchcase(name, pattern) for name in dense):
                raise UserError(
                    f"The pattern {pattern!r} names no Dense layer of the model."
                    f"{suggest(pattern, dense)}"
                )
    if hasattr(section, "fit") and not getattr(section, "one_shot", False):
        _check_fit(section.fit, shape, context)
    return shape


def _check_fit(fit: TrainConfig, shape: GPTConfig | None, context: int | None) -> None:
    if context is not None and fit.sequence_length not in (None, context):
        raise UserError(
            f"The dataset's sequences hold {context} tokens. Received: fit.sequence_length="
            f"{fit.sequence_length}. Leave it out, or change dataset.sequence_length."
        )
    if shape is None:
        return
    if fit.pipeline is not None:
        split_blocks(shape.num_layers, fit.pipeline)
    if fit.mesh is not None and (columns := Mesh.parse(fit.mesh).model) > min(shape.block_heads):
        raise UserError(
            f"The mesh {fit.mesh} divides attention heads among {columns} devices, and a block has "
            f"{min(shape.block_heads)}. Take fewer columns, or more heads."
        )
    if fit.recompute and shape.dropout:
        raise UserError(
            "A block that is computed again would draw other dropout masks. Received: "
            f"fit.recompute with dropout={shape.dropout}. Leave one of them out."
        )


def _matrices(shape: GPTConfig) -> list[str]:
    """Names of the layers with a matrix, the token table first."""
    blocks = [f"block_{i}_{part}" for i in range(shape.num_layers) for part in _MATRICES]
    return ["token_embedding", *blocks, *([] if shape.tie_embeddings else ["token_logits"])]
