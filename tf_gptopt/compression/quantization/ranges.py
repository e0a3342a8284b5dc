"""Ranges of static activations, from what calibration text makes of them.

A tensor of static activations has one range for all texts: too narrow, and what lies beyond is
clipped; too wide, and the 255 steps are coarse. Three ways to choose, as for weights: from the
least to the largest value seen (`"minmax"`), between two quantiles (`"percentile"`), or where the
expected squared error of clipping and rounding is least (`"mse"`; Banner et al. 2019,
arXiv:1810.05723).

Logits always take all that was seen: the largest are few, and they are what is predicted.

Percentiles and errors need to know how values are distributed. `Histogram` counts them in bins of
one width that doubles when a larger value comes: exact sums of counts, in memory that does not
grow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt.compression.block_parts import HEAD
from tf_gptopt.compression.calibration import Progress, stream_inputs
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.models.gpt import GPTModel

Ranges = dict[str, tuple[float, float]]

_BINS = 8192
_SHRINKS = np.linspace(0.0, 1.0, 129)[1:]  # of either end of a range, tried for the least error
_VALUES = 1 << 24  # outputs of a product that are held at once


class Histogram:
    """How often which value was seen: counts of bins between -limit and limit, and the extremes."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.limit = 2.0**-60
        self.counts = np.zeros(_BINS, np.int64)

    def observe(self, x: tf.Tensor, counting: bool = True) -> None:
        """Take in a float32 tensor; its extremes alone unless `counting`."""
        low, high = float(tf.reduce_min(x)), float(tf.reduce_max(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not counting:
            return
        while self.limit < max(-low, high):
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(pairs, _BINS // 4)
            self.limit *= 2
        bounds = tf.constant([-self.limit, self.limit], tf.float32)
        self.counts += tf.histogram_fixed_width(x, bounds, _BINS, tf.int64).numpy()

    def quantile(self, share: float) -> float:
        """The value that `share` of all values lie below, within a bin."""
        place = np.searchsorted(np.cumsum(self.counts), share * self.counts.sum())
        edge = self._edges()[place + (share > 0.5)]
        return float(np.clip(edge, self.low, self.high))

    def magnitude(self, share: float) -> float:
        """The magnitude that `share` of all values lie below, within a bin."""
        half = _BINS // 2
        counts = self.counts[half:] + self.counts[:half][::-1]
        place = np.searchsorted(np.cumsum(counts), share * counts.sum())
        return float(min((place + 1) * self.limit / half, max(-self.low, self.high)))

    def least_error(self, symmetric: bool) -> tuple[float, float]:
        """The range of least squared error: of what it clips, and of rounding, which is a twelfth
        of the step's square for every value."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if symmetric:
            high = max(-low, high)
            low = -high
        edges = self._edges()
        centres, values = (edges[:-1] + edges[1:]) / 2, self.counts.sum()
        lows, highs = low * _SHRINKS, high * _SHRINKS
        below = [self.counts @ np.square(np.minimum(centres - end, 0)) for end in lows]
        above = [self.counts @ np.square(np.maximum(centres - end, 0)) for end in highs]
        if symmetric:
            errors = np.add(below, above) + values * np.square(highs / 127) / 12
            best = int(errors.argmin())
            return float(lows[best]), float(highs[best])
        steps = (highs[None, :] - lows[:, None]) / 255
        errors = np.add.outer(below, above) + values * np.square(steps) / 12
        i, j = np.unravel_index(errors.argmin(), errors.shape)
        return float(lows[i]), float(highs[j])

    def range(self, config: QuantConfig) -> tuple[float, float]:
        """The range that `config` chooses, around zero where it is to be symmetric."""
        if config.range == "mse":
            return self.least_error(config.symmetric)
        if config.range == "percentile":
            share = config.percentile / 100
            if config.symmetric:
                most = self.magnitude(share)
                return -most, most
            return self.quantile(1 - share), self.quantile(share)
        if config.symmetric:
            most = max(-self.low, self.high)
            return -most, most
        return self.low, self.high

    def _edges(self) -> np.ndarray:
        return np.linspace(-self.limit, self.limit, _BINS + 1)


def calibrate_ranges(
    model: GPTModel, config: QuantConfig, token_ids: Any, on_progress: Progress | None = None
) -> Ranges:
    """Ranges of the inputs and outputs of every product that `config` quantizes.

    Args:
        model: a plain `GPTModel` as the file will compute it: what `quantize` gives.
        config: `range`, `percentile`, `symmetric`, `quantize_adds` and the layers count.
        token_ids: `(examples, time)` integers; see `calibration_ids`.
        on_progress: called as `on_progress(done, total, what)`.

    Returns:
        `{"block_0_qkv/input": (low, high), "block_0_qkv/output": ..., ..., "token_logits/input":
        ..., "token_logits/output": ...}`; with `quantize_adds` also the residual stream:
        `"position_embedding/output"`, `"block_0_attention_add/output"`,
        `"block_0_mlp_add/output"`, ...

    Raises:
        UserError: for tokens that are not for this model.
    """
    seen = observe_activations(model, config, token_ids, on_progress)
    return choose_ranges(seen, config)


def observe_activations(
    model: GPTModel, config: QuantConfig, token_ids: Any, on_progress: Progress | None = None
) -> dict[str, Histogram]:
    """What the activations that `calibrate_ranges` names reach; arguments as there."""
    products = _products(model, config)
    streams = _streams(model) if config.quantize_adds else {}
    seen: dict[str, Histogram] = {}
    counting = config.range != "minmax"

    def observe(layer: str, x: tf.Tensor) -> None:
        if layer in streams:
            seen.setdefault(f"{streams[layer]}/output", Histogram()).observe(x, counting)
            return
        kernel, bias = products[layer]
        seen.setdefault(f"{layer}/input", Histogram()).observe(x, counting)
        outputs = seen.setdefault(f"{layer}/output", Histogram())
        for start in range(0, len(x), rows := max(1, _VALUES // kernel.shape[1])):
            y = tf.matmul(x[start : start + rows], kernel)
            outputs.observe(y if bias is None else y + bias, counting and layer != HEAD)

    stream_inputs(model, token_ids, {*products, *streams}, observe, on_progress=on_progress)
    return seen


def choose_ranges(seen: Mapping[str, Histogram], config: QuantConfig) -> Ranges:
    """The ranges that `config` chooses of what was observed with it; min-max needs no counts."""
    whole = dataclasses.replace(config, range="minmax")
    return {
        name: histogram.range(whole if name == f"{HEAD}/output" else config)
        for name, histogram in seen.items()
    }


def _products(model: GPTModel, config: QuantConfig) -> Mapping[str, tuple[Any, Any]]:
    """Kernels `(in, out)` and biases, or None, of the products that `config` quantizes."""
    products = {}
    for i in range(model.config.num_layers):
        for name in ("qkv", "proj", "fc", "out"):
            layer = model.base_layer(f"block_{i}_{name}")
            if not config.keeps_float(layer.name):
                products[layer.name] = layer.kernel, layer.bias
    if not model.config.tie_embeddings:
        if not config.keeps_float(HEAD):
            products[HEAD] = model.base_layer(HEAD).kernel, None
    elif not config.keeps_float("token_embedding"):
        products[HEAD] = tf.transpose(model.base_layer("token_embedding").embeddings), None
    return products


def _streams(model: GPTModel) -> dict[str, str]:
    """LayerNorms, and the layer whose output, the residual stream, each of them reads."""
    before, streams = "position_embedding", {}
    for i in range(model.config.num_layers):
        for norm, add in (("attention_norm", "attention_add"), ("mlp_norm", "mlp_add")):
            streams[f"block_{i}_{norm}"] = before
            before = f"block_{i}_{add}"
    return {**streams, "final_norm": before}
