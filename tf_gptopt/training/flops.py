"""Model-FLOP utilisation: what a model's mathematics asks for, against what the processor can do.

After appendix B of Chowdhery et al. 2022 ("PaLM", arXiv:2204.02311). Only what the model needs
counts: activations that are computed a second time to save memory do not, nor does it matter that
pruned weights are zero. Attention counts as in the paper, without halving it for the causal mask.
"""

from __future__ import annotations

import functools
import os
import re
import time
from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.counting import token_flops

# Dense products of one device with bfloat16 or float16 inputs, FLOP/s, from the makers' data sheets
GPU_PEAKS = {
    r"H200|H100 80GB HBM3|H100 SXM": 989e12,
    r"H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"A100": 312e12,
    r"V100": 125e12,  # float16 alone
    r"L4": 121e12,
    r"T4": 65e12,  # float16 alone
}
NO_BFLOAT16 = r"V100", r"T4"
TPU_PEAKS = {"v2": 22.5e12, "v3": 61.5e12, "v4": 275e12, "v5litepod": 197e12}  # one replica
_PROBE_SECONDS = 0.2


class Utilisation:
    """The share of the processors' peak that a training uses, `utilisation(tokens_per_second)`.

    Args:
        model: as it trains; a `Distiller` counts its teacher's forward pass.
        length: tokens of a sequence.
        dtype: in which products are computed: "float32", "bfloat16" or "float16".

    Attributes:
        flops: of one token, forward and backward; 0 for a model without a Dense layer.
        peak: FLOP/s of all processors that train it together; raised by a training that does more.
        why: where the peak comes from.
    """

    def __init__(self, model: keras.Model, length: int, dtype: str) -> None:
        self.flops = training_flops(model, length)
        self.peak, self.why = model_peak(model, dtype)
        self._is_reached = False

    def __call__(self, tokens_per_second: float) -> float:
        done = tokens_per_second * self.flops
        if done > self.peak:  # so the processor can do more than the short measurement saw
            if not self._is_reached:
                self.why = f"the most reached in this training, more than the {self.why}"
            self.peak, self._is_reached = done, True
        return done / self.peak


def training_flops(model: keras.Model, length: int) -> float:
    """FLOPs of one token in a training step: `6 * weights + 12 * attention * length`.

    `weights` are those of the matrices (a token table counts for the logits, not for the look-up),
    `attention` is heads x head size over all blocks, which may differ in shape. Each teacher of a
    distiller adds a third of its own number, for it only runs forwards.

    Args:
        model: a `GPTModel`, plain, wrapped or divided among devices, or a `Distiller`; of another
            model its Dense layers count.
        length: tokens of a sequence.
    """
    student = getattr(model, "student", None)
    if student is not None:
        teachers = model.teachers if model.alpha else ()
        taught = sum(training_flops(teacher, length) / 3 for teacher in teachers)
        return training_flops(student, length) + taught
    shape = getattr(model, "config", None)
    if not isinstance(shape, GPTConfig):
        dense = (x for x in model._flatten_layers() if isinstance(x, keras.layers.Dense))
        return 6.0 * sum(layer.kernel.shape.num_elements() for layer in dense)
    return 3.0 * token_flops(shape, length)  # backwards costs twice what forwards does


def model_peak(model: keras.Model, dtype: str) -> tuple[float, str]:
    """FLOP/s of all processors that train `model` together, and where the number comes from."""
    strategy = model.distribute_strategy
    try:
        local = sorted(strategy.extended.worker_devices)
    except RuntimeError:  # no strategy: where the weights lie, on a mesh on several devices
        local = sorted({variable.device for variable in model.trainable_variables})
    processes = max(1, strategy.num_replicas_in_sync // len(local))
    kind = tf.DeviceSpec.from_string(local[0]).device_type or "CPU"
    # logical CPU devices share one processor
    count = processes * (1 if kind == "CPU" else len(local))
    peak, why = device_peak(local[0], kind, dtype)
    times = f"{count} x " if count > 1 else ""
    return count * peak, f"{times}{_human(peak)} in {dtype}, {why}"


@functools.cache
def device_peak(device: str, kind: str, dtype: str) -> tuple[float, str]:
    """FLOP/s of one device, from the maker's data sheet or, once a process, by a short product."""
    if kind == "TPU":
        generation = os.environ.get("TPU_ACCELERATOR_TYPE", "").partition("-")[0]
        if generation in TPU_PEAKS and dtype == "bfloat16":
            return TPU_PEAKS[generation], f"TPU {generation}"
    if kind == "GPU":
        gpu = tf.config.list_physical_devices("GPU")[0]
        name = tf.config.experimental.get_device_details(gpu).get("device_name", "")
        peak = listed_gpu_peak(name, dtype)
        if peak:
            return peak, name
    return _measured(device, kind, dtype), f"measured on this {kind}"


def listed_gpu_peak(name: str, dtype: str) -> float | None:
    """Dense FLOP/s in `dtype` of the GPU that the driver calls `name`; None if it is not listed."""
    for pattern, peak in GPU_PEAKS.items():
        if dtype != "float32" and re.search(rf"\b({pattern})\b", name):
            return None if dtype == "bfloat16" and pattern in NO_BFLOAT16 else peak
    return None


def _measured(device: str, kind: str, dtype: str) -> float:
    """The best of the square products that fit into a fifth of a second."""
    size = 1024 if kind == "CPU" else 8192
    best = 0.0
    with tf.device(device):
        matrix = tf.cast(tf.fill([size, size], 1.0 / size), dtype)
        _finish(tf.matmul(matrix, matrix))
        began = time.perf_counter()
        while time.perf_counter() - began < _PROBE_SECONDS:
            start = time.perf_counter()
            _finish(tf.matmul(matrix, matrix))
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


def _finish(product: tf.Tensor) -> Any:
    return product[0, 0].numpy()  # an accelerator works on until somebody reads the result


def _human(flops: float) -> str:
    size, unit = (1e12, "TFLOP/s") if flops >= 1e12 else (1e9, "GFLOP/s")
    return f"{flops / size:,.0f} {unit}"
