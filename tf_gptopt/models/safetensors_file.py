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
        UserError: when the file is absent, cut short or not a safetensors file, and for numbers of
            8 bits and fewer, whose scales lie elsewhere.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Copy the whole checkpoint folder again.")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            tiny = [name for name, kind in kinds.items() if kind.startswith(("F8", "F6", "F4"))]
            tensors = {} if tiny else {name: file.get_tensor(name) for name in kinds}
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or not a safetensors file ({error}). "
            "Copy or download it again, or save the model again."
        ) from None
    if tiny:  # integers have other names, and bfloat16 has 16 bits
        raise UserError(
            f"{path}: {len(tiny)} tensors, such as {tiny[0]!r}, are of type {kinds[tiny[0]]}: the "
            "weights are quantized, and weights as they were trained are needed. Take the original "
            "checkpoint (bfloat16, float16 or float32); tf_gptopt.quantize makes a quantized model "
            "of it."
        )
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


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    is_integer = np.issubdtype(tensor.dtype, np.integer) or tensor.dtype == bool
    return tensor if is_integer else tensor.astype(np.float32, copy=False)
