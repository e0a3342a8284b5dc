"""Tokens to text as they come, and the stop strings that end it: no TensorFlow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from tf_gptopt._errors import UserError

_INCOMPLETE = "\ufffd"  # how bytes are decoded that are not a whole character


class TextStream:
    """Turns tokens into pieces of text as they come, and watches for stop strings.

    What a token says depends on its neighbours: a character can span tokens, and a decoder can drop
    the space that begins a text. So a token is decoded after those before it, and its text is what
    that adds. A piece is held back until it can no longer change: the beginning of a character or
    of a stop string, and byte tokens (`<0xE4>`) until another token ends their row. The pieces
    joined are exactly `decode(all tokens)`, up to the first stop string, which is left out.

    ```python
    stream = TextStream(tokenizer.decode, stop=["\\n\\n"], changes=tokenizer.may_change)
    for token in tokens:
        print(stream.push(token), end="")
        if stream.stopped:
            break
    print(stream.finish())
    ```

    Args:
        decode: ids to text.
        stop: strings that end the text.
        after: the ids of what comes before, such as a prompt: the pieces go on from there.
        changes: whether a text that ends with a token may change when others follow, as
            `Tokenizer.may_change` says; default: never, but for a character that is not complete.

    Attributes:
        stopped: whether a stop string came.
        piece: what the last `push` returned.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: str | Sequence[str] | None = None,
        *,
        after: Sequence[int] = (),
        changes: Callable[[int], bool] | None = None,
    ) -> None:
        self.stopped = False
        self.piece = ""
        self._decode, self._changes = decode, changes or (lambda _: False)
        self._stop = as_stop_strings(stop)
        self._held = ""  # text that is certain and may be the start of a stop string
        self._tokens = self._last([int(token) for token in after])
        self._out = self._text()  # the beginning of their text that is out
        self._goes_on = bool(self._tokens)  # from text that somebody else has decoded

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now (often one piece, sometimes none)."""
        self._tokens.append(int(token))
        text = self._text()
        new = text[self._count_out(text) :]
        if self._changes(self._tokens[-1]):
            self.piece = self._release("", new.rstrip(_INCOMPLETE))
        elif text.endswith(_INCOMPLETE):  # perhaps a character whose last bytes are still to come
            self._out = max(self._out, text[:-1], key=len)
            self.piece = self._release(new[:-1])
        else:
            self._forget(text)
            self.piece = self._release(new)
        return self.piece

    def finish(self) -> str:
        """What is still held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._text()
        piece = self._release(text[self._count_out(text) :])
        self._out = text
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _text(self) -> str:
        return self._decode(self._tokens) if self._tokens else ""

    def _count_out(self, text: str) -> int:
        """How many characters of `text`, which the tokens say now, are out."""
        if self._goes_on:  # what came before may have ended inside a character
            pairs = zip(self._out, text, strict=False)
            return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return len(self._out)

    def _last(self, tokens: list[int]) -> list[int]:
        """The last tokens, as many as those that follow need before them."""
        settled = len(tokens)
        while settled and self._changes(tokens[settled - 1]):
            settled -= 1
        start = max(settled - 1, 0)
        while start and not self._decode(tokens[start:]).strip(_INCOMPLETE):
            start -= 1
        return tokens[start:]

    def _forget(self, text: str) -> None:
        """All of `text` is out: keep the fewest last tokens that have a text of their own."""
        for start in range(len(self._tokens) - 1, -1, -1):
            last = self._tokens[start:]
            if not start or self._decode(last):
                break
        self._tokens, self._goes_on = last, False
        self._out = self._text()

    def _release(self, text: str, uncertain: str = "") -> str:
        """What of the text that is certain now may go out; the uncertain one after it may stop it
        as well, since no more comes then."""
        if self.stopped:
            return ""
        text = self._held + text
        whole = text + uncertain
        found = [at for at in (whole.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return whole[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def text_after(tokenizer: Any, before: Sequence[int], new: Sequence[int], stop: Any = None) -> str:
    """The text of tokens that follow others, up to the first stop string."""
    stream = open_stream(tokenizer, stop, before)
    pieces = []
    for token in new:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return "".join([*pieces, stream.finish()])


def open_stream(tokenizer: Any, stop: Any = None, after: Sequence[int] = ()) -> TextStream:
    """A `TextStream` of this tokenizer, ours or another with `decode`."""
    changes = getattr(tokenizer, "may_change", None)
    return TextStream(tokenizer.decode, stop, after=after, changes=changes)


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
