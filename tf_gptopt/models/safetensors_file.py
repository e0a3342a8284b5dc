"""Named arrays in one `.safetensors` file: no pickles, checked on reading, atomic on writing.

The format has no checksum. A file that we write carries one in its metadata, over names, types,
shapes and values; a file of somebody else's, without it, is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np
import safetensors
from safetensors.numpy import save_file

from tf_gptopt._errors import UserError
from tf_gptopt._files import SEAL


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a file, floating-point ones as float32.

    Raises:
        UserError: when the file is absent, cut short, not a safetensors file, or holds other values
            than were written; and for numbers of 8 bits and fewer, whose scales lie elsewhere.
    """
    return read_with_digest(path)[0]


def read_with_digest(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], str | None]:
    """`read_tensors`, and the digest that the file carries."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Copy the whole checkpoint folder again.")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            tiny = [name for name, kind in kinds.items() if kind.startswith(("F8", "F6", "F4"))]
            tensors = {} if tiny else {name: file.get_tensor(name) for name in kinds}
            digest = (file.metadata() or {}).get(SEAL)
    except (safetensors.SafetensorError, OSError, AttributeError, TypeError, ValueError) as error:
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
    if digest is not None and digest != digest_of(tensors):
        raise UserError(
            f"{path} is damaged: its values are not those that were written (their {SEAL} is "
            "another). Copy it again, or save the model again."
        )
    return {name: _as_float32(tensor) for name, tensor in tensors.items()}, digest


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> str:
    """Write to `path` in place, and return the digest; callers pass a temporary name
    (`_files.atomic_path`, `_folder.changing`)."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    digest = digest_of(contiguous)
    try:
        save_file(contiguous, path, metadata={**metadata, SEAL: digest})
        _sort_metadata(path)
    except safetensors.SafetensorError as error:  # how a full disk arrives from Rust
        raise OSError(str(error)) from None
    return digest


def _sort_metadata(path: str | os.PathLike) -> None:
    """Equal weights give equal files: safetensors writes the metadata's keys in a random order."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:  # it is written another way than was seen
            return
        file.seek(8)
        file.write(text.ljust(size))


def digest_of(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 (hex) of arrays, whatever their order: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype.name}{list(tensor.shape)}\0".encode())
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    is_integer = np.issubdtype(tensor.dtype, np.integer) or tensor.dtype == bool
    return tensor if is_integer else tensor.astype(np.float32, copy=False)
