"""Tokens to text as they come, and the stop strings that end it: no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tf_gptopt._errors import UserError


class TextStream:
    """Turns tokens into pieces of text as they come, and watches for stop strings.

    A character can span tokens (byte-level BPE), and so can a stop string: a piece is held back
    until it can no longer change. The pieces joined are exactly `decode(all tokens)`, up to the
    first stop string, which is left out.

    ```python
    stream = TextStream(tokenizer.decode, stop=["\\n\\n"])
    for token in tokens:
        print(stream.push(token), end="")
        if stream.stopped:
            break
    print(stream.finish())
    ```

    Attributes:
        stopped: whether a stop string came.
        piece: what the last `push` returned.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: str | Sequence[str] | None = None
    ) -> None:
        self.stopped = False
        self.piece = ""
        self._decode = decode
        self._stop = as_stop_strings(stop)
        self._tokens: list[int] = []  # those whose characters are not complete yet
        self._given = 0  # characters of theirs that are out already
        self._held = ""  # complete text that may be the start of a stop string

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now (often one piece, sometimes none)."""
        self._tokens.append(int(token))
        text = self._decode(self._tokens)
        if text.endswith("\ufffd"):  # perhaps a character whose last bytes are still to come
            ready = text[self._given : -1]
            self._given = max(len(text) - 1, self._given)
        else:
            ready = text[self._given :]
            self._tokens, self._given = [], 0
        self.piece = self._release(ready)
        return self.piece

    def finish(self) -> str:
        """What is still held back, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._decode(self._tokens)[self._given :] if self._tokens else ""
        self._tokens, self._given = [], 0
        piece = self._release(rest)
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def as_stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple; an empty one is an error, for it would stop everything."""
    try:
        strings = (stop,) if isinstance(stop, str) else () if stop is None else tuple(stop)
    except TypeError:  # a number, or an array that is one
        strings = (stop,)
    if not all(isinstance(item, str) and item for item in strings):
        raise UserError(f"stop must be one or more non-empty strings. Received: {stop!r}.")
    return strings


def _overlap(text: str, stop: str) -> int:
    """How many last characters of `text` are the first ones of `stop` (fewer than all of it)."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
