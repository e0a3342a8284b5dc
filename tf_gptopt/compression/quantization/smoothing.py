"""SmoothQuant: what makes activations hard to quantize moves into the weights.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv:2211.10438. A few channels of a product's input are far larger than the rest, and one
range for all of them leaves few of its 255 steps to the others. With one factor a channel,

    X W = (X / s) (s W),    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha),

the input's channels come nearer to each other. The division costs nothing where what makes X can do
it: LayerNorm's gamma and beta do for `qkv`, `fc` and a head with a table of its own, and the value
columns of `qkv` for `proj`, because attention mixes positions, never channels. GELU cannot, so
`out` stays as it is; so does a tied head, whose table is looked up as well.

LayerNorms must be folded first: what was gamma's is the kernel's then, and gamma is 1/s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt.compression.block_parts import HEAD
from tf_gptopt.compression.calibration import Progress, stream_inputs
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.models.checkpoints import assign_weights, named_weights
from tf_gptopt.models.gpt import GPTModel


def smooth(
    model: GPTModel, config: QuantConfig, token_ids: Any, on_progress: Progress | None = None
) -> None:
    """Smooth the inputs of the products that `config` quantizes, in place; the function stays.

    Args:
        model: a plain float32 model whose LayerNorms are folded.
        config: `smoothing` (alpha) and the layers count.
        token_ids: `(examples, time)` integers; see `calibration_ids`.
        on_progress: called as `on_progress(done, total, what)`.
    """
    blocks = range(model.config.num_layers)
    # proj before qkv, whose value columns it changes
    layers = [f"block_{i}_{name}" for i in blocks for name in ("proj", "qkv", "fc")]
    layers += [] if model.config.tie_embeddings else [HEAD]
    layers = [layer for layer in layers if not config.keeps_float(layer)]
    largest: dict[str, np.ndarray] = {}

    def observe(layer: str, x: tf.Tensor) -> None:
        most = tf.reduce_max(tf.abs(x), 0).numpy()
        largest[layer] = np.maximum(largest.get(layer, 0), most)

    stream_inputs(model, token_ids, layers, observe, on_progress=on_progress)
    weights = named_weights(model)
    for layer in layers:
        factors = smoothing_factors(largest[layer], weights[f"{layer}/kernel"], config.smoothing)
        weights[f"{layer}/kernel"] *= factors[:, None]
        divide_source(weights, layer, factors)
    assign_weights(model, weights)


def smoothing_factors(largest: np.ndarray, kernel: np.ndarray, alpha: float) -> np.ndarray:
    """s, `(in,)` float32 and positive.

    Args:
        largest: max|X_j| of each input channel, `(in,)`.
        kernel: `(in, out)`.
        alpha: 0 for all of the spread on the activations' side, 1 for none.
    """
    weights = np.abs(kernel).max(1).astype(np.float64)
    alive = (largest > 0) & (weights > 0)  # a channel that is never used stays as it is
    inputs = np.where(alive, largest, 1.0).astype(np.float64)
    factors = inputs**alpha / np.where(alive, weights, 1.0) ** (1 - alpha)
    return np.where(alive, np.clip(factors, 1e-5, 1e5), 1.0).astype(np.float32)


def divide_source(weights: dict[str, np.ndarray], layer: str, factors: np.ndarray) -> None:
    """Divide what goes into `layer` by `factors`, in the weights of what makes it."""
    block, _, name = layer.rpartition("_")
    if name == "proj":  # the last third of qkv's columns are the values
        weights[f"{block}_qkv/kernel"][:, -len(factors) :] /= factors
        weights[f"{block}_qkv/bias"][-len(factors) :] /= factors
        return
    norm = {"qkv": f"{block}_attention_norm", "fc": f"{block}_mlp_norm"}.get(name, "final_norm")
    weights[f"{norm}/gamma"] /= factors
    weights[f"{norm}/beta"] /= factors
