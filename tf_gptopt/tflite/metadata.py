"""What a .tflite file of ours says about itself, and how it shows that it is whole.

Three metadata buffers: `tf_gptopt.json` holds all that the runtime needs besides the tokenizer,
`tf_gptopt.sha256` the SHA-256 of the file with these 32 bytes at zero, and
`tf_gptopt.structure.sha256` that of all but the content of large buffers, with both at zero. A
flipped byte in a .tflite file mostly goes unnoticed and changes what the model says; the checksum
notices. Flipped where numbers are, it does no more than that; in the structure it may crash LiteRT.
So the structure is compared before LiteRT sees a file, and the rest, where that pays, while LiteRT
loads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt._errors import UserError
from tf_gptopt.tflite.flatbuffer import Model

FORMAT_VERSION = 3  # the newest that this version reads
_JSON = b"tf_gptopt.json"
_CHECKSUM = b"tf_gptopt.sha256"
_STRUCTURE = b"tf_gptopt.structure.sha256"
_DIGEST_BYTES = 32
_LARGE_BUFFER = 2**16  # bytes: what is no structure


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
    for name in (_CHECKSUM, _STRUCTURE):
        model.metadata(name.decode(), bytes(_DIGEST_BYTES))


def seal(data: bytearray | mmap.mmap) -> str:
    """Fill both checksums in, over earlier ones too; returns that of the file in hexadecimal."""
    buffers = _buffers(data)
    places = {n: _offset(data, buffers[n]) for n in (_CHECKSUM, _STRUCTURE) if n in buffers}
    large = _large_buffers(data)
    del buffers
    for at in places.values():
        data[at : at + _DIGEST_BYTES] = bytes(_DIGEST_BYTES)
    if _STRUCTURE in places:  # not in files of earlier versions
        at = places[_STRUCTURE]
        data[at : at + _DIGEST_BYTES] = _structure_digest(data, large)
    digest = hashlib.sha256(data).digest()
    at = places[_CHECKSUM]
    data[at : at + _DIGEST_BYTES] = digest
    return digest.hex()


def seal_file(path: str | os.PathLike) -> str:
    """`seal` a file in place, with all that was appended to it."""
    with open(path, "r+b") as file:
        data = mmap.mmap(file.fileno(), 0)
        digest = seal(data)
        data.flush()
    return digest


class Verification:
    """Compares the checksum of a whole file, in a thread of its own.

    `wait` raises `DamagedFile` when it does not fit. As a context manager it waits at the end, and
    tells of the damage rather than of what the damage led to.
    """

    def __init__(self, path: Path, data: mmap.mmap | None = None, stored: bytes = b"") -> None:
        """`data` is the file with the checksum at zero; None compares nothing."""
        self._path, self._data, self._stored = path, data, stored
        self._fits = data is None
        self._thread = threading.Thread(target=self._compare, daemon=True)
        if data is not None:
            self._thread.start()

    def _compare(self) -> None:
        # one call for the whole file: LiteRT, loading it meanwhile, may hold Python's lock
        self._fits = hashlib.sha256(self._data).digest() == self._stored

    def wait(self) -> None:
        if self._data is not None:
            self._thread.join()
            self._data = None
        if not self._fits:
            raise _damaged(self._path)

    def __enter__(self) -> Verification:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()


def read_metadata(path: str | os.PathLike, verify: bool = True) -> dict[str, Any]:
    """The values that `add_metadata` attached, with `"sha256"` (in hexadecimal) beside them.

    Args:
        verify: compare the checksum too (0.1 s per 150 MB).

    Raises:
        UserError: when the file is absent, no .tflite file, of another maker, of a newer format or
            damaged.
    """
    values, verification = start_reading(path, verify)
    verification.wait()
    return values


def start_reading(
    path: str | os.PathLike, verify: bool = True
) -> tuple[dict[str, Any], Verification]:
    """As `read_metadata`, with the comparison of the checksum still going on. LiteRT does not crash
    on the file, but what it computes counts only after `wait`.

    Raises:
        UserError: as `read_metadata`, for damage to the structure.
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
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if start else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}). Copy it to where it can.") from None
    if start[4:] != b"TFL3":
        raise UserError(f"{path} is not a .tflite file (or is cut short). Copy or export it again.")
    return _read(path, data, verify)


def _read(path: Path, data: mmap.mmap, verify: bool) -> tuple[dict[str, Any], Verification]:
    try:
        buffers = _buffers(data)
        if _JSON not in buffers or _CHECKSUM not in buffers:
            raise ForeignFile(
                f"{path} is a .tflite file, but not one that tf_gptopt wrote: it does not say how "
                "its cache works. Export the model with export_tflite."
            )
        values = json.loads(buffers[_JSON].tobytes())
        names = [name for name in (_CHECKSUM, _STRUCTURE) if name in buffers]
        stored = {name: buffers[name].tobytes() for name in names}
        places = {name: _offset(data, buffers[name]) for name in names}
        large = _large_buffers(data) if verify else []
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
    values["sha256"] = stored[_CHECKSUM].hex()
    if not verify:
        return values, Verification(path)
    at = places[_CHECKSUM]
    data[at : at + _DIGEST_BYTES] = bytes(_DIGEST_BYTES)  # of our copy of this page
    if _STRUCTURE in stored:
        at = places[_STRUCTURE]
        data[at : at + _DIGEST_BYTES] = bytes(_DIGEST_BYTES)
        if _structure_digest(data, large) != stored[_STRUCTURE]:
            raise _damaged(path)
        data[at : at + _DIGEST_BYTES] = stored[_STRUCTURE]
    verification = Verification(path, data, stored[_CHECKSUM])
    if _STRUCTURE not in stored:  # a file of an earlier version
        verification.wait()
    return values, verification


def _buffers(data: Any) -> dict[bytes, np.ndarray]:
    """The named metadata buffers, as views into `data`."""
    model = schema.Model.GetRootAsModel(data, 0)
    found = {}
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        found[entry.Name()] = model.Buffers(entry.Buffer()).DataAsNumpy()
    return found


def _large_buffers(data: Any) -> list[tuple[int, int]]:
    """Where the content of each large buffer begins and ends, in the file's order."""
    model = schema.Model.GetRootAsModel(data, 0)
    found = []
    for i in range(model.BuffersLength()):
        size = model.Buffers(i).DataLength()
        if size >= _LARGE_BUFFER:
            at = _offset(data, model.Buffers(i).DataAsNumpy())
            found.append((at, at + size))
    return sorted(found)


def _structure_digest(data: Any, large: list[tuple[int, int]]) -> bytes:
    """SHA-256 of what lies between the large buffers, and of where these are."""
    view, hasher, done = memoryview(data), hashlib.sha256(), 0
    for start, end in large:
        hasher.update(view[done : max(start, done)])
        hasher.update(f"{start} {end} ".encode())
        done = max(end, done)
    hasher.update(view[done:])
    return hasher.digest()


def _offset(data: Any, view: np.ndarray) -> int:
    return view.ctypes.data - np.frombuffer(data, np.uint8).ctypes.data


def _damaged(path: Path) -> DamagedFile:
    return DamagedFile(
        f"{path} is damaged: its checksum does not fit its content. Copy or export it again."
    )
