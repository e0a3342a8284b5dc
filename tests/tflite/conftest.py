"""What the tests of this room share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def exported(tmp_path, tiny_model) -> Callable[..., Any]:
    """`exported(scheme="float32", tokenizer=None, **shape)`: a tiny model and its runtime.

    The scheme is a name of weights, or a `QuantConfig`.
    """

    def export(scheme: Any = "float32", model: Any = None, **options: Any) -> Any:
        from tf_gptopt.compression.quantization.config import QuantConfig
        from tf_gptopt.tflite.convert import export_tflite
        from tf_gptopt.tflite.runtime import TFLiteGPT

        export_options = {
            key: options.pop(key)
            for key in (
                "tokenizer",
                "calibration",
                "prefill_lengths",
                "decode_capacities",
                "verify_lengths",
            )
            if key in options
        }
        model = model or tiny_model(**options)
        config = QuantConfig(scheme) if isinstance(scheme, str) else scheme
        path = tmp_path / f"{config.name}.tflite"
        export_tflite(model, path, config, **export_options)
        return model, TFLiteGPT(path, threads=1)

    return export


@pytest.fixture
def speaking(exported, tiny_tokenizer) -> Any:
    """The runtime of a tiny model with a tokenizer of 300 tokens."""
    _, runtime = exported("float32", vocab_size=300, tokenizer=tiny_tokenizer)
    return runtime


@pytest.fixture
def some_ids() -> Callable[..., np.ndarray]:
    """`some_ids(count, vocab_size=61, seed=0)`: random tokens."""

    def ids(count: int, vocab_size: int = 61, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, vocab_size, count)

    return ids


@pytest.fixture
def relative_error() -> Callable[[np.ndarray, np.ndarray], float]:
    """Root mean square of the difference, in units of the reference's deviation from its mean."""

    def error(logits: np.ndarray, reference: np.ndarray) -> float:
        centred = reference - reference.mean(-1, keepdims=True)
        return float(np.sqrt(np.mean((logits - reference) ** 2) / np.mean(centred**2)))

    return error
