"""Token ids: what is none is refused by every function that takes some, and not rounded to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt._ids import as_ids
from tf_gptopt._tokenizer import Tokenizer

WRONG = {
    "2^31": [1, 2**31],
    "2^32+1": [1, 2**32 + 1],  # 1 in int32
    "2^63": [2**63],
    "10^30": [10**30],
    "-2^63": [-(2**63)],
    "2^64-1": np.array([2**64 - 1], np.uint64),
    "float": [1.0, 2.0],
    "1.5": [1.5],
    "nan": [float("nan"), 1.0],
    "-0.0": [-0.0],
    "float16": np.array([1, 2], np.float16),
    "bool": [True, False],
    "a bool among ints": [2, True],
    "numpy bool": np.array([True, False]),
    "str": ["1", "2"],
    "None": [None, 1],
    "object": np.array([1, "a"], object),
    "complex": np.array([1 + 0j]),
    "0-d": np.int32(3),
    "int": 3,
    "three axes": np.ones((1, 1, 3), np.int32),
    "bytes": b"abc",
    "set": {1, 2},
    "dict": {1: 2},
    "ragged": [[1, 2], [3]],
    "date": np.array(["2020-01-01"], "M8[D]"),
    "timedelta": np.array([1], "m8[D]"),
    "record": np.zeros(2, [("a", "i4")]),
    "masked": np.ma.array([1, 99], mask=[0, 1]),
    "size": [1, 300],
    "-1": [1, -1],
}
RIGHT = ([1, 2], (1, 2), np.array([1, 2], np.uint64), np.array([1, 2], np.int8), range(1, 3))


def _row(values: Any) -> Any:
    """As a batch of one."""
    if isinstance(values, np.ndarray):
        return values[None]
    return [values]


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Any], Any]]:
    """Public functions, each from one sequence of ids."""
    from tf_gptopt.compression.calibration_text import calibration_ids
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.compression.quantization.ptq import quantize
    from tf_gptopt.evaluation.quality import measure_quality
    from tf_gptopt.models.gpt import GPTModel
    from tf_gptopt.tflite.convert import export_tflite
    from tf_gptopt.tflite.runtime import TFLiteGPT

    model = GPTModel(300, 16, 1, 2, max_sequence_length=16)
    path = tmp_path_factory.mktemp("ids") / "model.tflite"
    export_tflite(model, path, check=False)
    gpt = TFLiteGPT(path, threads=1)
    ones = np.ones((1, 2), np.int32)
    return {
        "calibration_ids": lambda ids: calibration_ids(_row(ids)),
        "quantize": lambda ids: quantize(model, QuantConfig.from_recipe("int4-gptq"), _row(ids)),
        "measure_quality": lambda ids: measure_quality(model, [(_row(ids), ones)]),
        "measure_quality, labels": lambda ids: measure_quality(model, [(ones, _row(ids))]),
        "measure_quality, file": lambda ids: measure_quality(gpt, [(_row(ids), ones)]),
        "GPTModel.generate": lambda ids: model.generate(ids, max_new_tokens=2),
        "TFLiteGPT.generate": lambda ids: gpt.generate(ids, max_new_tokens=2),
        "TFLiteGPT.prefill": lambda ids: gpt.prefill(ids),
        "TFLiteGPT.logits": lambda ids: gpt.logits(ids),
        "TFLiteGPT.score": lambda ids: gpt.score(ids, [1]),
    }


def test_what_is_no_id_is_refused_everywhere(
    functions: dict[str, Callable[[Any], Any]], tiny_tokenizer: Tokenizer
) -> None:
    functions = {
        "as_ids": lambda ids: as_ids(ids, "Ids.", vocab_size=300),
        "Tokenizer.decode": tiny_tokenizer.decode,
        **functions,
    }
    batches_too = ("GPTModel.generate", "TFLiteGPT.generate")  # of several prompts
    accepted = []
    for name, function in functions.items():
        for kind, values in WRONG.items():
            if kind == "ragged" and name in batches_too:
                continue
            if kind in ("size", "-1") and name == "calibration_ids":  # it knows no vocabulary
                continue
            if kind == "-1" and name in ("measure_quality, labels", "quantize"):  # padding
                continue
            if kind == "size" and name == "Tokenizer.decode":  # a row that pads a table
                continue
            try:
                function(values)
            except UserError:
                continue
            accepted.append(f"{name} of {kind}")
    assert not accepted


def test_integers_of_every_kind_are_ids(
    functions: dict[str, Callable[[Any], Any]], tiny_tokenizer: Tokenizer
) -> None:
    expected = tiny_tokenizer.decode([1, 2])
    for values in (*RIGHT, iter([1, 2])):
        assert tiny_tokenizer.decode(values) == expected
    assert tiny_tokenizer.decode([]) == ""
    for values in RIGHT:
        ids = as_ids(values, "Ids.")
        assert ids.tolist() == [1, 2]
        assert ids.dtype == np.int32
    for function in functions.values():
        function(np.array([1, 2], np.int8))
    assert as_ids([[2**31 - 1]], "Ids.", ndim=(2,)).tolist() == [[2**31 - 1]]
    assert as_ids([], "Ids.").shape == (0,)
