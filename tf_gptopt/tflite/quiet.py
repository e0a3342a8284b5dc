"""What LiteRT says on stderr, kept from it.

LiteRT tells of every environment and every model in some ten lines, and its Python package has no
switch for that. It writes by way of C's stream `stderr`, a variable that glibc lets a program set
(https://www.gnu.org/software/libc/manual/html_node/Standard-Streams.html). Setting it leaves file
descriptor 2 alone, and with it Python's own stderr, other threads that print and programs that are
started meanwhile. On other systems LiteRT is heard.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator

_UNBUFFERED = 2  # _IONBF
_OURS = re.compile(rb"(VERBOSE|DEBUG|INFO|WARNING|ERROR): |\xe2\x94\x94 ")  # how its lines begin

_lock = threading.RLock()
_heard = False


def hear() -> None:
    """Keep nothing from now on: for a process that LiteRT may end."""
    global _heard
    _heard = True


@contextlib.contextmanager
def native_output() -> Iterator[Callable[[], str]]:
    """Keep what LiteRT writes to stderr; yields a function that returns it so far.

    Threads wait for each other, and so does a fork. What another library writes to that stream
    meanwhile comes out at the end.
    """
    stream = None if _heard else _stream()
    if stream is None:
        yield lambda: ""
        return
    with _lock:
        stream.clear()
        before = stream.swap(stream.file)
        try:
            yield lambda: stream.read().decode("utf-8", "replace")
        finally:
            stream.swap(before)
            lines = stream.read().splitlines(keepends=True)
            if others := b"".join(line for line in lines if not _OURS.match(line)):
                stream.write(others, before)


class _Stream:
    """C's variable `stderr`, and a file in memory to set it to, which is never closed: a thread
    may be about to write to it."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._variable = ctypes.c_void_p.in_dll(libc, "stderr")
        self._fd = os.memfd_create("stderr")
        libc.fdopen.restype = ctypes.c_void_p
        self.file = libc.fdopen(self._fd, b"a")
        libc.setvbuf(ctypes.c_void_p(self.file), None, _UNBUFFERED, ctypes.c_size_t(0))
        self._fputs = libc.fputs

    def swap(self, file: int | None) -> int | None:
        """Make `stderr` this one; returns what it was."""
        before, self._variable.value = self._variable.value, file
        return before

    def clear(self) -> None:
        os.ftruncate(self._fd, 0)

    def read(self) -> bytes:
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def write(self, text: bytes, file: int | None) -> None:
        self._fputs(text.replace(b"\0", b""), ctypes.c_void_p(file))


@functools.cache
def _stream() -> _Stream | None:
    """The stream, where it can be set."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if os.confstr("CS_GNU_LIBC_VERSION"):
            stream = _Stream()
            # LiteRT takes leave of each accelerator when the process ends, after all Python code
            atexit.register(stream.swap, stream.file)
            return stream
    return None


def _in_child() -> None:
    _stream.cache_clear()  # the parent writes to the same file
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_in_child
    )
