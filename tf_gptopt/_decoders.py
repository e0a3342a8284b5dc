"""When the text of tokens can no longer change: what a tokenizer's decoder says. No TensorFlow.

A text that is decoded as its tokens come must not change afterwards. Most decoders of `tokenizers`
only ever add to it. Two things do not: the bytes of a row of byte tokens (`<0xE4>`), all of which
become U+FFFD when the row as a whole is not UTF-8; and a decoder that looks for several characters
in the whole text at once.
"""

from __future__ import annotations

import enum
import string
from typing import Any


class Changes(enum.Enum):
    """Which tokens' text may yet change when others follow."""

    NEVER = "never"
    BYTES = "the last ones, as long as they are byte tokens"
    ALWAYS = "any"


_JOINING = ("BPEDecoder", "ByteLevel", "Fuse")  # what comes after sees more than one token
_KNOWN = (*_JOINING, "ByteFallback", "CTC", "Metaspace", "Replace", "Strip", "WordPiece")
_BYTE_TOKEN = set("<>x" + string.hexdigits)


def changes_of(decoder: dict[str, Any] | None) -> Changes:
    """What the `decoder` of a tokenizer.json means for text that is decoded piece by piece.

    Where nothing changes, text may also be decoded from any token on whose decoded text is not
    empty: that token alone, and what the decoder does to a first one, is then the same in both.
    """
    stages = _stages(decoder)
    names = [stage.get("type") for stage in stages]
    joined = min((names.index(name) for name in _JOINING if name in names), default=len(names))
    for place, (stage, name) in enumerate(zip(stages, names, strict=True)):
        if place > joined and not (name in ("Fuse", "Strip") or _replaces_one_character(stage)):
            return Changes.ALWAYS
        if name == "CTC" and place:  # what it drops as repeated depends on the stage before
            return Changes.ALWAYS
        if name == "ByteFallback" and not all(_keeps_bytes(before) for before in stages[:place]):
            return Changes.ALWAYS
        if name not in _KNOWN:
            return Changes.ALWAYS
    return Changes.BYTES if "ByteFallback" in names else Changes.NEVER


def is_byte_token(token: str | None) -> bool:
    """Whether a byte decoder may take the token for a byte."""
    return token is not None and "<0x" in token


def _stages(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not decoder:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [stage for part in decoder.get("decoders", []) for stage in _stages(part)]


def _replaces_one_character(stage: dict[str, Any]) -> bool:
    pattern = _pattern(stage)
    # the replacement character is how an incomplete one is told
    return pattern is not None and len(pattern) == 1 and pattern != "\ufffd"


def _keeps_bytes(stage: dict[str, Any]) -> bool:
    """Whether a stage leaves byte tokens what they are, and makes no others."""
    pattern, content = _pattern(stage), stage.get("content", "")
    return pattern is not None and bool(content) and not _BYTE_TOKEN & {*pattern, *content}


def _pattern(stage: dict[str, Any]) -> str | None:
    """The text that a stage replaces, or None."""
    pattern = stage.get("pattern") if stage.get("type") == "Replace" else None
    return pattern.get("String") if isinstance(pattern, dict) else None
