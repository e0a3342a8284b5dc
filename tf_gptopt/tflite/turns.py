"""Who uses a conversation: one call at a time, and the latest one decides what it holds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from tf_gptopt._errors import UserError


class Turns:
    """Notices when two calls use one cache at once, in two threads or in turn (some 2 us a use).

    A call takes a turn and works inside it. A stream works in many pieces, and its caller may never
    come back for the next: so nothing is held between them. Whoever takes a turn meanwhile gets
    it, and the stream is over: going on with it is an error.

    Attributes:
        current: the number of the latest turn.
    """

    def __init__(self) -> None:
        self.current = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self, turn: int | None = None) -> Iterator[int]:
        """Work on the cache; gives the number of the turn.

        Args:
            turn: go on with this one; default a new one, which ends all before it.

        Raises:
            UserError: while another call is at work, and when that turn is over.
        """
        if self._lock.locked():
            raise UserError(
                "This conversation is in use: another thread, or a function that was called while "
                "it generates. Give each thread a conversation of its own: new_conversation() "
                "makes one over the same weights, fork() one that holds the same tokens."
            )
        with self._lock:  # not acquire(): Ctrl-C between that and a `try` would lock it for ever
            if turn is None:
                self.current += 1
            elif turn != self.current:
                raise UserError(
                    "This conversation was used for something else before its stream was at an "
                    "end, so the stream cannot go on. Use a conversation of its own for the other: "
                    "new_conversation() makes one over the same weights."
                )
            yield self.current
