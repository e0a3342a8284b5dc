"""Files that are either whole or absent: write beside the final name, sync, then rename.

A process that is killed while it writes leaves a hidden temporary file behind. It is `held` as long
as it is being written, and the next write of the same name removes those that nobody holds.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tf_gptopt._errors import UserError

try:
    import fcntl
except ImportError:  # Windows: nothing is held, and nothing swept
    fcntl = None

SEAL = "sha256"  # the key under which JSON keeps the digest of its other keys, but other digests
_MOST_TEXT = 1 << 28  # bytes; a tokenizer.json of a million tokens has a quarter of that


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the same folder; renamed to `path` when the block ends without an error.

    The data reaches the disk before the new name does, so after a crash a reader finds either the
    old file or the new one, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with held(temporary):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(file_mode(0o666))
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove the temporary files of writes of `path` that were killed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        if left.is_file() and not is_held(left):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Mark a file or folder as in use; however this process ends, the mark goes with it."""
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def open_lock(path: Path) -> IO[bytes]:
    """A file to lock, made when absent and never written to.

    Raises:
        UserError: when something else has its name: a link could lead to anybody's file.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        handle = os.open(path, flags, 0o666)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return os.fdopen(handle, "rb+", buffering=0)
        os.close(handle)
    except OSError as error:
        if not (path.is_symlink() or path.exists()):
            raise UserError(
                f"{path.parent} cannot be written ({error.strerror}). Name another folder, or mend "
                "its permissions."
            ) from None
    raise UserError(
        f"{path} is a link, or no file that can be locked. Remove it, or name another folder."
    )


def is_held(path: Path) -> bool:
    """Whether a process is still at work on it, or nobody can say."""
    if fcntl is None:
        return True
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 `text` to `path` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON; a `UserError` names the file when it is absent or not JSON."""
    text = read_text(path, "JSON")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError also for 5,000 digits
        raise UserError(
            f"{path} is not valid JSON ({error}). Restore it or make it again."
        ) from None


def read_text(path: str | os.PathLike, what: str, most: int | None = None) -> str:
    """The UTF-8 text of a file that holds a description: an ordinary file of at most `most` bytes.

    Raises:
        UserError: when it is absent, something else than a file, far too long or not UTF-8.
    """
    most = _MOST_TEXT if most is None else most
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size <= most:
            return Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid {what} ({error}). Restore it or make it again."
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}). Mend its permissions."
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file. Name a file that holds {what}.")
    raise UserError(
        f"{path} has {status.st_size:,} bytes: that is no {what} that somebody wrote. Name another "
        "file."
    )


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """`value` with a digest of itself, so that damage which is still JSON is noticed."""
    value = json.loads(json.dumps(value))  # as it will be read
    return {**value, SEAL: _digest(value)}


def check_seal(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """Whether what was read from `path` is what was written; nothing is said of an older file,
    which has no seal.

    Raises:
        UserError: when it has been changed or damaged since.
    """
    if SEAL in value and value[SEAL] != _digest(value):
        raise UserError(
            f"{path} has been damaged or changed since it was written: its {SEAL} is that of other "
            f"content. Restore it or make it again; to keep a change of your own, remove {SEAL!r} "
            "from it."
        )


def file_digest(path: str | os.PathLike) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: dict[str, Any]) -> str:
    rest = {key: item for key, item in value.items() if not key.endswith(SEAL)}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sync(path: str | os.PathLike) -> None:
    """Bring a file, or a folder's names, from the page cache to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_mode(mode: int) -> int:
    """What the umask leaves of the permissions `mode`."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask
