"""Pruning from outside: wrap a model, take the wrappers off again, count what is left."""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._keras import keras
from tf_gptopt.compression.agreement import agree
from tf_gptopt.compression.calibration import Progress
from tf_gptopt.compression.calibration_text import calibration_ids
from tf_gptopt.compression.pruning.adaptive import AdaptiveState
from tf_gptopt.compression.pruning.allocation import allocate
from tf_gptopt.compression.pruning.config import CALIBRATED, PruneConfig
from tf_gptopt.compression.pruning.copying import copy_layer, copy_model, masked_weights, unwrap
from tf_gptopt.compression.pruning.schedules import AdaptiveSparsity, make_schedule
from tf_gptopt.compression.pruning.scores import MEASURED, Measurement
from tf_gptopt.compression.pruning.sparsegpt import solve
from tf_gptopt.compression.pruning.wrapper import PruneLowMagnitude, wrappers
from tf_gptopt.models.finite import check_finite
from tf_gptopt.models.gpt import GPTModel, require_gpt


def prune(
    model: GPTModel,
    config: PruneConfig | None = None,
    calibration: Any = None,
    *,
    on_progress: Progress | None = None,
) -> GPTModel:
    """A copy of `model` whose chosen kernels lose their least important weights while it trains.

    ```python
    sparse = prune(model, PruneConfig(sparsity=0.5, end_step=800))
    sparse.compile(...)
    sparse.fit(data, callbacks=pruning_callbacks(sparse))
    sparse = strip_pruning(sparse)
    ```

    Build it inside the scope of the strategy that will train it. Weights that are zero already stay
    zero for good (in a kernel that is not zero throughout), so pruning again goes on from where an
    earlier pruning stopped, a 2:4 pattern survives any other pruning on top, and
    `PruneConfig(sparsity=0)` only protects a sparse model's zeros while it is trained or distilled.

    Args:
        model: a `GPTModel`, plain or still wrapped by an earlier `prune`; it stays untouched.
        config: fractions, schedule, score, pattern and layers; the default prunes half of every
            block by magnitude.
        calibration: texts that the scores gradient, taylor, wanda and sparsegpt look at; what
            `calibration_ids` takes, the same on every worker of a cluster.
        on_progress: called as `on_progress(done, total, what)` while those are computed.

    Returns:
        A `GPTModel` with tfmot wrappers, not compiled. It trains, saves, loads and generates as any
        other; `strip_pruning` is the way back.

    Raises:
        UserError: when `model` is no GPTModel or is quantization-aware, a pattern of
            `config.layers` names no Dense layer, or `calibration` is missing or does not fit.
    """
    config = PruneConfig() if config is None else config
    chosen = _choose_layers(require_gpt(model), config)
    check_finite({weight.name.partition(":")[0]: weight.numpy() for weight in model.weights})
    ids = _calibration_for(model, config, calibration)
    schedule = make_schedule(config)
    if config.score == "sparsegpt":
        model = _solved(model, config, ids, chosen, on_progress)

    def wrap(layer: keras.layers.Layer) -> keras.layers.Layer:
        copy = copy_layer(layer)
        if copy.name not in chosen:
            return copy
        return PruneLowMagnitude(
            copy,
            schedule,
            score=config.score,
            pattern=config.pattern,
            scope=config.scope,
            seed=config.seed,
            refresh=config.refresh,
            dtype=layer.dtype_policy,
        )

    pruned = copy_model(model, wrap)
    layers = wrappers(pruned)
    for layer in layers:
        layer.start()
    if config.score in MEASURED:
        pruned.calibration_ids = ids  # for pruning_callbacks, which measures again
        Measurement(pruned, layers, ids)(on_progress)
    if config.scope == "global":
        allocate(layers, config.sparsity)
    for layer in layers:
        layer.prune_if_due()
    if config.schedule == "adaptive":
        pruned.pruning_state = AdaptiveState()
    return pruned


def strip_pruning(model: GPTModel) -> GPTModel:
    """A plain copy of a pruned model: no wrappers, and exact zeros where the masks are.

    Warns when the schedule had not reached its end yet. A model without wrappers is copied.
    """
    _warn_if_unfinished(require_gpt(model))
    return copy_model(model, copy_layer)


def sparsity(model: GPTModel) -> dict[str, float]:
    """Fraction of zero weights in each Dense kernel by layer name, and in all of them as `total`.

    A wrapped layer counts as `strip_pruning` would leave it.
    """
    zeros, sizes = {}, {}
    for layer in require_gpt(model).layers:
        base = unwrap(layer)
        if isinstance(base, keras.layers.Dense):
            kernel = masked_weights(layer)[0]
            zeros[base.name] = kernel.size - int(np.count_nonzero(kernel))
            sizes[base.name] = kernel.size
    fractions = {name: zeros[name] / sizes[name] for name in zeros}
    return {**fractions, "total": sum(zeros.values()) / sum(sizes.values())}


def count_parameters(model: GPTModel) -> tuple[int, int]:
    """`(all, non-zero)` weights of the model itself: masks and other helpers are not counted."""
    weights = [w for layer in require_gpt(model).layers for w in masked_weights(layer)]
    return sum(w.size for w in weights), sum(int(np.count_nonzero(w)) for w in weights)


def _warn_if_unfinished(model: GPTModel) -> None:
    for layer in wrappers(model):
        schedule = layer.pruning_schedule  # all layers share one
        if layer.steps_done >= schedule.end_step:
            return
        where = f"step {layer.steps_done} of {schedule.end_step}"
        if isinstance(schedule, AdaptiveSparsity):
            state = getattr(model, "pruning_state", None)
            if state is not None and not state.done:
                warnings.warn(
                    f"Adaptive pruning has not finished at {where}: no validation loss has judged "
                    "the last rise yet. Train on, or lower end_step.",
                    stacklevel=3,
                )
            return
        mask, target = layer.mask_values(), layer.target_sparsity
        reached = float(np.mean(mask == 0))
        if reached + 1 / mask.size < target:
            warnings.warn(
                f"{layer.layer.name} is {reached:.1%} sparse, not {target:.1%}: pruning stopped at "
                f"{where}. Train longer or lower end_step.",
                stacklevel=3,
            )
            return


def _choose_layers(model: GPTModel, config: PruneConfig) -> set[str]:
    """Names of the Dense layers to wrap."""
    sizes = {}
    for layer in model.layers:
        base = unwrap(layer)
        if isinstance(base, keras.layers.Dense):
            sizes[base.name] = base.kernel.shape.num_elements()
    chosen = set()
    for pattern in config.layers:
        matched = {name for name in sizes if fnmatchcase(name, pattern)}
        if not matched:
            raise UserError(
                f"The pattern {pattern!r} names no Dense layer of the model."
                + suggest(pattern, sizes)
            )
        chosen |= matched
    big = {name for name in chosen if sizes[name] >= config.min_weights}
    if not big:
        raise UserError(
            f"Every chosen kernel has fewer than min_weights={config.min_weights} weights; the "
            f"largest has {max(sizes[name] for name in chosen)}. Lower min_weights."
        )
    return big


def _calibration_for(model: GPTModel, config: PruneConfig, source: Any) -> np.ndarray | None:
    if config.score not in CALIBRATED:
        return None
    if source is None:
        raise UserError(
            f"score={config.score!r} looks at text: give prune(..., calibration=...) token ids "
            "(examples, time), a tf.data.Dataset or a TokenDataset, or take score='magnitude'."
        )
    return calibration_ids(source)[:, : model.config.max_sequence_length]


def _solved(
    model: GPTModel,
    config: PruneConfig,
    ids: np.ndarray,
    chosen: set[str],
    on_progress: Progress | None,
) -> GPTModel:
    """A plain copy that SparseGPT has pruned, the same on all workers."""
    copy = copy_model(model, copy_layer)
    solve(copy, config, ids, chosen, on_progress)
    kernels = [copy.base_layer(name).kernel for name in sorted(chosen)]
    agreed = agree(copy.distribute_strategy, [kernel.numpy() for kernel in kernels])
    for kernel, value in zip(kernels, agreed, strict=True):
        kernel.assign(value)
    return copy
