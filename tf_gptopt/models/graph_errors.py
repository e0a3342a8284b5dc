"""What a graph says of a wrong id, as an error that people can read.

Labels and token ids come out of a `tf.data` pipeline, so it is the graph that finds one that is no
token, and TensorFlow names nodes and kernels. Here `fit`, `evaluate` and `predict` say it plainly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError

_ASSERTION = re.compile(r"(A label is no token: .*? Received a label:)\W*?(\d+)", re.DOTALL)
_LENGTH = re.compile(r"\[(The input is)\] \[(\d+)\] \[(tokens long .*?max_sequence_length\.)\]")
_LOOKUP = re.compile(r"indices\[[\d,]*\] = (-?\d+) is not in \[0, (\d+)\)")


class ReadableErrors:
    """A mixin, named before `keras.Model`."""

    def make_train_function(self, force: bool = False) -> Callable[..., Any]:
        self.train_function = _readable(super().make_train_function(force))
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable[..., Any]:
        self.test_function = _readable(super().make_test_function(force))
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Callable[..., Any]:
        self.predict_function = _readable(super().make_predict_function(force))
        return self.predict_function


def _readable(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with what is wrong about an id as a `UserError`."""
    if getattr(function, "is_readable", False):
        return function

    def run_readably(*args: Any) -> Any:
        try:
            return function(*args)
        except tf.errors.InvalidArgumentError as error:
            told = explain(str(error))
            if told is None:
                raise
            raise UserError(told) from None

    run_readably.is_readable = True
    return run_readably


def explain(message: str) -> str | None:
    """What people need to know of an error of the graph, if it is about an id."""
    found = _ASSERTION.search(message) or _LENGTH.search(message)
    if found:
        return " ".join(found.groups()).replace("\\'", "'")  # as TensorFlow prints a string
    found = _LOOKUP.search(message)
    if found:
        return (
            f"A token id is none: ids are below the vocabulary's {found[2]}. Encode the text with "
            f"this model's own tokenizer. Received an id: {found[1]}"
        )
    return None
