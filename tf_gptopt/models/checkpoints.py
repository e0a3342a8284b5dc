"""A GPT on disk: a folder of config.json, model.safetensors and the tokenizer's files.

```
config.json          {"format": "tf_gptopt", "format_version": 1, "gpt": {...}, ...}
model.safetensors    float32 arrays by layer and weight: "block_0_qkv/kernel" (in, out), ...
tokenizer.json       (and what comes with it) when the model has a tokenizer
```

All of them change at once (`_folder.py`), and each is checked when it is read: config.json names
the sha256 of the others and carries its own. Hugging Face GPT-2 folders are read
too (`load_checkpoint`) and written (`save_checkpoint`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._files import check_seal, file_digest, read_json, sealed
from tf_gptopt._folder import changing, settled
from tf_gptopt._keras import keras
from tf_gptopt._tokenizer import (
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    Tokenizer,
    as_tokenizer,
    has_tokenizer,
)
from tf_gptopt.models import huggingface
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.finite import check_finite
from tf_gptopt.models.gpt import GPTModel, require_gpt
from tf_gptopt.models.safetensors_file import read_with_digest, write_tensors

__all__ = [
    "assign_weights",
    "load_checkpoint",
    "load_model",
    "named_weights",
    "save_checkpoint",
    "save_model",
    "weight_shapes",
]

FORMAT = "tf_gptopt"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMATS = (FORMAT, "huggingface")


# Weights by name


def weight_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a model of this shape, in the order of its layers."""
    width = config.embedding_dim

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}/gamma": (width,), f"{name}/beta": (width,)}

    def dense(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}/kernel": (rows, columns), f"{name}/bias": (columns,)}

    shapes = {
        "token_embedding/embeddings": (config.vocab_size, width),
        "position_embedding/embeddings": (config.max_sequence_length, width),
    }
    blocks = zip(config.block_heads, config.block_intermediate_dims, strict=True)
    for i, (heads, neurons) in enumerate(blocks):
        inner = heads * config.head_dim
        shapes |= norm(f"block_{i}_attention_norm")
        shapes |= dense(f"block_{i}_qkv", width, 3 * inner)
        shapes |= dense(f"block_{i}_proj", inner, width)
        shapes |= norm(f"block_{i}_mlp_norm")
        shapes |= dense(f"block_{i}_fc", width, neurons)
        shapes |= dense(f"block_{i}_out", neurons, width)
    shapes |= norm("final_norm")
    if not config.tie_embeddings:
        shapes["token_logits/kernel"] = (width, config.vocab_size)
    return shapes


def named_weights(model: GPTModel) -> dict[str, np.ndarray]:
    """Copies of a plain model's weights, float32, by names like `"block_0_qkv/kernel"`.

    Raises:
        UserError: for a model with pruning or quantization wrappers: strip them first.
    """
    return {name: np.array(w.numpy(), np.float32) for name, w in _variables(model).items()}


def assign_weights(model: GPTModel, weights: Mapping[str, np.ndarray]) -> None:
    """Set every weight of a plain model; nothing is assigned unless all of them fit.

    Raises:
        UserError: for missing, unexpected or wrongly shaped weights, and for wrapped models.
    """
    variables = _variables(model)
    _check_fit({name: tuple(variable.shape) for name, variable in variables.items()}, weights)
    for name, variable in variables.items():
        variable.assign(np.asarray(weights[name]).astype(variable.dtype.as_numpy_dtype))


def _check_fit(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, np.ndarray]) -> None:
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(shapes)} weights are missing: {_some(missing)}. "
            "The weights belong to another shape of model, or the file is incomplete."
        )
    unexpected = [name for name in weights if name not in shapes]
    if unexpected:
        hint = suggest(unexpected[0], shapes) if len(unexpected) == 1 else ""
        raise UserError(
            f"The model has no weights named {_some(unexpected)}.{hint} The weights belong to "
            "another shape of model (num_layers, tie_embeddings)."
        )
    for name, expected in shapes.items():
        received = np.shape(weights[name])
        if expected != received:
            raise UserError(
                f"Weight {name!r} has the wrong shape. Expected {expected}. Received {received}. "
                "Build the model with the shape that the weights were trained in."
            )


def _variables(model: GPTModel) -> dict[str, Any]:
    require_gpt(model)
    for layer in model.layers:
        if isinstance(getattr(layer, "layer", None), keras.layers.Layer):
            raise UserError(
                f"The model is wrapped for pruning or quantization-aware training (layer "
                f"{layer.name!r}). Call strip_pruning or strip_quantization on it first."
            )
    variables = {
        f"{layer.name}/{_last_name(weight)}": weight
        for layer in model.layers
        for weight in layer.weights
    }
    expected = weight_shapes(model.config)
    if variables.keys() != expected.keys():
        raise UserError(
            "The model is not a plain GPT: it has other weights than its config says "
            f"({_some(sorted(variables.keys() ^ expected.keys()))}). Call strip_pruning or "
            "strip_quantization on it first."
        )
    return {name: variables[name] for name in expected}


def _last_name(weight: Any) -> str:
    return weight.name.rpartition("/")[2].partition(":")[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# Folders


def save_model(
    model: GPTModel,
    folder: str | os.PathLike,
    tokenizer: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a plain model to `folder`; a model that is there is replaced as a whole, in one moment.

    Args:
        model: without pruning or quantization wrappers.
        folder: made when absent.
        tokenizer: anything with `save(folder)`; default `model.tokenizer`.
        extra: more keys for config.json, JSON values.

    Raises:
        UserError: for a wrapped model, weights that are NaN or infinite, a tokenizer with more
            tokens than the model has, an unwritable folder and a full disk.
    """
    weights = named_weights(model)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "gpt": model.config.to_dict(),
    }
    if model.activation_ranges is not None:
        config["activation_ranges"] = {
            name: [float(low), float(high)] for name, (low, high) in model.activation_ranges.items()
        }
    for key in extra or {}:
        if key in config:
            raise UserError(f"extra must not contain {key!r}: the checkpoint format owns it.")
    _save_folder(model, folder, tokenizer, {**config, **(extra or {})}, weights, {"format": FORMAT})


def load_model(folder: str | os.PathLike, **dropouts: float | None) -> GPTModel:
    """Read a folder that `save_model` wrote, its tokenizer included (`model.tokenizer`); `dropouts`
    as `load_checkpoint`.

    Raises:
        UserError: when the folder is absent, incomplete, damaged or of another format.
    """
    folder, config = _read_config(folder)
    if config.get("format") != FORMAT:
        raise UserError(
            f"{folder} is not a tf_gptopt checkpoint (its config.json has format="
            f"{config.get('format')!r}). load_checkpoint also reads Hugging Face GPT-2 folders."
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} has format_version {version!r} and this tf_gptopt reads "
            f"{FORMAT_VERSION}. Upgrade tf_gptopt or save the model again."
        )
    if not isinstance(config.get("gpt"), dict):
        raise UserError(f"{folder / CONFIG_FILE} lacks the model's shape ('gpt'). Save it again.")
    try:
        shape = GPTConfig.from_dict(config["gpt"])
    except TypeError as error:
        raise UserError(f"{folder / CONFIG_FILE}: 'gpt' is incomplete ({error}).") from None
    ranges = _read_ranges(folder, config.get("activation_ranges"))
    check_seal(folder / CONFIG_FILE, config)
    weights, digest = read_with_digest(folder / WEIGHTS_FILE)
    _check_sizes(folder, shape, weights)
    if config.get("weights_sha256", digest) != digest:
        raise UserError(
            f"{folder / WEIGHTS_FILE} holds other weights than {CONFIG_FILE} was written with: one "
            "was replaced, or the folder is being written. Load it again, copy the whole folder "
            "again, or save the model again."
        )
    shape = shape.with_dropout(**dropouts)
    model = _build(folder, shape, weights, tokenizer_hash=config.get("tokenizer_sha256"))
    model.activation_ranges = ranges
    return model


def load_checkpoint(path: str | os.PathLike, **dropouts: float | None) -> GPTModel:
    """Read a tf_gptopt folder or a Hugging Face GPT-2 folder (safetensors).

    Args:
        path: the folder.
        **dropouts: rates instead of those that the model was trained with, which nothing but
            training depends on: `dropout` for all of them, `embedding_dropout`,
            `attention_dropout`. Hugging Face's GPT-2 has 0.1; `dropout=0.0` lets it `recompute`.

    Raises:
        UserError: when the folder is neither, incomplete or damaged, or uses an option of
            Hugging Face's GPT-2 that changes the architecture.
    """
    folder, config = _read_config(path)
    if config.get("format") == FORMAT:
        return load_model(folder, **dropouts)
    if "model_type" not in config:
        raise UserError(
            f"{folder} is neither a tf_gptopt checkpoint nor a Hugging Face one: its config.json "
            "has no 'format' and no 'model_type'."
        )
    shape, weights = huggingface.read_gpt2(folder, config)
    _check_sizes(folder, shape, weights)
    return _build(folder, shape.with_dropout(**dropouts), weights)


def save_checkpoint(
    model: GPTModel, folder: str | os.PathLike, format: str = FORMAT, tokenizer: Any = None
) -> None:
    """Write a plain model as `format`: `"tf_gptopt"`, or `"huggingface"` for `transformers`.

    Raises:
        UserError: as `save_model`; and for `"huggingface"` when blocks differ in size.
    """
    if format == FORMAT:
        save_model(model, folder, tokenizer)
        return
    if format != "huggingface":
        raise UserError(f"Unknown checkpoint format {format!r}.{suggest(format, FORMATS)}")
    tokenizer = model.tokenizer if tokenizer is None else as_tokenizer(tokenizer)
    ends = getattr(tokenizer, "eot_ids", ()) or (getattr(tokenizer, "eot_id", None),)
    config, weights = huggingface.to_gpt2(model.config, named_weights(model), ends)
    _save_folder(model, folder, tokenizer, config, weights, {"format": "pt"})


def _save_folder(
    model: GPTModel,
    folder: str | os.PathLike,
    tokenizer: Any,
    config: dict[str, Any],
    weights: Mapping[str, np.ndarray],
    metadata: dict[str, str],
) -> None:
    folder = Path(folder)
    check_finite(weights)
    tokenizer = model.tokenizer if tokenizer is None else as_tokenizer(tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}: they do not belong together."
        )
    owned = () if tokenizer is None else TOKENIZER_FILES
    with _writing(folder), changing(folder, owned) as new:
        digest = write_tensors(new / WEIGHTS_FILE, weights, metadata)
        if tokenizer is not None:
            tokenizer.save(new)
            config = {**config, "tokenizer_sha256": file_digest(new / TOKENIZER_FILE)}
        if config.get("format") == FORMAT:  # other programs write other weights beside their config
            config = sealed({**config, "weights_sha256": digest})
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (new / CONFIG_FILE).write_text(text, "utf-8")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write the model to {folder}: {error.strerror or error}. Free some space or "
            "choose a folder that you may write to; the model that was there is unchanged."
        ) from None


def _read_config(folder: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}. A checkpoint is a folder with a config.json.")
    settled(folder)
    _refuse_adapter(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} has no {CONFIG_FILE}: it is not a checkpoint, or its writing was cut short. "
            "Name another folder or save the model again."
        )
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG_FILE} must hold a JSON object. Save the model again.")
    return folder, config


def _refuse_adapter(folder: Path) -> None:
    file = folder / "adapter_config.json"
    if file.is_file() and not (folder / WEIGHTS_FILE).is_file():
        settings = read_json(file)
        base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
        raise UserError(
            f"{folder} is an adapter (LoRA) for {base or 'another model'}, not a model. Merge it "
            "into its model with PEFT, AutoPeftModelForCausalLM.from_pretrained(folder)"
            ".merge_and_unload().save_pretrained(other), and load that folder."
        )


def _read_ranges(folder: Path, ranges: Any) -> dict[str, tuple[float, float]] | None:
    if ranges is None:
        return None
    try:
        return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{folder / CONFIG_FILE}: 'activation_ranges' must map names to [low, high]. "
            "Save the model again, or remove the key."
        ) from None


def _check_sizes(folder: Path, shape: GPTConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Before a model is built, which of a size that nobody has could take all memory."""
    try:
        if shape.num_layers > len(weights):
            raise UserError(
                f"{CONFIG_FILE} says num_layers={shape.num_layers}, and there are no more than "
                f"{len(weights)} weights, so some are missing. Restore the file that was saved."
            )
        _check_fit(weight_shapes(shape), weights)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _build(
    folder: Path,
    shape: GPTConfig,
    weights: Mapping[str, np.ndarray],
    *,
    tokenizer_hash: str | None = None,
) -> GPTModel:
    model = GPTModel.from_gpt_config(shape)
    try:
        check_finite(weights)
        assign_weights(model, weights)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if tokenizer_hash or has_tokenizer(folder):
        file = folder / TOKENIZER_FILE
        if tokenizer_hash and not file.is_file():
            raise UserError(
                f"{folder} was saved with a tokenizer.json, and it is not there. Restore it, or "
                "remove 'tokenizer_sha256' from config.json to do without."
            )
        # a wrong tokenizer of the right size would be silent nonsense
        if tokenizer_hash and tokenizer_hash != file_digest(file):
            raise UserError(
                f"{folder / TOKENIZER_FILE} is not the tokenizer that the model was saved with. "
                "Restore the file, or remove 'tokenizer_sha256' from config.json to insist."
            )
        model.tokenizer = Tokenizer.load(folder)
    return model
