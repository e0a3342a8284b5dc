"""Which layers quantization or pruning hurts: each one changed alone, and the model measured.

```python
table = measure_sensitivity(model, dataset.batches("valid", 8, max_batches=4), ("int8", "int4"))
config = QuantConfig.from_sensitivity(table, bytes=1.0)      # better than int4, and no larger
```

Small errors add up: on a GPT of 5.8 M parameters the sum of the single KLs came within 5% of the KL
of uniform and mixed schemes, from 4e-5 to 6e-3 nats. Dong et al. 2020, "HAWQ-V2", arXiv:1911.03852,
rest on the same sum, with traces of Hessians in place of measurements.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._files import read_json, write_json
from tf_gptopt.compression.calibration import Progress
from tf_gptopt.compression.calibration_text import calibration_ids, check_ids
from tf_gptopt.compression.pruning.config import CALIBRATED, PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, strip_pruning
from tf_gptopt.compression.quantization.config import LAYER_WEIGHTS, QuantConfig
from tf_gptopt.compression.quantization.mixed import matrix_bytes
from tf_gptopt.compression.quantization.ptq import quantize
from tf_gptopt.compression.quantization.rounding import matrix_rows, quantizable_layers
from tf_gptopt.evaluation.quality import Batch
from tf_gptopt.evaluation.sensitivity_table import Sensitivity, SensitivityRow
from tf_gptopt.models.checkpoints import named_weights
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.models.gpt import GPTModel

SECONDS_BETWEEN_WRITES = 2.0
_PRUNE = re.compile(r"prune[ =]?(\d+(?:\.\d+)?)%?")
_FLOAT = "float"  # the name of the model without a change, among the sums

Weights = dict[str, np.ndarray]


def measure_sensitivity(
    model: GPTModel,
    batches: Iterable[Batch],
    options: Sequence[str] = ("int8", "int4"),
    calibration: Any = None,
    on_progress: Progress | None = None,
    *,
    config: QuantConfig | None = None,
    pruning: PruneConfig | None = None,
    out: str | os.PathLike | None = None,
) -> Sensitivity:
    """Loss, KL and top-1 agreement when only one layer is quantized or pruned, layer by layer.

    Measured on weights alone, LayerNorms folded as the file has them. It takes a forward pass for
    each layer, option and batch; in memory are two more copies of the weights, and three times the
    logits of one batch.

    Args:
        model: a plain model; it is not changed.
        batches: held-out `(inputs, labels)`, both `(batch, time)` int32, read once and kept.
        options: what to try on each layer: values for `QuantConfig.layers` (`"int8"`, `"int4"`,
            `"int4:128"`, ...), or shares to prune (`"prune50"`, `"prune 50%"`).
        calibration: text for a `config` that rounds with GPTQ or corrects biases, and for scores of
            `pruning` that look at some; anything that `calibration_ids` takes.
        on_progress: called as `on_progress(done, total, what)` with measurements done and to do.
        config: range, rounding and granularity of the options, and `float_layers`, which are not
            tried; default `QuantConfig(range="mse")`.
        pruning: score, pattern and layers of what is pruned; default by magnitude.
        out: a .json file that holds what is measured as it is measured. The same call goes on where
            an earlier one ended, and one with further options adds them.

    Raises:
        UserError: for a wrapped model, an unknown option, no batches, ids that the model does
            not know, and missing calibration.
    """
    config = QuantConfig(range="mse") if config is None else config
    pruning = PruneConfig() if pruning is None else pruning
    names = list(dict.fromkeys(_known(option) for option in options))
    batches = [(np.asarray(inputs), np.asarray(labels)) for inputs, labels in batches]
    if not names or not batches:
        what = "batch of held-out tokens" if names else "option"
        raise UserError(f"There is nothing to measure: give at least one {what}.")
    for inputs, _ in batches:
        check_ids(model, inputs)
    ids = None if calibration is None else calibration_ids(calibration)
    probe = _Probe(model)
    weights = named_weights(probe.model)
    todo = [(name, _layers_to_change(weights, name, config, pruning)) for name in names]
    total = len(batches) * sum(len(layers) for _, layers in todo)
    if not total:
        raise UserError("No layer is left to change: see config.float_layers and pruning.layers.")
    sums = _Sums(out, _key(weights, batches, ids, config, pruning))
    done = 0
    try:
        for option, layers in todo:
            done += sum(sums.batches(layer, option) for layer in layers)
            if all(sums.batches(layer, option) == len(batches) for layer in layers):
                continue
            changed = _changed(model, option, config, pruning, ids, on_progress)
            for index, (inputs, labels) in enumerate(batches):
                late = [layer for layer in layers if sums.batches(layer, option) == index]
                if not late:
                    continue
                reference = probe.logits(inputs)
                if sums.batches("", _FLOAT) == index:
                    sums.add("", _FLOAT, _compare(reference, reference, labels), labels.size)
                for layer in late:
                    probe.assign(layer, changed)
                    costs = _compare(reference, probe.logits(inputs), labels)
                    probe.assign(layer, weights)
                    sums.add(layer, option, costs, labels.size)
                    done += 1
                    if on_progress:
                        on_progress(done, total, f"{layer} {option}")
    except BaseException:  # an interruption too
        sums.write()
        raise
    table = _table(sums, todo, weights, config)
    sums.write(table.to_dict())
    return table


def _known(option: str) -> str:
    """The option by the name that rows have."""
    if match := _PRUNE.fullmatch(str(option).strip()):
        if not 0 < float(match[1]) < 100:
            raise UserError(f"A share to prune lies between 0% and 100%. Received: {option!r}.")
        return f"prune{float(match[1]):g}"
    if option not in LAYER_WEIGHTS:
        known = [*LAYER_WEIGHTS, "prune50"]
        raise UserError(
            f"Unknown option {option!r} of a layer.{suggest(str(option), known)} Expected: weights "
            "of a quantization, such as int4:128, or a share to prune, such as prune50."
        )
    return option


def _layers_to_change(
    weights: Weights, option: str, config: QuantConfig, pruning: PruneConfig
) -> list[str]:
    """Names of the layers that `option` is tried on, in the model's order."""
    layers = quantizable_layers(weights)
    if not option.startswith("prune"):
        skipped = config.float_layers
        return [name for name in layers if not any(fnmatchcase(name, p) for p in skipped)]
    return [
        name
        for name, matrix in layers.items()
        if matrix.endswith("/kernel")
        and weights[matrix].size >= pruning.min_weights
        and any(fnmatchcase(name, pattern) for pattern in pruning.layers)
    ]


def _changed(
    model: GPTModel,
    option: str,
    config: QuantConfig,
    pruning: PruneConfig,
    ids: np.ndarray | None,
    on_progress: Progress | None,
) -> Weights:
    """The weights of the model with all layers changed, LayerNorms folded."""
    if option.startswith("prune"):
        share = {} if pruning.n_of_m else {"sparsity": float(option.removeprefix("prune")) / 100}
        once = {"schedule": "constant", "initial_sparsity": 0.0, "begin_step": 0}
        pruning = dataclasses.replace(pruning, **share, **once)
        calibration = ids if pruning.score in CALIBRATED else None
        pruned = strip_pruning(prune(model, pruning, calibration, on_progress=on_progress))
        return fold_layer_norms(named_weights(pruned))
    scheme = _scheme(option, config)
    calibration = ids if scheme.needs_calibration else None
    return named_weights(quantize(model, scheme, calibration, on_progress=on_progress))


def _scheme(option: str, config: QuantConfig) -> QuantConfig:
    """Weights of all layers as `option` says, and nothing else quantized."""
    everywhere = dataclasses.replace(config, layers={"*": option}, float_layers=())
    return QuantConfig(
        everywhere.weights_of("any"),
        granularity=everywhere.group_of("any"),
        range=config.range,
        percentile=config.percentile,
        rounding=config.rounding,
        bias_correction=config.bias_correction,
        float_layers=config.float_layers,
    )


def _table(
    sums: _Sums, todo: list[tuple[str, list[str]]], weights: Weights, config: QuantConfig
) -> Sensitivity:
    matrices = quantizable_layers(weights)
    _, tokens, loss, _, _ = sums.of["/" + _FLOAT]
    rows = []
    for option, layers in todo:
        for layer in layers:
            height, width = matrix_rows(matrices[layer], weights[matrices[layer]]).shape
            kind, group = "float32", "channel"
            if not option.startswith("prune"):
                scheme = _scheme(option, config)
                kind, group = scheme.weights, scheme.group_of(layer, width)
            _, tokens, *costs = sums.of[f"{layer}/{option}"]
            size = matrix_bytes(height, width, kind, group)
            means = [cost / tokens for cost in costs]
            rows.append(SensitivityRow(layer, option, height * width, size, *means))
    place = {layer: index for index, layer in enumerate(matrices)}
    rows.sort(key=lambda row: place[row.layer])  # stable: options stay in their order
    return Sensitivity(tuple(rows), loss / tokens, tokens, config)


class _Probe:
    """A folded copy of the model whose layers' weights come and go; its graph is traced once."""

    def __init__(self, model: GPTModel) -> None:
        self.model = quantize(model, QuantConfig("float32"))
        ids = tf.TensorSpec([None, None], tf.int32)
        self._forward = tf.function(
            lambda ids: self.model(ids, training=False), autograph=False, input_signature=[ids]
        )

    def assign(self, layer: str, weights: Weights) -> None:
        own = [array for name, array in weights.items() if name.startswith(f"{layer}/")]
        self.model.base_layer(layer).set_weights(own)

    def logits(self, inputs: np.ndarray) -> tf.Tensor:
        """`(batch, time)` ids -> `(batch, time, vocab)`."""
        return self._forward(tf.constant(inputs, tf.int32))


def _compare(reference: tf.Tensor, logits: tf.Tensor, labels: np.ndarray) -> list[float]:
    """Sums over the tokens of a batch: loss, KL(reference || model), agreements."""
    return [float(x) for x in _costs(reference, logits, tf.constant(labels, tf.int32))]


@tf.function(reduce_retracing=True, autograph=False)
def _costs(reference: tf.Tensor, logits: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, ...]:
    log_p = tf.nn.log_softmax(tf.cast(reference, tf.float32))
    log_q = tf.nn.log_softmax(tf.cast(logits, tf.float32))
    losses = -tf.gather(log_q, labels, axis=-1, batch_dims=2)  # (batch, time)
    kl = tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), -1)
    same = tf.equal(tf.argmax(log_p, -1), tf.argmax(log_q, -1))
    return tuple(tf.reduce_sum(tf.cast(values, tf.float64)) for values in (losses, kl, same))


class _Sums:
    """What is measured so far, in memory and in a file: batches, tokens, loss, KL and agreements of
    every layer and option. Floats survive JSON to the last bit, so going on changes no number."""

    def __init__(self, path: str | os.PathLike | None, key: str) -> None:
        self.path, self.key = path, key
        self.of: dict[str, list[float]] = {}
        self._written = time.monotonic()
        if path is None or not Path(path).exists():
            return
        values = read_json(path)
        if not isinstance(values, dict) or "key" not in values:
            raise UserError(f"{path} holds something else than a table. Name another file.")
        if values["key"] == key:
            self.of = values["sums"]

    def batches(self, layer: str, option: str) -> int:
        """How many batches this one has seen."""
        return int(self.of.get(f"{layer}/{option}", [0])[0])

    def add(self, layer: str, option: str, costs: Sequence[float], tokens: int) -> None:
        name, new = f"{layer}/{option}", [1, tokens, *costs]
        self.of[name] = [a + b for a, b in zip(self.of.get(name, [0] * 5), new, strict=True)]
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self, table: Mapping[str, Any] | None = None) -> None:
        """Bring all to the file, with the finished `table` at last."""
        self._written = time.monotonic()
        if self.path is not None:
            write_json(self.path, {"key": self.key, "sums": self.of, **(table or {})})


def _key(
    weights: Weights,
    batches: list[Batch],
    ids: np.ndarray | None,
    config: QuantConfig,
    pruning: PruneConfig,
) -> str:
    """A hash of everything that a row depends on beside its option."""
    digest = hashlib.sha256()
    for array in (*weights.values(), *(part for batch in batches for part in batch), ids):
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    settings = [config.to_dict(), dataclasses.asdict(pruning)]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]
