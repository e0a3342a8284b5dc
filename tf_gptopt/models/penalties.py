"""Logits changed before a token is chosen, by the tokens so far and by the user's wishes.

numpy only, no TensorFlow: the same object serves Keras models and TFLite files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.models.sampling import is_count


@dataclasses.dataclass(frozen=True)
class Penalties:
    """What is added to logits, and what tokens lose that the sequence holds already.

    The repetition penalty looks at prompt and completion, as `transformers` does; the other two
    count what was generated, as OpenAI, vLLM and TensorRT-LLM do. First comes the bias, then the
    repetition penalty, then the other two; a sampler's temperature comes after all of them.

    Args:
        repetition_penalty: divides the positive and multiplies the negative logits of tokens in the
            sequence (Keskar et al. 2019, CTRL); 1 changes nothing, 1.2 is usual.
        frequency_penalty: subtracted as often as the completion holds the token (OpenAI's
            definition); 0 changes nothing, below 0 favours repetition.
        presence_penalty: subtracted once from each token in the completion (OpenAI's definition).
        logit_bias: `{token id: number}`, added; `-float("inf")` forbids a token.
        penalty_window: how many of the sequence's last tokens the three penalties look at; None
            for all of them.

    Raises:
        UserError: for numbers that are not finite, a repetition penalty of 0 or less, a bias that
            is no dictionary of token ids and numbers, and a window of no tokens.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    penalty_window: int | None = None

    def __post_init__(self) -> None:
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or not np.isfinite(value):
                raise UserError(f"{name} must be a finite number. Received: {name}={value!r}.")
        if self.repetition_penalty <= 0:
            raise UserError(
                "repetition_penalty must be above 0: 1 changes nothing, more avoids repetition. "
                f"Received: repetition_penalty={self.repetition_penalty}."
            )
        if self.penalty_window is not None and not is_count(self.penalty_window):
            raise UserError(
                "penalty_window must be a positive integer, the number of last tokens that count. "
                f"Received: penalty_window={self.penalty_window!r}."
            )
        _check_bias(self.logit_bias)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # later changes stay outside

    def __call__(
        self,
        logits: np.ndarray,
        histories: Sequence[Sequence[int]],
        out: np.ndarray | None = None,
        prompts: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The changed logits.

        Args:
            logits: `(batch, vocab_size)` float32.
            histories: the ids of each row's sequence so far, in any number.
            out: where the changed logits go, `(batch, vocab_size)` float32; default a new array.
                `logits` themselves are the fastest place: only the ids that count are touched.
            prompts: how many of each row's first ids are its prompt; default none.

        Returns:
            `(batch, vocab_size)` float32; `logits` themselves where nothing is to change.

        Raises:
            UserError: for ids outside the vocabulary, and when no token is left to choose.
        """
        looks_back = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty
        if not looks_back and not self.logit_bias:
            return logits
        sound = np.isfinite(logits.max(-1)).all()
        changed = np.empty(logits.shape, np.float32) if out is None else out
        if out is not logits:
            changed[:] = logits
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            if self.logit_bias:
                ids = _checked_ids(list(self.logit_bias), logits.shape[-1], "logit_bias")
                changed[:, ids] += np.fromiter(self.logit_bias.values(), np.float64, len(ids))
            if looks_back:
                starts = [0] * len(changed) if prompts is None else prompts
                for row, history, start in zip(changed, histories, starts, strict=True):
                    self._penalize(row, history, start)
        if sound and not np.isfinite(changed.max(-1)).all():
            raise UserError(
                "Penalties and logit_bias leave no token to choose: they forbid every one, or are "
                "too large for float32. Forbid fewer tokens, or take smaller numbers."
            )
        return changed

    def _penalize(self, row: np.ndarray, history: Sequence[int], prompt: int) -> None:
        """Change a row `(vocab_size,)` in place, where the sequence's tokens are."""
        first = max(0, len(history) - (self.penalty_window or len(history)))
        if (factor := self.repetition_penalty) != 1 and len(history) > first:
            ids = _checked_ids(np.unique(history[first:]), len(row), "The sequence")
            seen = row[ids]
            row[ids] = np.where(seen > 0, seen / factor, seen * factor)
        first = max(first, prompt)
        if (self.frequency_penalty or self.presence_penalty) and len(history) > first:
            ids, counts = np.unique(history[first:], return_counts=True)
            ids = _checked_ids(ids, len(row), "The sequence")
            row[ids] -= counts * self.frequency_penalty + self.presence_penalty


def _checked_ids(ids: Sequence[int], vocab_size: int, what: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(
            f"{what} has token ids that are no integers from 0 to {vocab_size - 1}, the model's "
            f"vocabulary. Use the tokenizer that the model was trained with. Received: {ids[:9]}."
        )
    return ids


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, Mapping):
        raise UserError(f"logit_bias is a dictionary {{token id: number}}. Received: {bias!r}.")
    for token, value in bias.items():
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool) or token < 0:
            raise UserError(
                f"logit_bias has the key {token!r}, which is no token id. Encode the text with the "
                "model's tokenizer and name each id."
            )
        if not _is_number(value) or not value < float("inf"):
            raise UserError(
                'logit_bias must be finite, or -float("inf") to forbid a token. Received: '
                f"{value!r} for token {token}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
