"""What a finished stage left behind is what is read later: digests of its files in metrics.json."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._files import SEAL, check_seal, file_digest, read_json
from tf_gptopt._folder import settled

METRICS = "metrics.json"
KEY = "key.json"


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each file that a stage has written, by name."""
    return {
        path.name: file_digest(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in (METRICS, KEY) and path.name[0] != "."
    }


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a finished stage.

    Raises:
        UserError: when metrics.json is damaged.
    """
    metrics = read_json(folder / METRICS)
    if not isinstance(metrics, dict):
        raise UserError(
            f"{folder / METRICS} is damaged: it must hold a JSON object. Restore it, or delete "
            f"{folder} to run the stage again."
        )
    check_seal(folder / METRICS, metrics)
    metrics.pop(SEAL, None)
    return metrics


def lost_file(folder: Path, metrics: dict[str, Any]) -> str | None:
    """The name of a file that the stage wrote and that is gone, if there is one.

    Raises:
        UserError: when one is there and is not the one that the stage wrote.
    """
    settled(folder)
    for name, digest in metrics.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return name
        status = path.stat()
        if _digest_of(path, status.st_size, status.st_mtime_ns) != digest:
            raise UserError(
                f"{path} is damaged, or was changed after its stage had finished: its sha256 is "
                f"not the one in {METRICS}. Restore it from a copy, or delete {folder} to run the "
                "stage again."
            )
    return None


@functools.lru_cache(maxsize=256)
def _digest_of(path: Path, size: int, changed: int) -> str:
    """A run asks several times; a file of the same size and time is read once."""
    return file_digest(path)
