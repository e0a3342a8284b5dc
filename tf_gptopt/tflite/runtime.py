"""Runs an exported GPT: numpy, ai-edge-litert and tokenizers are all it needs.

```python
gpt = TFLiteGPT("model.tflite")
for piece in gpt.stream("def main(", max_new_tokens=50):
    print(piece, end="", flush=True)
```
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt.tflite.conversation import Conversation
from tf_gptopt.tflite.limits import is_count
from tf_gptopt.tflite.litert import load_litert
from tf_gptopt.tflite.metadata import start_reading
from tf_gptopt.tflite.program import Program
from tf_gptopt.tflite.vocabulary import Vocabulary

_THREADS_AT_ALL = 1024
_MOST_THREADS = 8  # more wait for each other: a token is a few milliseconds of many small products


class TFLiteGPT(Conversation):
    """A GPT in a .tflite file, its tokenizer, and one sequence of tokens.

    Args:
        path: a file that `export_tflite` wrote.
        threads: processor threads; default those this process may use, at most 8.
        tokenizer: default the one inside the file, or else the files beside it.
        verify: compare the file's checksums: 10 ms per 100 MB. LiteRT trusts what it loads and
            crashes on damaged files: leave it out only for a file that was compared before.
        weight_cache: a folder for the weights in the order that the processor wants, as large as
            the model; written on the first load. The first token then comes after 0.1 s instead of
            0.3 s (124 M parameters), and processes share the memory.
            Default: in memory.

    The file stays mapped into memory: to replace it, write another beside it and rename that, as
    `export_tflite` does. Whoever changes it in place changes what is running, and whoever cuts it
    short ends the process. The checksum tells damage, not malice: try a file of unknown origin in
    a process of its own (`tflite.trial`).

    Attributes:
        config: the model's `GPTConfig`.
        metadata: all that the file says about itself.
        threads: as given or chosen.
        finish_reason, reused, draft_stats: see `Conversation`.

    Raises:
        UserError: for a file that is absent, damaged or not ours, and for a tokenizer that does not
            belong to it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        threads: int | None = None,
        tokenizer: Any = None,
        *,
        verify: bool = True,
        weight_cache: str | os.PathLike | None = None,
    ) -> None:
        self.path = _as_path(path, "path")
        self.metadata, verification = start_reading(self.path, verify)
        self.threads = _choose_threads(threads)
        if weight_cache is not None:
            weight_cache = _as_path(weight_cache, "weight_cache")
        with verification:
            try:
                vocabulary = Vocabulary(self.path, self.metadata, tokenizer)
                model = load_litert(
                    self.path,
                    self.threads,
                    self.metadata["sha256"],
                    weight_cache,
                    # packing ends with giving back the file's pages, which it cannot do while
                    # somebody else has them mapped; with packed weights, the comparison goes on
                    before_packing=verification.wait,
                )
                program = Program(model, self.metadata, self.threads)
            except (AttributeError, LookupError, TypeError) as error:
                raise UserError(
                    f"{self.path} is damaged: what it says about itself does not fit ({error!r}). "
                    "Copy or export it again."
                ) from None
        super().__init__(program, vocabulary)


def _as_path(path: Any, name: str) -> Path:
    if not isinstance(path, (str, os.PathLike)) or "\0" in os.fspath(path):
        raise UserError(f"{name} must be a file's path as text. Received: {name}={path!r}.")
    return Path(path)


def _choose_threads(threads: int | None) -> int:
    if threads is None:
        # what this process may use, where the system tells
        can_ask = hasattr(os, "sched_getaffinity")
        return min(len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1, _MOST_THREADS)
    if not is_count(threads) or not 1 <= threads <= _THREADS_AT_ALL:
        raise UserError(
            f"threads must be a positive integer, at most {_THREADS_AT_ALL}. Received: "
            f"threads={threads!r}."
        )
    return int(threads)
