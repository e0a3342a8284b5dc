"""The tokenizer that belongs to a file, and the tokens that may come in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError


class Vocabulary:
    """The tokens of a file, and its tokenizer once text comes in or goes out.

    Args:
        path: the .tflite file.
        metadata: what it says about itself.
        tokenizer: default the one that lies beside the file.

    Raises:
        UserError: for a tokenizer that does not belong to the file.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], tokenizer: Any = None) -> None:
        self.size = metadata["gpt"]["vocab_size"]
        self._path, self._known = path, metadata["tokenizer"] or {}
        self._tokenizer = None if tokenizer is None else self._check(tokenizer)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was given, or the one beside the file.

        Raises:
            UserError: when there is none, or it is not the one that the model was exported with.
        """
        if self._tokenizer is None:
            from tf_gptopt.data.tokenizer import Tokenizer

            if not (self._path.parent / "tokenizer.json").is_file():
                raise UserError(
                    f"There is no tokenizer.json beside {self._path}, and text needs one. Copy it "
                    "there, hand a tokenizer over, or use token ids."
                )
            self._tokenizer = self._check(Tokenizer.load(self._path.parent))
        return self._tokenizer

    @property
    def eot_id(self) -> int | None:
        """The token that ends a text, if the model was exported with a tokenizer or has one."""
        if self._tokenizer is not None:
            return self._tokenizer.eot_id
        return self._known.get("eot_id")

    def as_ids(self, text: str | Sequence[int]) -> np.ndarray:
        """Text or ids as ids, `(time,)` int32 with at least one.

        Raises:
            UserError: for no ids, ids outside the vocabulary, and text without a tokenizer.
        """
        return self.check_ids(self.tokenizer.encode(text) if isinstance(text, str) else text)

    def check_ids(self, ids: Any) -> np.ndarray:
        """Ids as `as_ids` returns them."""
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise UserError(
                "A prompt is text or a list of at least one token id. Received: "
                f"{type(ids).__name__} of shape {array.shape}, {array.dtype}."
            )
        outside = array[(array < 0) | (array >= self.size)]
        if outside.size:
            raise UserError(
                f"Token id {outside[0]} is outside the vocabulary of {self.size} tokens. Use the "
                "tokenizer that the model was trained with."
            )
        return array.astype(np.int32)

    def _check(self, tokenizer: Any) -> Any:
        size = getattr(tokenizer, "vocab_size", None)
        mark = getattr(tokenizer, "fingerprint", None)
        expected = self._known.get("fingerprint")
        if size is not None and size > self.size:
            raise UserError(
                f"The tokenizer knows {size} tokens and {self._path} only {self.size}: "
                "it belongs to another model. Take the tokenizer.json that was exported with it."
            )
        if mark and expected and mark != expected:
            raise UserError(
                f"The tokenizer is not the one that {self._path} was exported with (fingerprint "
                f"{mark[:12]}, expected {expected[:12]}): the text would be nonsense. "
                "Take the tokenizer.json that was exported with it."
            )
        return tokenizer
