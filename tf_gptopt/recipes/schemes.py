"""The quantization of the model that a stage reads: taken where nobody names another.

Needs no TensorFlow.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt._files import read_json
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.found_scheme import find_scheme, lies_on
from tf_gptopt.models.safetensors_file import read_tensors
from tf_gptopt.recipes.console import Console


def decided(section: Any, folder: Path, console: Console, trains: bool = False) -> Any:
    """A stage's section with its quantization decided; which one it is, and why, is said.

    Args:
        section: one whose `quantization` is None takes that of the model it reads, and int8 where
            that has none.
        folder: of the model that the stage reads.
        trains: whether the stage trains for the scheme, and may so change it for another.
    """
    given = section.quantization
    found, weights = read_scheme_of(Path(folder))
    if given is None:
        scheme = found or QuantConfig()
        why = f"as {folder} has it" if found else f"{folder} is not quantized, and none was named"
        console.note(f"quantization: {scheme.name} ({why})")
        return dataclasses.replace(section, quantization=scheme)
    console.note(f"quantization: {given.name}")
    if not trains and found is not None and not lies_on(weights, given):
        console.note(
            f"{folder} was made for {found.name}, and {given.name} rounds its weights once more. "
            "Name no quantization to keep them, or train for this one first: tf-gptopt qat "
            "--quantization ..."
        )
    return section


def say_if_left(folder: Path, console: Console) -> None:
    """Before a training in float: that a quantized model will leave its grids."""
    found, _ = read_scheme_of(Path(folder))
    if found is not None:
        console.note(
            f"{folder} is quantized ({found.name}), and this trains float weights: quantize again "
            "afterwards"
        )


def read_scheme_of(folder: Path) -> tuple[QuantConfig | None, dict[str, np.ndarray]]:
    """The scheme of the model in a folder, None where its weights are float, and the weights.

    What a stage has noted in metrics.json counts as long as the weights still lie on its grid.
    Without such a note the weights alone tell.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(config, dict) or config.get("format") != "tf_gptopt":
        return None, {}
    weights = read_tensors(folder / "model.safetensors")
    noted = _noted(folder)
    if noted is not None and lies_on(weights, noted):
        return noted, weights
    return find_scheme(weights, is_static=bool(config.get("activation_ranges"))), weights


def _noted(folder: Path) -> QuantConfig | None:
    """The scheme that the stage which wrote a folder took or was told, if any."""
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    if not isinstance(metrics, dict):
        return None
    section = metrics.get("section")
    told = section.get("quantization") if isinstance(section, dict) else None
    values = metrics.get("quantization", told)
    if not isinstance(values, dict):
        return None
    try:
        return QuantConfig.from_dict(values)
    except (UserError, TypeError):  # of a version that knew others
        return None
