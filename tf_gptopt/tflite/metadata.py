"""What a .tflite file of ours says about itself, and how it shows that it is whole.

Four metadata buffers: `tf_gptopt.json` holds all that the runtime needs besides the tokenizer, and
three digests of 32 bytes. The first takes all three for zero, the others themselves. A flipped byte
in a .tflite file goes mostly unnoticed and changes what the model says; the digests notice. Flipped
where numbers are, it does no more than that; in the structure it may crash LiteRT.

- `tf_gptopt.sha256` is the SHA-256 of the whole file: its name, compared by `inspect`.
- `tf_gptopt.structure.sha256` is that of all but the content of large buffers. It is compared
  before LiteRT sees a file.
- `tf_gptopt.sums.sha256` is that of the sums of the file's 64-bit words, one for each 4 KiB: a
  tenth of the work, for damage is no attack. It is compared while LiteRT loads the file, where that
  pays.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_gptopt._errors import UserError
from tf_gptopt._folder import settled
from tf_gptopt.tflite.described import Unfit, check_described
from tf_gptopt.tflite.flatbuffer import Model

FORMAT_VERSION = 4  # what this version writes, and the newest that it reads
_JSON = b"tf_gptopt.json"
_CHECKSUM = b"tf_gptopt.sha256"
_STRUCTURE = b"tf_gptopt.structure.sha256"
_SUMS = b"tf_gptopt.sums.sha256"
_DIGESTS = (_CHECKSUM, _STRUCTURE, _SUMS)
_WORDS = 512  # of 64 bits: one sum
_DIGEST_BYTES = 32
_LARGE_BUFFER = 2**16  # bytes: what is no structure


class ForeignFile(UserError):
    """A .tflite file that somebody else wrote."""


class DamagedFile(UserError):
    """A .tflite file of ours whose content is not what was written."""


def add_metadata(model: Model, values: dict[str, Any]) -> None:
    """Attach `values` (plain JSON) and room for the checksum.

    Format 2 brought integers in the cache and the logits, format 3 caches in groups of heads,
    format 4 free sizes and the inputs `positions` and `mask`.
    """
    values = {"format_version": FORMAT_VERSION, **values}
    model.metadata(_JSON.decode(), json.dumps(values).encode())
    for name in _DIGESTS:
        model.metadata(name.decode(), bytes(_DIGEST_BYTES))


def seal(data: bytearray | mmap.mmap) -> str:
    """Fill the digests in, over earlier ones too; returns that of the file in hexadecimal."""
    buffers = _buffers(data)
    places = {n: _offset(data, buffers[n]) for n in _DIGESTS if n in buffers}
    large = _large_buffers(data)
    del buffers
    _fill(data, places, {})
    digests = {_CHECKSUM: hashlib.sha256(data).digest()}
    _fill(data, places, digests)
    digests |= {_STRUCTURE: _structure_digest(data, large), _SUMS: sums_digest(data)}
    _fill(data, places, digests)
    return digests[_CHECKSUM].hex()


def seal_file(path: str | os.PathLike) -> str:
    """`seal` a file in place, with all that was appended to it."""
    with open(path, "r+b") as file:
        data = mmap.mmap(file.fileno(), 0)
        digest = seal(data)
        data.flush()
    return digest


class Verification:
    """A comparison that goes on in a thread of its own.

    `wait` raises `DamagedFile` when what was compared does not fit. As a context manager it waits
    at the end, and tells of the damage rather than of what the damage led to.

    Args:
        path: the file.
        fits: compares; None compares nothing.
    """

    def __init__(self, path: Path, fits: Callable[[], bool] | None = None) -> None:
        self._path, self._compare, self._fits = path, fits, fits is None
        self._thread = threading.Thread(target=self._run, daemon=True)
        if fits is not None:
            self._thread.start()

    def _run(self) -> None:
        self._fits = self._compare()

    def wait(self) -> None:
        if self._compare is not None:
            self._thread.join()
            self._compare = None  # with its view of the file
        if not self._fits:
            raise _damaged(self._path)

    def __enter__(self) -> Verification:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()


def read_metadata(path: str | os.PathLike, verify: bool = True) -> dict[str, Any]:
    """The values that `add_metadata` attached, with `"sha256"` (in hexadecimal) beside them.

    Args:
        verify: compare the digests too, that of the whole file among them (0.1 s per 150 MB).

    Raises:
        UserError: when the file is absent, no .tflite file, of another maker, of a newer format or
            damaged.
    """
    values, verification = _read(Path(path), (_CHECKSUM, _SUMS) if verify else ())
    verification.wait()
    return values


def start_reading(
    path: str | os.PathLike, verify: bool = True
) -> tuple[dict[str, Any], Verification]:
    """As `read_metadata`, with the comparison of the sums still going on. LiteRT does not crash on
    the file, but what it computes counts only after `wait`.

    Raises:
        UserError: as `read_metadata`, for damage to the structure.
    """
    return _read(Path(path), (_SUMS,) if verify else ())


def _read(path: Path, wanted: Sequence[bytes]) -> tuple[dict[str, Any], Verification]:
    """The values, and the comparison of the `wanted` digests, or what a file has in their place."""
    data = _map(path)
    values, verification = _read_mapped(path, data, wanted)
    try:
        check_described(values, schema.Model.GetRootAsModel(data, 0))
    except Exception as error:  # values of the wrong kind end in any kind of error
        verification.wait()  # damage is what to tell of first
        is_plain = isinstance(error, (UserError, Unfit))
        reason = str(error) if is_plain else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} is damaged: what it says about itself does not fit "
            f"({' '.join(reason.split())[:300]}). Copy or export it again."
        ) from None
    return values, verification


def _read_mapped(
    path: Path, data: mmap.mmap, wanted: Sequence[bytes]
) -> tuple[dict[str, Any], Verification]:
    try:
        buffers = _buffers(data)
        if _JSON not in buffers or _CHECKSUM not in buffers:
            raise ForeignFile(
                f"{path} is a .tflite file, but not one that tf_gptopt wrote: it does not say how "
                "its cache works. Export the model with export_tflite."
            )
        values = json.loads(buffers[_JSON].tobytes())
        stored = {name: buffers[name].tobytes() for name in _DIGESTS if name in buffers}
        places = {name: _offset(data, buffers[name]) for name in stored}
        large = _large_buffers(data) if wanted else []
        del buffers
        version = int(values["format_version"])
    except UserError:
        raise
    except Exception:  # offsets that point anywhere end in any kind of error
        raise _damaged(path) from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {str(version)[:20]}, and this version of tf_gptopt reads up to "
            f"{FORMAT_VERSION}. Update tf_gptopt, or export the model with this version."
        )
    values["sha256"] = stored[_CHECKSUM].hex()
    if not wanted:
        return values, Verification(path)
    # in our copy of these pages; in files of earlier versions the checksum came last
    is_new = _SUMS in stored
    first = {_CHECKSUM: stored[_CHECKSUM]} if is_new else {}
    _fill(data, places, first)
    if _STRUCTURE in stored and _structure_digest(data, large) != stored[_STRUCTURE]:
        raise _damaged(path)

    def fits() -> bool:
        if is_new and sums_digest(data) != stored[_SUMS]:
            return False
        if is_new and _CHECKSUM not in wanted:
            return True
        later = {} if is_new else {n: d for n, d in stored.items() if n != _CHECKSUM}
        _fill(data, places, later)
        return hashlib.sha256(data).digest() == stored[_CHECKSUM]

    verification = Verification(path, fits)
    if _STRUCTURE not in stored:
        verification.wait()
    return values, verification


def _map(path: Path) -> mmap.mmap:
    """The file in memory, to be written to without changing it."""
    settled(path.parent)
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
    return data


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


def _fill(data: Any, places: dict[bytes, int], digests: dict[bytes, bytes]) -> None:
    """Write the digests to their places, and zeros where there is none."""
    for name, at in places.items():
        data[at : at + _DIGEST_BYTES] = digests.get(name, bytes(_DIGEST_BYTES))


def sums_digest(data: Any) -> bytes:
    """SHA-256 of the sums. One call of numpy's does the work: LiteRT, loading the file meanwhile,
    keeps Python's lock."""
    row = 8 * _WORDS
    whole = len(data) // row * row
    words = np.frombuffer(data, np.uint64, whole // 8).reshape(-1, _WORDS)
    return hashlib.sha256(words.sum(axis=1).tobytes() + data[whole:]).digest()


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
