"""Post-training quantization: a trained model's weights onto their grids, without training.

```python
config = QuantConfig.from_recipe("int4-gptq")
small = quantize(model, config, calibration=dataset)
export_tflite(small, "model.tflite", config)
```

In this order, as far as the config asks for it: LayerNorms are folded, activations are smoothed
into the weights (`smoothing.py`), each matrix goes onto its grid, to the nearest point or by GPTQ,
block by block, with biases that take back the mean error (`gptq.py`), and what static activations
reach is observed on the result (`ranges.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.compression.agreement import agree
from tf_gptopt.compression.calibration import Progress
from tf_gptopt.compression.calibration_text import calibration_ids, check_ids
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.copying import plain_copy
from tf_gptopt.compression.quantization.gptq import quantize_blocks, quantize_table, solves_table
from tf_gptopt.compression.quantization.ranges import Ranges, calibrate_ranges
from tf_gptopt.compression.quantization.rounding import (
    is_rounded,
    quantizable_layers,
    round_weights,
)
from tf_gptopt.compression.quantization.smoothing import smooth
from tf_gptopt.models.checkpoints import assign_weights, named_weights
from tf_gptopt.models.finite import check_finite
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.models.gpt import GPTModel, require_gpt

_PARTS = 1000  # progress counts each stage as so many, whatever it counts itself


def quantize(
    model: GPTModel,
    config: QuantConfig | None = None,
    calibration: Any = None,
    *,
    on_progress: Progress | None = None,
) -> GPTModel:
    """A copy of `model` whose matrices lie exactly on the grids that `config` asks for.

    It is an ordinary model: it computes in float, saves, loads and generates as any other, and
    `export_tflite` with the same config stores its weights to the bit. A model that is on its grids
    already keeps them, so quantizing twice is quantizing once; weights that are zero stay zero. The
    position table is what the file has.

    Args:
        model: a plain model of any dtype policy; it is not changed.
        config: what is quantized, and how; default `QuantConfig("int8")`. Its `kv_cache`, `io` and
            `activations` other than static are the file's and change no weight.
        calibration: text like the text that the model is for, which `config.needs_calibration`
            looks at: anything that `calibration_ids` takes, 128 examples as a rule.
        on_progress: called as `on_progress(done, total, what)`.

    Returns:
        A plain `GPTModel` of the same dtype policy, not compiled, with the tokenizer and sampler of
        `model`, and `activation_ranges` where activations are static. Weights are float32; under a
        mixed policy products see them rounded to the compute dtype, which the file does not do.

    Raises:
        UserError: for a wrapped model, weights that are NaN or infinite or too large for float16,
            patterns that match no layer, and calibration that is missing or does not fit.
    """
    config = QuantConfig() if config is None else config
    weights = named_weights(require_gpt(model))
    check_finite(weights)
    config.layers_to_quantize(quantizable_layers(weights))
    ids = _calibration_for(model, config, calibration)
    ranges = None
    if ids is None:
        weights = round_weights(fold_layer_norms(weights), config)
    else:
        weights, ranges = _quantize_on_text(model, weights, config, ids, on_progress)
    quantized = plain_copy(model)
    assign_weights(quantized, weights)
    quantized.activation_ranges = ranges
    return quantized


def _quantize_on_text(
    model: GPTModel,
    weights: dict[str, np.ndarray],
    config: QuantConfig,
    ids: np.ndarray,
    on_progress: Progress | None,
) -> tuple[dict[str, np.ndarray], Ranges | None]:
    """Weights on their grids and the ranges of static activations, the same on all workers."""
    is_static = config.activations == "static"
    by_block = config.rounding == "gptq" or config.bias_correction
    # smoothed and rounded already: folding would take both back
    is_done = config.smoothing > 0 and is_rounded(weights, config)
    smooths = config.smoothing > 0 and not is_done
    worker = plain_copy(model, "float32")  # the file computes in float32
    table = solves_table(worker, config)
    stages = _stages(on_progress, smooths + table + by_block + is_static)
    assign_weights(worker, weights if is_done else fold_layer_norms(weights))
    if smooths:
        smooth(worker, config, ids, next(stages))
    if table:
        quantize_table(worker, config, ids, next(stages))
    if by_block:
        quantize_blocks(worker, config, ids, next(stages))
    else:
        assign_weights(worker, round_weights(named_weights(worker), config))
    weights = named_weights(worker)
    agreed = agree(worker.distribute_strategy, list(weights.values()))
    weights = dict(zip(weights, agreed, strict=True))
    if not is_static:
        return weights, None
    assign_weights(worker, weights)
    ranges = calibrate_ranges(worker, config, ids, next(stages))
    (bounds,) = agree(worker.distribute_strategy, [np.array(list(ranges.values()))])
    pairs = [(float(low), float(high)) for low, high in bounds]
    return weights, dict(zip(ranges, pairs, strict=True))


def _calibration_for(model: GPTModel, config: QuantConfig, source: Any) -> np.ndarray | None:
    if not config.needs_calibration:
        return None
    if source is None:
        raise UserError(
            f"{config.name!r} looks at text: give quantize(..., calibration=...) token ids "
            "(examples, time), a tf.data.Dataset or a TokenDataset."
        )
    return check_ids(model, calibration_ids(source)[:, : model.config.max_sequence_length])


def _stages(on_progress: Progress | None, count: int) -> Any:
    """For each of `count` stages what it reports its progress to: their sum, to the caller."""

    def report(stage: int) -> Callable[[int, int, str], None]:
        def shown(done: int, total: int, what: str) -> None:
            on_progress(stage * _PARTS + done * _PARTS // total, count * _PARTS, what)

        return shown

    yield from (on_progress and report(stage) for stage in range(count))
