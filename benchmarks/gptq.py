"""GPTQ to int4: ours against ai-edge-quantizer's, on the same layers and the same text.

    pip install ai-edge-quantizer==0.10.0
    python benchmarks/gptq.py --texts FOLDER             # both parents of benchmarks/quality.py
    python benchmarks/gptq.py --quick                    # a smoke test: a tiny model

Each kernel of a trained parent goes through both, in blocks of 32 inputs that share a scale, block
by block of the model, each method behind what it quantized before; tables and biases stay float.
The peer takes .tflite files, so it gets each layer as one (its seconds include making it), and as
calibration data rows with the Hessian of the calibration text. Beside them rounding to the nearest
point. Shown: the mean over the layers of the squared error of the outputs as a share of what
rounding the same kernel has, perplexity against the float parent, seconds.
Results go to benchmarks/results/gptq.json.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import qtyping, quantizer

from benchmarks._common import write_result
from benchmarks.quality_lab import QUICK, Lab, Scale
from tf_gptopt.compression.calibration import walk_blocks
from tf_gptopt.compression.hessian import observe_moments
from tf_gptopt.compression.quantization.gptq import solve_kernel
from tf_gptopt.compression.quantization.grids import quantize_matrix
from tf_gptopt.evaluation.quality import measure_quality

BLOCK = 32
Solve = Callable[[np.ndarray, np.ndarray], np.ndarray]  # kernel, Hessian -> kernel on its grid


def nearest(kernel: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    return quantize_matrix(kernel.T, 4, BLOCK, "minmax").values().T


def ours(kernel: np.ndarray, hessian: np.ndarray, range: str = "minmax") -> np.ndarray:
    return solve_kernel(kernel, hessian, 4, BLOCK, range)


def peer(kernel: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Through its public API: a file with this layer alone, calibrated, quantized, and asked for
    its kernel by an identity matrix, whose rows dynamic activations hold exactly."""
    size = len(kernel)
    shape = tf.TensorSpec((size, size), tf.float32, name="x")
    product = tf.function(lambda x: {"y": tf.matmul(x, tf.constant(kernel))}, [shape])
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [product.get_concrete_function()], tf.Module()
    )
    work = quantizer.Quantizer(bytearray(converter.convert()))
    work.add_dynamic_config(  # its only one with blocks
        ".*",
        qtyping.TFLOperationName.FULLY_CONNECTED,
        num_bits=4,
        granularity=qtyping.QuantGranularity.BLOCKWISE_32,
        algorithm_key="GPTQ",
    )
    values, vectors = np.linalg.eigh(hessian * size / 2)
    rows = (vectors * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)  # rows^T rows is that
    statistics = work.calibrate({"serving_default": [{"x": rows}]})
    made = work.quantize(statistics, enable_progress_report=False).quantized_model
    reader = Interpreter(model_content=bytes(made)).get_signature_runner()
    return reader(x=np.eye(size, dtype=np.float32))["y"]


METHODS: dict[str, Solve] = {
    "nearest": nearest,
    "ai-edge-quantizer": peer,
    "ours": ours,
    "ours, ranges by MSE": functools.partial(ours, range="mse"),
}


def quantize(lab: Lab, solve: Solve) -> dict[str, Any]:
    """A copy of the parent whose blocks `solve` has gone through, measured."""
    model, shares, seconds = lab.parent, [], 0.0
    for block in walk_blocks(model, lab.calibration, head=False):
        for name, moments in observe_moments(block, block.layers).items():
            layer, hessian = model.base_layer(name), moments.hessian()
            kernel = layer.kernel.numpy()
            began = time.perf_counter()
            on_grid = solve(kernel, hessian)
            seconds += time.perf_counter() - began
            rounded = nearest(kernel, hessian)
            shares.append(error_of(kernel - on_grid, hessian) / error_of(kernel - rounded, hessian))
            layer.kernel.assign(on_grid)
    quality = measure_quality(model, lab.scored(), lab.reference_logits)
    return {
        "output_error": round(float(np.mean(shares)), 3),
        "change": round(quality.perplexity / lab.reference.perplexity - 1, 5),
        "kl": round(quality.kl, 5),
        "seconds": round(seconds, 1),
    }


def error_of(change: np.ndarray, hessian: np.ndarray) -> float:
    """The squared error of a layer's outputs, summed, when its kernel changes by so much."""
    return float(np.einsum("io,ij,jo->", change, hessian, change, optimize=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--texts", type=Path, help="WikiText-2's folder; without it Python alone")
    parser.add_argument("--work", type=Path, default=root / "saved_models" / "quality")
    parser.add_argument("--quick", action="store_true", help="small, to see that it works")
    given = parser.parse_args()
    scale, outcome = QUICK if given.quick else Scale(), {}
    for corpus in ("wikitext2", "python") if given.texts else ("python",):
        lab = Lab(corpus, given.work / corpus, given.texts, print, scale)
        outcome[corpus] = {}
        for name, solve in METHODS.items():
            outcome[corpus][name] = quantize(lab, solve)
            print(f"{corpus:10} {name:20} {outcome[corpus][name]}", flush=True)
    if not given.quick:
        print(write_result("gptq", outcome))


if __name__ == "__main__":
    main()
