"""Named arrays in one `.safetensors` file: no pickles, checked on reading, atomic on writing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np
import safetensors
from safetensors.numpy import save_file

from tf_gptopt._errors import UserError


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a file, floating-point ones as float32.

    Raises:
        UserError: when the file is absent, cut short or not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Copy the whole checkpoint folder again.")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = list(file.keys())
            for name in names:
                _check_kind(path, name, file.get_slice(name).get_dtype())
            tensors = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or not a safetensors file ({error}). "
            "Copy or download it again, or save the model again."
        ) from None
    return {name: _as_float32(tensor) for name, tensor in tensors.items()}


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Write to `path` in place; callers pass a temporary name (`_files.atomic_path`)."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata=metadata)
    except safetensors.SafetensorError as error:  # how a full disk arrives from Rust
        raise OSError(str(error)) from None


def _check_kind(path: Path, name: str, kind: str) -> None:
    """Refuse numbers of 8 bits and fewer that are no integers: quantized weights, whose scales lie
    elsewhere."""
    if kind.startswith(("F8", "F6", "F4")):
        raise UserError(
            f"{path}: tensor {name!r} is of type {kind}, so the weights are quantized, and weights "
            "as they were trained are needed. Take the original checkpoint (bfloat16, float16 or "
            "float32); tf_gptopt.quantize makes a quantized model of it."
        )


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    is_integer = np.issubdtype(tensor.dtype, np.integer) or tensor.dtype == bool
    return tensor if is_integer else tensor.astype(np.float32, copy=False)
