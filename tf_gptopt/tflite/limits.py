"""How far a generation goes: the caller's limit, and the context's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError, suggest

OVERFLOWS = ("stop", "slide")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What bounds prompt and completion.

    Args:
        context: the model's, in tokens.
        max_new_tokens: of the completion; None for as many as come.
        overflow: what happens when the context is full: `"stop"` ends the text, `"slide"` forgets
            the older half of it.
        keep: tokens at the beginning that are never forgotten.

    Raises:
        UserError: for impossible values.
    """

    context: int
    max_new_tokens: int | None = None
    overflow: str = "stop"
    keep: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and not is_count(self.max_new_tokens):
            raise UserError(
                "max_new_tokens must be an integer and must not be negative. Received: "
                f"{self.max_new_tokens!r}."
            )
        if not isinstance(self.overflow, str) or self.overflow not in OVERFLOWS:
            hint = suggest(str(self.overflow), OVERFLOWS)
            raise UserError(f"Unknown overflow={self.overflow!r}.{hint}")
        if not is_count(self.keep) or self.keep >= self.context:
            raise UserError(
                f"keep must be an integer from 0 to {self.context - 1}: tokens at the beginning of "
                f"a context of {self.context} that stay. Received: keep={self.keep!r}."
            )
        if self.keep and self.overflow != "slide":
            raise UserError('keep has an effect with overflow="slide" alone. Give both.')

    @property
    def are_none(self) -> bool:
        """Whether nothing here ends a generation."""
        return self.max_new_tokens is None and self.overflow == "slide"

    def check_prompt(self, length: int) -> None:
        """
        Raises:
            UserError: when a prompt of this length does not fit.
        """
        if length > self.context and self.overflow == "stop":
            raise UserError(
                f"{length} tokens do not fit: the model's context is {self.context} tokens. "
                'Shorten the text, or let its beginning go with overflow="slide".'
            )

    def room(self, length: int) -> int | None:
        """New tokens after a prompt of this length, at most; None for any number."""
        if self.overflow == "slide":
            return self.max_new_tokens
        left = self.context - length
        return left if self.max_new_tokens is None else min(self.max_new_tokens, left)


def is_count(value: Any) -> bool:
    """Whether it is an integer of 0 or more."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_integer and value >= 0
