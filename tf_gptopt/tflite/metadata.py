"""What a .tflite file of ours says about itself, and how it shows that it is whole.

Two metadata buffers: `tf_gptopt.json` holds all that the runtime needs besides the tokenizer, and
`tf_gptopt.sha256` the SHA-256 of the file with these 32 bytes at zero. A flipped byte in a .tflite
file mostly goes unnoticed and changes what the model says; the checksum notices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt._errors import UserError
from tf_gptopt.tflite.flatbuffer import Model

FORMAT_VERSION = 3  # the newest that this version reads
_JSON = b"tf_gptopt.json"
_CHECKSUM = b"tf_gptopt.sha256"
_DIGEST_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A prefill, decode or verify signature: `tokens` at once, over `capacity` rows of cache (or
    none), of which each input holds those of `group` heads (0: of all)."""

    signature: str
    tokens: int
    capacity: int
    group: int = 0

    @property
    def is_decode(self) -> bool:
        return self.signature.startswith("decode")

    @property
    def is_prefill(self) -> bool:
        return self.signature.startswith("prefill")


def head_groups(name: str, heads: int, group: int) -> list[tuple[str, int, int]]:
    """The inputs that a block's keys or values come in by: name, first head, number of heads.

    Args:
        name: `"k_0"`: one input of that name, or with a `group` of 4 those named `"k_0_0"`,
            `"k_0_4"`, ..., for the heads from there on.
        heads: the block's.
        group: heads to an input, 0 for all.
    """
    if not group:
        return [(name, 0, heads)]
    return [(f"{name}_{at}", at, min(group, heads - at)) for at in range(0, heads, group)]


class ForeignFile(UserError):
    """A .tflite file that somebody else wrote."""


class DamagedFile(UserError):
    """A .tflite file of ours whose content is not what was written."""


def add_metadata(model: Model, values: dict[str, Any]) -> None:
    """Attach `values` (plain JSON) and room for the checksum.

    Format 2 has integers where format 1 has float32, in the cache or in the logits; format 3 has
    caches in groups of heads. A file without them is written as an older format, which older
    versions read too.
    """
    has_integers = "int8" in (values["cache"]["dtype"], values["logits"]["dtype"])
    has_groups = any(bucket.get("group") for bucket in values["buckets"])
    values = {"format_version": 3 if has_groups else 2 if has_integers else 1, **values}
    model.metadata(_JSON.decode(), json.dumps(values).encode())
    model.metadata(_CHECKSUM.decode(), bytes(_DIGEST_BYTES))


def seal(data: bytearray | mmap.mmap) -> str:
    """Fill the checksum in, over an earlier one too; returns it in hexadecimal."""
    at = _offset(data, _buffers(data)[_CHECKSUM])
    data[at : at + _DIGEST_BYTES] = bytes(_DIGEST_BYTES)
    digest = hashlib.sha256(data).digest()
    data[at : at + _DIGEST_BYTES] = digest
    return digest.hex()


def seal_file(path: str | os.PathLike) -> str:
    """`seal` a file in place, with all that was appended to it."""
    with open(path, "r+b") as file:
        data = mmap.mmap(file.fileno(), 0)
        digest = seal(data)
        data.flush()
    return digest


def read_metadata(path: str | os.PathLike, verify: bool = True) -> dict[str, Any]:
    """The values that `add_metadata` attached, with `"sha256"` (in hexadecimal) beside them.

    Args:
        verify: compare the checksum too (0.1 s per 150 MB).

    Raises:
        UserError: when the file is absent, no .tflite file, of another maker, of a newer format or
            damaged.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name the .tflite file in it.")
    if not path.is_file():
        raise UserError(f"{path} does not exist. Write one with export_tflite (tf-gptopt export).")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            # never closed by hand: numpy's views keep the mapping for as long as they look at it
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if start else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}). Copy it to where it can.") from None
    if start[4:] != b"TFL3":
        raise UserError(f"{path} is not a .tflite file (or is cut short). Copy or export it again.")
    return _read(path, data, verify)


def _read(path: Path, data: mmap.mmap, verify: bool) -> dict[str, Any]:
    view = memoryview(data)
    try:
        buffers = _buffers(view)
        if _JSON not in buffers or _CHECKSUM not in buffers:
            raise ForeignFile(
                f"{path} is a .tflite file, but not one that tf_gptopt wrote: it does not say how "
                "its cache works. Export the model with export_tflite."
            )
        values = json.loads(buffers[_JSON].tobytes())
        stored, at = buffers[_CHECKSUM].tobytes(), _offset(view, buffers[_CHECKSUM])
        del buffers
        version = int(values["format_version"])
    except UserError:
        raise
    except Exception:  # offsets that point anywhere end in any kind of error
        raise _damaged(path) from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version}, and this version of tf_gptopt reads up to "
            f"{FORMAT_VERSION}. Update tf_gptopt, or export the model with this version."
        )
    if verify:
        hasher = hashlib.sha256(view[:at])
        hasher.update(bytes(_DIGEST_BYTES))
        hasher.update(view[at + _DIGEST_BYTES :])
        if hasher.digest() != stored:
            raise _damaged(path)
    return {**values, "sha256": stored.hex()}


def _buffers(data: Any) -> dict[bytes, np.ndarray]:
    """The named metadata buffers, as views into `data`."""
    model = schema.Model.GetRootAsModel(data, 0)
    found = {}
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        found[entry.Name()] = model.Buffers(entry.Buffer()).DataAsNumpy()
    return found


def _offset(data: Any, view: np.ndarray) -> int:
    return view.ctypes.data - np.frombuffer(data, np.uint8).ctypes.data


def _damaged(path: Path) -> DamagedFile:
    return DamagedFile(
        f"{path} is damaged: its checksum does not fit its content. Copy or export it again."
    )
