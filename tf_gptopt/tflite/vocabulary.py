"""The tokenizer that belongs to a file, and the tokens that may come in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt._ids import as_ids
from tf_gptopt._tokenizer import as_tokenizer
from tf_gptopt.models.choosing import rows_without_token
from tf_gptopt.tflite.bundle import (
    kept_tokenizer,
    load_tokenizer,
    read_tokenizer,
    tokenizer_beside,
)


def is_batch(prompt: Any) -> bool:
    """Whether these are several prompts: a list of texts or lists, or an array of two dimensions; a
    list of integers is one prompt."""
    if isinstance(prompt, (list, tuple)):
        return any(isinstance(item, (str, list, tuple, np.ndarray)) for item in prompt)
    return isinstance(prompt, np.ndarray) and prompt.ndim == 2


class Vocabulary:
    """The tokens of a file, and its tokenizer once text comes in or goes out.

    Args:
        path: the .tflite file.
        metadata: what it says about itself.
        tokenizer: default the one inside the file, or else beside it.

    Raises:
        UserError: for a tokenizer that does not belong to the file.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], tokenizer: Any = None) -> None:
        self.size = metadata["gpt"]["vocab_size"]
        self._path, self._known = path, dict(metadata["tokenizer"] or {})
        self._tokenizer = None
        if tokenizer is not None:
            self._tokenizer = self._check(as_tokenizer(tokenizer), tokenizer)
        # now: by the time that text comes in, another file may have this one's name
        self._files = kept_tokenizer(path) if tokenizer is None else {}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was given, the one inside the file, or the one beside it.

        Raises:
            UserError: when there is none, or it is not the one that the model was exported with.
        """
        if self._tokenizer is None:
            files = self._files or tokenizer_beside(self._path)
            if not files:
                raise UserError(
                    f"There is no tokenizer in {self._path} and no tokenizer.json beside it, and "
                    "text needs one. Copy it there, hand a tokenizer over, or use token ids."
                )
            self._tokenizer = self._check(load_tokenizer(files))
        return self._tokenizer

    @property
    def eot_id(self) -> int | None:
        """The token that ends a text, if the model was exported with a tokenizer or has one."""
        return self._fact("eot_id")

    @property
    def eot_ids(self) -> tuple[int, ...]:
        """All tokens that end a text: those of the tokenizer, and those that the file knows."""
        ids = [self.eot_id, *getattr(self._tokenizer, "eot_ids", ())]
        ids += self._known.get("eot_ids") or []
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def _fact(self, name: str) -> Any:
        """What the tokenizer says of itself, or else the file of the one it was exported with."""
        said = getattr(self._tokenizer, name, None)
        return self._known.get(name) if said is None else said

    @property
    def ids_without_token(self) -> np.ndarray:
        """The rows of the table that mean nothing, `(n,)`: a table is often padded."""
        known = self._fact("vocab_size"), self._fact("ids_without_token")
        return rows_without_token(self.size, *known)

    def check_same(self, other: Vocabulary) -> None:
        """
        Raises:
            UserError: when a token would not mean the same in `other`, another file's.
        """
        if self.size != other.size:
            raise UserError(
                f"{self._path} has {self.size} tokens and {other._path} {other.size}: a draft must "
                "have the target's vocabulary. Distill one from the target."
            )
        ours, theirs = (each._known.get("fingerprint") for each in (self, other))
        if ours and theirs and ours != theirs:
            raise UserError(
                f"{self._path} was exported with another tokenizer than {other._path} (fingerprint "
                f"{ours[:12]} and {theirs[:12]}): a draft must have the target's. Distill one from "
                "the target."
            )

    def as_prompt(self, text: str | Sequence[int]) -> np.ndarray:
        """`as_ids`, and a text begins with the tokens that the tokenizer puts before one."""
        if isinstance(text, str) and text and hasattr(self.tokenizer, "encode_prompt"):
            return self.check_ids(self.tokenizer.encode_prompt(text))
        return self.as_ids(text)

    def as_ids(self, text: str | Sequence[int]) -> np.ndarray:
        """Text or ids as ids, `(time,)` int32 with at least one.

        Raises:
            UserError: for no ids, ids outside the vocabulary, and text without a tokenizer.
        """
        if isinstance(text, str) and not text:
            raise UserError("There is no text. Begin with any; '<|endoftext|>' begins a document.")
        return self.check_ids(self.tokenizer.encode(text) if isinstance(text, str) else text)

    def check_ids(self, ids: Any) -> np.ndarray:
        """Ids as `as_ids` returns them."""
        expected = "A prompt is text or a list of at least one token id."
        array = as_ids(ids, expected, vocab_size=self.size)
        if not array.size:
            raise UserError(f"{expected} Received: none ({type(ids).__name__}).")
        return array

    def _check(self, tokenizer: Any, given: Any = None) -> Any:
        """A tokenizer that may have been made from the given one, if it belongs to the file."""
        if not all(callable(getattr(tokenizer, name, None)) for name in ("encode", "decode")):
            raise UserError(
                "A tokenizer has encode(text) and decode(ids), such as Tokenizer.load(folder). "
                f"Received: {tokenizer!r}."
            )
        size = getattr(tokenizer, "vocab_size", None)
        mark = getattr(tokenizer, "fingerprint", None)
        expected = self._known.get("fingerprint")
        if isinstance(size, int) and size > self.size:
            raise UserError(
                f"The tokenizer knows {size} tokens and {self._path} only {self.size}: "
                "it belongs to another model. Take the tokenizer.json that was exported with it."
            )
        if mark and expected and mark != expected and not self._means_the_same(tokenizer, given):
            raise UserError(
                f"The tokenizer is not the one that {self._path} was exported with (fingerprint "
                f"{mark[:12]}, expected {expected[:12]}): the text would be nonsense. "
                "Take the tokenizer.json that was exported with it."
            )
        return tokenizer

    def _means_the_same(self, tokenizer: Any, given: Any) -> bool:
        """Whether one that was made from somebody else's, who writes files in another way, has the
        tokens of the file's own."""
        if given is None or given is tokenizer:
            return False
        own = read_tokenizer(self._path)
        return own is not None and own.has_same_tokens(tokenizer)
