"""Layers that are made under a dtype policy of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tf_gptopt._keras import keras


@contextlib.contextmanager
def policy_scope(policy: Any) -> Iterator[None]:
    """Within, layers are made under `policy`, a name or a `Policy`; None leaves the global one."""
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(before if policy is None else policy)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)
