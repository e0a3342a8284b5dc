"""Kill a function at every step that it takes on the disk, one after the other."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"}


def killed_at_each_step(save: Callable[[], Any], every: int = 1) -> Iterator[int]:
    """Yields after each kill of a copy of this process, just before the n-th step of `save` that
    opens or changes something on the disk (as Python's audit events tell); n = 1, 1 + every, ...

    It ends, without yielding, with the copy that gets through.
    """
    for step in range(1, 400, every):
        child = os.fork()
        if not child:
            _die_at(step)
            try:
                save()
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        assert code == -signal.SIGKILL, f"step {step} ended with {code}"
        yield step
    raise AssertionError("it never gets through")


def _die_at(step: int) -> None:
    left = step

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
