"""LiteRT in a process of its own: what it cannot do, it may answer by aborting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_child(*arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, this package on its path; what it says is caught."""
    package = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )


def last_words(child: subprocess.CompletedProcess[str], count: int = 1) -> list[str]:
    """The last lines that it wrote to stderr, without empty ones."""
    return [line.strip() for line in child.stderr.splitlines() if line.strip()][-count:]
