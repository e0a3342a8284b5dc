"""What a worker says when it ends, so that the others need not guess.

TensorFlow tells the others of a cluster only that a connection broke. So they keep one of their
own: every worker is connected with the chief, who passes on what one of them says. Needs no
TensorFlow; where the connection cannot be made, the others know what TensorFlow knows.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

_MOST = 10_000  # characters of a sentence
_line: Line | None = None


class Line:
    """One worker's connections: the chief's to all others, another's to the chief.

    Args:
        index: of this worker.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._peers: list[socket.socket] = []
        self._lock = threading.Lock()
        self._heard: dict[str, Any] | None = None
        self._told = threading.Event()

    def listen(self, count: int) -> int:
        """The chief's side: wait, in the background, for `count` others; returns the port."""
        listener = socket.create_server(("", 0), backlog=count)

        def gather() -> None:
            with listener:
                for _ in range(count):
                    self._add(listener.accept()[0])

        threading.Thread(target=gather, name="last words", daemon=True).start()
        return listener.getsockname()[1]

    def connect(self, host: str, port: int) -> None:
        """Another worker's side."""
        with contextlib.suppress(OSError):
            peer = socket.create_connection((host, port), timeout=5)
            peer.settimeout(None)
            self._add(peer)

    def tell(self, sentence: str) -> None:
        """Say to all others why this worker ends; unless it ends because another one has."""
        if self._heard is None:
            self._pass_on({"index": self._index, "sentence": sentence[:_MOST]}, None)

    def heard(self, seconds: float) -> tuple[int, str] | None:
        """Which worker has said what first; waits for it a little."""
        self._told.wait(seconds)
        return self._heard and (self._heard["index"], self._heard["sentence"])

    def _add(self, peer: socket.socket) -> None:
        with self._lock:
            self._peers.append(peer)
        threading.Thread(target=self._read, args=(peer,), name="last words", daemon=True).start()

    def _read(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), peer.makefile("rb") as file:
            while line := file.readline(8 * _MOST):
                message = json.loads(line)
                if self._heard is None:
                    self._heard = {
                        "index": int(message["index"]),
                        "sentence": str(message["sentence"]),
                    }
                    self._told.set()
                    self._pass_on(self._heard, peer)

    def _pass_on(self, message: dict[str, Any], source: socket.socket | None) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            for peer in self._peers:
                if peer is not source:
                    with contextlib.suppress(OSError):
                        peer.sendall(data)


def open_line(line: Line) -> None:
    """From now on this process tells and hears over `line`."""
    global _line
    _line = line


def tell(sentence: str) -> None:
    """Say to the other workers, if there are any, why this one ends."""
    if _line is not None:
        _line.tell(sentence)


def heard(seconds: float = 1.0) -> tuple[int, str] | None:
    """The first worker that has said why it ends, and what it said."""
    return None if _line is None else _line.heard(seconds)
