"""What quantizing costs: GPT-2's shape onto its grids and into a file, minutes and peak memory.

    python benchmarks/quantization.py                 # all but the last two cases
    python benchmarks/quantization.py --case gptq     # what has this in its name
    python benchmarks/quantization.py --long          # those too: 128 x 1,024 tokens of text
    python benchmarks/quantization.py --quick         # a smoke test: a small shape, nothing written

124 million parameters, random weights (time does not depend on them), each case in a process of its
own: `quantize`, then `export_tflite` of what it gives. Beside them TensorFlow's own converter with
its dynamic-range quantization, on a forward pass of 128 tokens without a cache.

Memory is the process's own, resident: before the case, with TensorFlow and the float model in it,
and at its peak. Results go to benchmarks/results/quantization.json, case by case.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import RESULTS, in_a_child, machine
from benchmarks.pruning import EXAMPLES, GPT2, QUICK, gpt, random_ids, resident_mb
from tf_gptopt._files import read_json, write_json

CASES: dict[str, dict[str, Any]] = {
    "int8, nearest": {"recipe": "int8"},
    "int4, nearest": {"recipe": "int4"},
    "TensorFlow's converter": {"recipe": None},
    **{
        f"{name}, {EXAMPLES} x {length} tokens": {"recipe": recipe, "length": length}
        for length in (128, 1024)
        for name, recipe in (("int4 gptq", "int4-gptq"), ("int8 static", "int8-static-smooth"))
    },
}


def quantize_and_export(shape: dict[str, int], case: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process: seconds of both steps, megabytes of the process and the file."""
    length = case.get("length", 128)
    model = gpt(shape, length)
    before = resident_mb("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        run = _ours if case["recipe"] else _converter
        seconds = run(model, path, case["recipe"], random_ids(shape, EXAMPLES, length))
        return {
            **{name: round(value, 1) for name, value in seconds.items()},
            "before_mb": round(before),
            "peak_mb": round(resident_mb("VmHWM")),
            "file_mb": round(path.stat().st_size / 1e6, 1),
        }


def _ours(model: Any, path: Path, recipe: str, ids: Any) -> dict[str, float]:
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.compression.quantization.ptq import quantize
    from tf_gptopt.tflite.convert import export_tflite

    config = QuantConfig.from_recipe(recipe)
    start = shown = time.perf_counter()

    def on_progress(done: int, total: int, what: str) -> None:
        nonlocal shown
        now = time.perf_counter()
        if now - shown > 5 or done == total:
            shown = now
            words = f"    {what}: {done / total:4.0%} in {now - start:.0f} s"
            print(words, file=sys.stderr, flush=True)

    quantized = quantize(model, config, ids, on_progress=on_progress)
    middle = time.perf_counter()
    export_tflite(quantized, path, config)
    return {"quantize_seconds": middle - start, "export_seconds": time.perf_counter() - middle}


def _converter(model: Any, path: Path, recipe: None, ids: Any) -> dict[str, float]:
    import tensorflow as tf

    start = time.perf_counter()
    tokens = tf.TensorSpec((1, ids.shape[1]), tf.int32)
    forward = tf.function(lambda ids: model(ids, training=False)).get_concrete_function(tokens)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([forward], model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    path.write_bytes(converter.convert())
    return {"export_seconds": time.perf_counter() - start}


def keep(name: str, outcome: dict[str, Any]) -> None:
    path = RESULTS / "quantization.json"
    results = read_json(path) if path.exists() else {}
    write_json(path, {**results, name: {"machine": machine(), **outcome}})
    print(f"  written to {path}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(quantize_and_export(*json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="cases with this in their name")
    parser.add_argument("--long", action="store_true", help="1,024 tokens an example as well")
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it works")
    arguments = parser.parse_args()
    shape = QUICK if arguments.quick else GPT2
    for name, case in CASES.items():
        if arguments.case not in name or (case.get("length", 0) > 128 and not arguments.long):
            continue
        print(name, flush=True)
        outcome = in_a_child(__file__, shape, case)
        print(f"  {outcome}", flush=True)
        if not arguments.quick:
            keep(name, {"shape": shape, **outcome})


if __name__ == "__main__":
    main()
