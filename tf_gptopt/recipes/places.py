"""Folders as people name them: a run's folder stands for the stage that a command wants of it.

Needs no TensorFlow.
"""

from __future__ import annotations

from pathlib import Path

from tf_gptopt._errors import UserError

_MODELS = ("quantize", "qat", "prune", "distill", "train")  # stages that leave one, the last first


def existing(path: str | Path) -> Path:
    """The path, if there is something."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist. Check the path.")
    return Path(path)


def model_place(path: str | Path) -> Path:
    """A folder with a model that trains on: of a run, its last finished one."""
    folder = existing(path)
    if not _is_run(folder):
        return folder
    for stage in _MODELS:
        if (folder / stage / "metrics.json").is_file():
            return folder / stage
    raise UserError(f"The run in {folder} has no finished model yet. Let it go on first.")


def speaking_place(path: str | Path) -> Path:
    """What generates text or is measured: of a run, its .tflite file, or its last model until
    there is one; of a folder with a file, the file."""
    folder = Path(path)
    if _is_run(folder):
        file = folder / "export" / "model.tflite"
        return file if file.is_file() else model_place(folder)
    return folder / "model.tflite" if (folder / "model.tflite").is_file() else folder


def dataset_place(path: str | Path) -> Path:
    """A folder with a dataset: of a run, that of its stage."""
    folder = existing(path)
    return folder / "dataset" if _is_run(folder) else folder


def tokenizer_place(path: str | Path) -> Path:
    """A folder with a tokenizer: of a run, that of its stage."""
    folder = existing(path)
    return folder / "tokenizer" if _is_run(folder) else folder


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.json").is_file() and not (folder / "config.json").is_file()
