"""A file's first run, in a process of its own: what LiteRT cannot do, it may answer by aborting.

`python -m tf_gptopt.tflite.trial FILE` runs every signature of a file once, on zeros. It needs no
TensorFlow and takes half a second beside the loading.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.tflite.litert import host_buffer, load_litert, zeros_for

COMMAND = ("-m", "tf_gptopt.tflite.trial")
_BEGUN = "trying "  # what the child says before a signature


def try_file(path: str | os.PathLike, scheme: str) -> None:
    """Run every signature of a .tflite file once, in a child process.

    Args:
        path: the file.
        scheme: its name, for people.

    Raises:
        UserError: when LiteRT refuses the file, ends the process, or computes NaN or infinity;
            with the signature, and what LiteRT said.
    """
    package = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, *COMMAND, str(path)],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if child.returncode == 0:
        return
    begun = [line for line in child.stdout.splitlines() if line.startswith(_BEGUN)]
    where = begun[-1].removeprefix(_BEGUN) if begun else "the start"
    said = [line.strip() for line in child.stderr.splitlines() if line.strip()][-2:]
    raise UserError(
        f"LiteRT {version('ai-edge-litert')} cannot run a file of the scheme {scheme!r}: "
        f"{_ending(child.returncode)} at {where}. It said: {' | '.join(said) or 'nothing'}. "
        'Nothing was written. Take another scheme; QuantConfig("int8") runs everywhere.'
    )


def run_all(path: Path) -> None:
    """Run every signature on zeros, and say which before each."""
    print(f"{_BEGUN}loading", flush=True)
    model = load_litert(path, 1, "trial")
    for signature, names in model.get_signature_list().items():
        print(f"{_BEGUN}{signature!r}", flush=True)
        details = model.get_input_tensor_details(signature)
        inputs = [zeros_for(details[name]) for name in names["inputs"]]
        details = model.get_output_tensor_details(signature)
        outputs = [zeros_for(details[name]) for name in names["outputs"]]
        buffers = [[host_buffer(array) for array in arrays] for arrays in (inputs, outputs)]
        model.run_by_index(model.get_signature_index(signature), *buffers)
        for name, array in zip(names["outputs"], outputs, strict=True):
            if not np.isfinite(array).all():
                raise UserError(f"{name} is not finite")


def _ending(code: int) -> str:
    return f"the process was ended by signal {-code}" if code < 0 else "an error"


if __name__ == "__main__":
    try:
        run_all(Path(sys.argv[1]))
    except (UserError, RuntimeError) as error:
        sys.exit(" ".join(str(error).split()))
