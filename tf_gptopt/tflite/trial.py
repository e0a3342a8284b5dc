"""A file's first run: what it computes for a few tokens, where it can do no harm.

What LiteRT cannot do, it may answer by aborting. `python -m tf_gptopt.tflite.trial FILE` runs every
signature of a file once, on zeros, in a process of its own, and says how that went, also of one
that LiteRT died of or did not come back from. It needs no TensorFlow and takes half a second beside
the loading.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.tflite import quiet
from tf_gptopt.tflite.child import last_words, run_child
from tf_gptopt.tflite.litert import host_buffer, load_litert, zeros_for

COMMAND = ("-m", "tf_gptopt.tflite.trial", "--child")
_BEGUN = "trying "  # what the child says before a signature
_CHATTER = re.compile("(INFO|WARNING): |\u2514 ")  # of LiteRT's, whatever it does
_SECONDS = 300.0  # for all of it, and one more for each MB: GPT-2's 126 MB take 3


class Logits(NamedTuple):
    """What a file makes of tokens, on the two ways that it has of reading them.

    Args:
        at_once: the logits after each token, `(time, vocab_size)`.
        rows: positions that were read again, `(some,)`: the text in pieces, over a growing cache,
            and its last tokens one by one.
        pieces: the logits after each of those, `(some, vocab_size)`.
    """

    at_once: np.ndarray
    rows: np.ndarray
    pieces: np.ndarray


def read_logits(path: str | os.PathLike, ids: np.ndarray) -> Logits:
    """Read tokens `(time,)` with a .tflite file of ours, in this process.

    Raises:
        UserError: when LiteRT refuses the file or fails.
    """
    from tf_gptopt.tflite.runtime import TFLiteGPT

    gpt = TFLiteGPT(path, verify=False)
    time = len(ids)
    first = (time + 1) // 2
    second = first + time // 3
    pieces = [(0, first), (first, second), *((t, t + 1) for t in range(second, time))]
    pieces = [(start, end) for start, end in pieces if start < end]
    try:
        at_once = gpt.logits(ids)
        gpt.reset()
        logits = [gpt.prefill(ids[start:end]) for start, end in pieces]
    except RuntimeError as error:
        raise UserError(f"LiteRT cannot run {path}: {' '.join(str(error).split())}.") from None
    return Logits(at_once, np.array([end - 1 for _, end in pieces]), np.array(logits))


def try_file(path: str | os.PathLike, scheme: str, ids: np.ndarray | None = None) -> Logits | None:
    """Run every signature of a .tflite file once, in a child process.

    Args:
        path: the file.
        scheme: its name, for people.
        ids: tokens `(time,)` to read, with a file of ours.

    Returns:
        What `read_logits` gives for `ids`, or None without.

    Raises:
        UserError: when LiteRT refuses the file, ends the process, or computes NaN or infinity;
            or does not come to an end; with the signature, and what LiteRT said.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("ids.npy", "logits.npz")]
        if ids is not None:
            np.save(files[0], ids)
        child = _run(path, *(files if ids is not None else ()))
        if child.returncode == 0:
            return None if ids is None else Logits(**np.load(files[1]))
    raise UserError(
        f"LiteRT {version('ai-edge-litert')} cannot run a file of the scheme {scheme!r}: "
        f"{_ending(child)} Nothing was written. Take another scheme; "
        'QuantConfig("int8") runs everywhere.'
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


def _run(path: str | os.PathLike, *files: Path) -> subprocess.CompletedProcess[str]:
    """The child; with a return code of None where it was not ready in time."""
    file = Path(path)
    seconds = _SECONDS + (file.stat().st_size / 1e6 if file.is_file() else 0)
    try:
        return run_child(*COMMAND, str(path), *map(str, files), timeout=seconds)
    except subprocess.TimeoutExpired as error:
        texts = [text or b"" for text in (error.stdout, error.stderr)]
        out, err = (t if isinstance(t, str) else t.decode("utf-8", "replace") for t in texts)
        return subprocess.CompletedProcess(error.cmd, None, out, err)


def _ending(child: subprocess.CompletedProcess[str]) -> str:
    """How it ended, where, and what it said."""
    code = child.returncode
    if code is None:
        how = "no answer in time"
    else:
        how = f"the process was ended by signal {-code}" if code < 0 else "an error"
    begun = [line for line in child.stdout.splitlines() if line.startswith(_BEGUN)]
    where = begun[-1].removeprefix(_BEGUN) if begun else "the start"
    said = [line for line in last_words(child, 50) if not _CHATTER.match(line)]
    return f"{how} at {where}. It said: {' | '.join(said[-2:]) or 'nothing'}."


def main(path: str, ids: str | None = None, out: str | None = None) -> None:
    """What the child does."""
    quiet.hear()  # what LiteRT says last, it says here
    run_all(Path(path))
    if out is not None:
        print(f"{_BEGUN}{len(tokens := np.load(ids))} tokens", flush=True)
        np.savez(out, **read_logits(path, tokens)._asdict())


def _report(path: str) -> str:
    """A line about a file that runs; `SystemExit` with one about a file that does not."""
    child = _run(path)
    if child.returncode != 0:
        sys.exit(f"{path} does not run: {_ending(child)}")
    count = sum(line.startswith(_BEGUN) for line in child.stdout.splitlines()) - 1  # the loading
    return f"{path} runs: {count} signatures, on zeros."


if __name__ == "__main__":
    if sys.argv[1:2] != [COMMAND[-1]]:
        if len(sys.argv) != 2:
            sys.exit("usage: python -m tf_gptopt.tflite.trial FILE")
        print(_report(sys.argv[1]))
        sys.exit()
    try:
        main(*sys.argv[2:])
    except (UserError, RuntimeError) as error:
        sys.exit(" ".join(str(error).split()))
