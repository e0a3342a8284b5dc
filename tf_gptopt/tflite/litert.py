"""LiteRT as this package wants it: one environment, quiet, and the weights packed once."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ai_edge_litert
import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.environment import Environment, EnvironmentOptions
from ai_edge_litert.options import Options
from ai_edge_litert.tensor_buffer import TensorBuffer

from tf_gptopt._errors import UserError
from tf_gptopt.tflite.buckets import ALIGNMENT
from tf_gptopt.tflite.quiet import native_output
from tf_gptopt.tflite.weight_cache import cache_file


def load_litert(
    path: Path,
    threads: int,
    sha256: str,
    weight_cache: str | os.PathLike | None = None,
    before_packing: Callable[[], None] = lambda: None,
) -> CompiledModel:
    """Load a .tflite file on the CPU.

    XNNPACK repacks the weights for the processor. Without a cache it does so for every signature
    anew (1.5 GB and 9 s for twelve signatures over 126 MB); with one they share the copy.

    Args:
        threads: processor threads.
        sha256: of the file: a name for its content.
        weight_cache: a folder to keep the packed weights in; None keeps them in memory.
        before_packing: called before weights are packed, which is not done when that folder has
            them. Raises if the file is not the one of this `sha256`.

    Raises:
        UserError: when LiteRT refuses the file.
    """
    options = Options()
    options.cpu_options.num_threads = threads
    options.cpu_options.xnnpack_weight_cache_path = ":memory"
    with contextlib.ExitStack() as stack:
        if weight_cache is not None:
            folder, size = Path(weight_cache), path.stat().st_size
            file = stack.enter_context(cache_file(folder, sha256, size, before_packing))
            options.cpu_options.xnnpack_weight_cache_path = str(file)
        else:
            before_packing()
        log = stack.enter_context(native_output())
        try:
            return CompiledModel.from_file(str(path), environment=_environment(), options=options)
        except RuntimeError as error:
            lines = [line for line in log().splitlines() if "ERROR" in line]
            reason = " ".join([str(error).splitlines()[0], *lines[:1]])
            raise UserError(
                f"LiteRT {ai_edge_litert.__version__} cannot load {path} ({reason}). Export it "
                "again, or upgrade with `pip install -U ai-edge-litert`."
            ) from None


def aligned_zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros at an address that LiteRT accepts, so that buffers need no copy."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)


def zeros_for(details: dict[str, Any]) -> np.ndarray:
    """Such zeros for a tensor, as `CompiledModel` describes it."""
    return aligned_zeros(tuple(details["shape"]), np.dtype(details["dtype"]))


class Memory:
    """Arrays that LiteRT reads in place, given back to the system when this object goes, even where
    something still holds the arrays: their content is zero then.

    LiteRT needs a buffer to exist until it has read another in its place, so a program keeps those
    of caches that are long gone. Without their memory that costs nothing.
    """

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Zeros of this shape; pages that nobody has written to take no memory."""
        count = math.prod(shape)
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
        pages = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize), **private)
        self._maps.append(pages)
        return np.frombuffer(pages, dtype, count).reshape(shape)

    def __del__(self) -> None:
        for pages in self._maps:
            if hasattr(pages, "madvise"):  # not on Windows
                pages.madvise(mmap.MADV_DONTNEED)


def host_buffer(array: np.ndarray) -> TensorBuffer:
    """A LiteRT buffer over `array`'s own memory (LiteRT sees such buffers as flat)."""
    return TensorBuffer.create_from_host_memory(array.reshape(-1))


@functools.cache
def _environment() -> Environment:
    folder = os.path.dirname(os.path.abspath(ai_edge_litert.__file__))
    environment = Environment.create(options=EnvironmentOptions(runtime_path=folder))
    # the first buffer that is used makes an environment of its own: let it do so now, quietly
    host_buffer(aligned_zeros((1,), np.float32)).read(1, np.float32)
    return environment
