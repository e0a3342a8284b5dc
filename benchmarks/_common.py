"""What the benchmarks share: a description of the machine, and where results go."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tf_gptopt._files import write_json

RESULTS = Path(__file__).resolve().parent / "results"

_PACKAGES = (
    "tf_gptopt",
    "tensorflow",
    "tf_keras",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "numpy",
    "llama_cpp_python",
    "ctranslate2",
    "torch",
    "keras-nlp",
)
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def machine() -> dict[str, Any]:
    """The processor, the versions of what is compared, the date and the command line."""
    name, flags = platform.processor(), set()
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(
            ["python", *(os.path.relpath(arg) if i == 0 else arg for i, arg in enumerate(sys.argv))]
        ),
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def on_this_processor(name: str) -> str:
    """`name`, and the processor, which keeps a result beside those of others: what it calls itself,
    and the last of the instructions looked for, since Xeons are all called the same."""
    here = machine()
    return f"{name}, {' with '.join([here['processor'], *here['instructions'][-1:]])}"


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write `benchmarks/results/{name}.json`, with the machine beside the numbers."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"machine": machine(), **result})
    return path


def spread(values: Sequence[float], digits: int = 1) -> dict[str, Any]:
    """Median, smallest, largest and all of `values`, rounded."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "all": [round(value, digits) for value in values],
    }


def in_a_child(script: str, *arguments: Any) -> dict[str, Any]:
    """What `script --child ARGUMENTS` prints as its last line, both as JSON: a process of its own
    has a peak memory of its own."""
    done = subprocess.run(
        [sys.executable, script, "--child", json.dumps(arguments)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
