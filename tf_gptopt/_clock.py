"""Seconds as people read them."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """75.0 -> `1:15`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"
