"""The one error that a user can mend: it says what happened, what was expected and what to do."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake in what was asked for: the command line prints it on one line and exits with 2."""

    # raised while TensorFlow traces or a Keras layer is called, it stays the sentence that it is
    ag_pass_through = True
    _keras_call_info_injected = True


def suggest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest known name, else the known names themselves."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."


def reason_of(error: BaseException) -> str:
    """What the system said went wrong, in its words alone: without the names of files, and of
    TensorFlow's nodes and operations."""
    lines = str(error).splitlines() or [type(error).__name__]
    said = getattr(error, "strerror", None) or lines[0]
    return re.sub(r"\{\{.*?\}\}|\[Op:\w+\]", "", said).rpartition("; ")[2].strip()


def known_arguments(cls: type) -> type:
    """A class whose constructor says which argument an unknown one may have been meant for."""
    init = cls.__init__
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                what = type(self).__name__
                raise UserError(f"{what} has no argument {name!r}.{suggest(name, known)}")
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls
