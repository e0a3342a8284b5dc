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
from tf_gptopt.tflite.litert import load_litert
from tf_gptopt.tflite.metadata import read_metadata
from tf_gptopt.tflite.program import Program
from tf_gptopt.tflite.vocabulary import Vocabulary

_MOST_THREADS = 8  # more wait for each other: a token is a few milliseconds of many small products


class TFLiteGPT(Conversation):
    """A GPT in a .tflite file, its tokenizer, and one sequence of tokens.

    Args:
        path: a file that `export_tflite` wrote.
        threads: processor threads; default those this process may use, at most 8.
        tokenizer: default the files beside `path`, read when text first comes in or goes out.
        verify: compare the file's checksum (0.1 s per 150 MB).
        weight_cache: a folder for the weights in the order that the processor wants, as large as
            the model; written on the first load. Later loads then take 0.02 s instead of 0.5 s
            (124 M parameters), processes share the memory, and decoding is some 5% faster.
            Default: in memory.

    Attributes:
        config: the model's `GPTConfig`.
        metadata: all that the file says about itself.
        threads: as given or chosen.
        finish_reason: why the last generation ended: `"eot"`, `"stop"` (a stop string), `"length"`
            (`max_new_tokens`) or `"context"` (no room left); None before the first.

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
        self.path = Path(path)
        self.metadata = read_metadata(self.path, verify)
        self.threads = _choose_threads(threads)
        vocabulary = Vocabulary(self.path, self.metadata, tokenizer)
        model = load_litert(self.path, self.threads, self.metadata["sha256"], weight_cache)
        super().__init__(Program(model, self.metadata), vocabulary)

    def new_conversation(self) -> Conversation:
        """Another sequence of tokens over the same weights: a KV cache is all it takes."""
        return Conversation(self._program, self._vocabulary)


def _choose_threads(threads: int | None) -> int:
    if threads is None:
        # what this process may use, where the system tells
        can_ask = hasattr(os, "sched_getaffinity")
        return min(len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1, _MOST_THREADS)
    if not isinstance(threads, int) or threads < 1:
        raise UserError(f"threads must be a positive integer. Received: threads={threads!r}.")
    return threads
