"""What a run's folder is called: after its recipe and its text. Needs no TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_LONGEST = 60  # characters of a name
_SHIPPED = "example"  # the folder of the model that comes along with the project
_ENDINGS = re.compile(r"(\.(txt|md|text|jsonl?|ndjson|jl|gz|bz2|xz|zst))+$", re.IGNORECASE)


def run_name(recipe: str, paths: Sequence[str], is_default: bool) -> str:
    """The name of a run's folder.

    Args:
        recipe: the recipe's name, which stands for the text that the recipe itself names.
        paths: text that was named beside the recipe; empty where none was.
        is_default: whether it is the main job's recipe, which is then named after the text alone.
    """
    if not paths:
        return recipe
    name = _ENDINGS.sub("", Path(paths[0]).expanduser().resolve().name)
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:_LONGEST] or "text"
    if len(paths) > 1:
        name += f"-and-{len(paths) - 1}-more"
    if is_default and name == _SHIPPED:
        name += "-text"
    return name if is_default or name == recipe else f"{recipe}-{name}"
