"""Packed weights on disk: written once, verified as files are, and never changed in place.

XNNPACK takes an existing file for a finished one, and one that it cannot use it writes anew, in
place, under all who have it mapped. So a file gets its name when it is complete, and the name says
for what it is good, on which kind of processor, and what is in it:

    {model}-{LiteRT}-{processor}-{content}.xnnpack

Whoever finds the name of a file of its own compares its content with it before XNNPACK sees it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ai_edge_litert

from tf_gptopt._errors import UserError
from tf_gptopt.tflite.metadata import sums_digest

_SUFFIX = ".xnnpack"
_LEFT_OVER = 3600.0  # seconds after which nobody writes a temporary file any more
_SPARE = 2**22  # bytes beside the weights themselves
# of /proc/cpuinfo: what XNNPACK chooses its kernels by, and nothing that changes
_PROCESSOR = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "flags",
    "cpu implementer",
    "cpu architecture",
    "cpu variant",
    "cpu part",
    "features",
    "isa",
    "uarch",
)


@contextlib.contextmanager
def cache_file(
    folder: Path, sha256: str, size: int, before_packing: Callable[[], None]
) -> Iterator[Path]:
    """The packed weights' file for this content, this LiteRT and this processor: whole and
    compared, or one to be written, which gets its name at the end.

    Args:
        folder: where it is kept; only read where the file is there.
        sha256: of the model's file: a name for its content.
        size: of the model's file, bytes.
        before_packing: called before weights are packed, which is not done when they are there.

    Raises:
        UserError: when a new file cannot be written.
    """
    key = f"{sha256[:16]}-{_litert()}-{processor()}"
    for found in sorted(folder.glob(f"{key}-*{_SUFFIX}")):
        if found.name == _name(key, found):
            yield found
            return
    temporary = _temporary(folder, size)
    before_packing()
    try:
        yield temporary
        if temporary.is_file():  # on a full disk XNNPACK does without
            os.replace(temporary, folder / _name(key, temporary))  # who has it mapped keeps it
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@functools.cache
def processor() -> str:
    """A name for the kind of processor that this is: 8 hexadecimal digits."""
    facts = {platform.machine(), platform.processor()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() in _PROCESSOR:
                facts.add(f"{name.strip()}: {value.strip()}")
    return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:8]


@functools.cache
def _litert() -> str:
    """LiteRT's version, and a sign of the build: XNNPACK rewrites the files of another one."""
    libraries = Path(ai_edge_litert.__file__).parent.glob("lib*litert*")
    sizes = sorted(f"{file.name} {file.stat().st_size}" for file in libraries)
    build = hashlib.sha256("\n".join(sizes).encode()).hexdigest()[:4]
    return f"{ai_edge_litert.__version__}.{build}"


def _name(key: str, file: Path) -> str | None:
    """What a file with this content is called; None of one that cannot be read."""
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as data:
            return f"{key}-{sums_digest(data).hex()[:16]}{_SUFFIX}"
    except (OSError, ValueError):  # gone meanwhile, another user's, or empty
        return None


def _temporary(folder: Path, size: int) -> Path:
    """The name of a new file in the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=f"{_SUFFIX}.tmp", dir=folder)
    except OSError as error:
        raise UserError(
            f"The weight cache {folder} cannot be written ({error}). Name a folder that can, or "
            "leave weight_cache out."
        ) from None
    os.close(handle)
    os.unlink(name)  # XNNPACK takes an existing file for a finished one
    for left in folder.glob(f".*{_SUFFIX}.tmp"):  # of processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_OVER:
                left.unlink()
    free, needed = _free_bytes(folder), size + size // 4 + _SPARE
    if free is not None and free < needed:  # XNNPACK would end the process
        raise UserError(
            f"The disk of the weight cache {folder} has {free:,} bytes free, and packed weights "
            f"may take {needed:,}. Make room, name another folder, or leave weight_cache out."
        )
    return Path(name)


def _free_bytes(folder: Path) -> int | None:
    """Room on the folder's disk, where the system tells."""
    if not hasattr(os, "statvfs"):
        return None
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
