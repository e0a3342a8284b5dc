"""`fit`: Keras's `model.fit`, with a budget of steps, and able to go on after any interruption.

A run is a function of the model it starts from, the data and its `TrainConfig`. Batch k depends on
(seed, k) alone, and a checkpoint holds whatever else step k depends on, so a run that was killed
and started again ends with the very weights of an undisturbed one, bit by bit on one machine.

In a cluster (`cluster.py`) every worker calls `fit` with the same arguments. The chief alone writes
checkpoints and reports; all restore the checkpoint that it chooses, save and stop at the same step,
and end with the same weights.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras, require_tf_keras
from tf_gptopt.models.checkpoints import assign_weights
from tf_gptopt.models.gpt import GPTModel, is_wrapped, require_gpt
from tf_gptopt.models.token_means import average_over_tokens
from tf_gptopt.training.callbacks import (
    Interruption,
    Progress,
    ProgressLine,
    RunState,
    TrainingLoop,
)
from tf_gptopt.training.checkpoint import Checkpoints
from tf_gptopt.training.checks import Batches, check, check_length, check_same, describe
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.flops import Utilisation
from tf_gptopt.training.guard import Skips
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.memory import pipeline_parts
from tf_gptopt.training.microbatches import microbatches, optimizer_of, update_size
from tf_gptopt.training.monitoring import Monitor
from tf_gptopt.training.optimizer import optimizer_for
from tf_gptopt.training.parallel.mesh import Mesh
from tf_gptopt.training.parallel.pipeline import PipelinedGPT, pipeline
from tf_gptopt.training.parallel.tensor import ShardedGPT, shard
from tf_gptopt.training.precision import compute_dtype, rewriting
from tf_gptopt.training.profile import Profile
from tf_gptopt.training.settings import settings
from tf_gptopt.training.workers import stall_seconds, together, workers_of


def fit(
    model: keras.Model,
    dataset: Batches,
    config: TrainConfig,
    checkpoint_dir: str | os.PathLike | None = None,
    callbacks: Iterable[keras.callbacks.Callback] = (),
    on_progress: Callable[[Progress], Any] | None = None,
) -> dict[str, Any]:
    """Train `model` for `config.steps` updates in all, on from its newest checkpoint if it has any.

    ```python
    metrics = fit(model, TokenDataset.load("data"), TrainConfig(steps=2000), "checkpoints")
    ```

    Any `keras.Model` from tokens to logits will do, a pruned or quantization-aware one and a
    `Distiller` too, made in the scope of the strategy that is to train it. One that is not compiled
    is compiled with the optimizer of `config` and `NextTokenLoss`; a compiled one keeps its own.

    Ctrl-C finishes the step, writes a checkpoint and raises `KeyboardInterrupt`; a second one
    raises at once. SIGTERM does the same and raises `SystemExit(143)`. In a cluster, a signal to
    any worker stops all of them at the same step. Random numbers that are drawn before `fit`
    (initial weights) are the caller's: call `keras.utils.set_random_seed` first for a run that can
    be repeated.

    Args:
        model: trained in place.
        dataset: gives batches of `(inputs, labels)`, `(batch, time)` int32.
        config: the run.
        checkpoint_dir: where checkpoints go; the two newest are kept. None trains without. A run
            whose learning rate has not begun to fall ("constant", "plateau", "wsd" before its
            decay) may go on with more `config.steps` than it was started with.
        callbacks: Keras callbacks, for example `pruning_callbacks(model)`. The whole run is one
            epoch to them.
        on_progress: called every `config.log_every` steps; None prints a line on stderr.

    Returns:
        `loss` (smoothed over the last twenty steps or so), `steps`, `tokens`, `seconds` of training
        over all interruptions, `tokens_per_second` after the first step. Where updates were not
        finite, `skipped`; with `accumulate` or `max_batch_size` the `gradient_noise_scale` and the
        `update_size` that it was measured at, both in sequences.

    Raises:
        UserError: when model, data and config do not fit together, when the checkpoints are of
            another run or damaged, when the disk is full, when the training diverges, and when
            another worker has ended, is stuck or was called with something else.
        KeyboardInterrupt: after Ctrl-C.
        SystemExit: after SIGTERM.
    """
    require_tf_keras(model)
    if config.recompute:
        _recompute(model)
    if config.mesh is not None and not isinstance(model, ShardedGPT):
        return _fit_on_mesh(model, dataset, config, checkpoint_dir, callbacks, on_progress)
    if config.pipeline is not None and not isinstance(model, PipelinedGPT):
        return _fit_in_stages(model, dataset, config, checkpoint_dir, callbacks, on_progress)
    strategy = model.distribute_strategy
    workers = workers_of(strategy)
    with workers.agreed():
        check(model, dataset, config)
    run = describe(model, dataset, config)
    check_same(workers, run)
    if model.distribute_reduction_method == "auto":
        # metrics are summed over replicas already; several workers' would be added once more
        model.distribute_reduction_method = "first"
    state = RunState()
    with strategy.scope():
        if not model._is_compiled:
            model.compile(optimizer_for(config), loss=NextTokenLoss())
        average_over_tokens(model)
        run |= settings(model)
        check_same(workers, run)
        model.optimizer.build(model.trainable_variables)  # a checkpoint needs its moments
        checkpoints = None
        if checkpoint_dir is not None:
            checkpoints = Checkpoints(
                checkpoint_dir,
                run,
                workers,
                model=model,
                optimizer=model.optimizer,
                random=random_generators(model),
                state=state,
            )
            checkpoints.restore()
            check_length(state, config, checkpoint_dir)
        if config.accumulate > 1:  # a checkpoint amid an update begins it anew, and so do we
            optimizer_of(model).forget_microbatches()

    def save() -> None:
        with strategy.scope():
            checkpoints.save(state.step)

    report, callbacks = on_progress or ProgressLine(), list(callbacks)
    if not workers.is_chief:
        report = _be_silent
    if config.tensorboard:
        monitor = Monitor(_beside(checkpoint_dir, "tensorboard"))
        report = monitor.follow(model, report)
    if config.profile:
        callbacks.append(Profile(_beside(checkpoint_dir, "profile")))
    loop = TrainingLoop(
        state,
        config,
        config.batch_size * dataset.sequence_length,
        report,
        save if checkpoints else None,
        Utilisation(model, dataset.sequence_length, compute_dtype(model)),
        workers,
    )
    if state.step < config.steps:
        batches = dataset.batches(
            "train", config.batch_size, seed=config.seed, start_step=state.batches
        )
        if config.accumulate > 1:
            batches = microbatches(batches, config.accumulate)
        with Interruption(loop), rewriting(config.precision), together(workers, stall_seconds()):
            model.fit(
                batches,
                # at the most: the loop stops at the last update
                steps_per_epoch=(config.steps - state.step) * config.max_accumulate,
                callbacks=[*callbacks, loop],
                verbose=0,
            )
            if checkpoints and not loop.failures:
                save()
    if loop.interrupted and state.step < config.steps:
        if workers.is_chief:
            print(f"\n{_farewell(state, config, checkpoint_dir)}", file=sys.stderr, flush=True)
        if loop.interrupted == signal.SIGTERM:
            sys.exit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
    metrics = {
        "loss": state.loss,
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens_per_second,
    }
    skips, (size, noise) = Skips.of(model.optimizer), update_size(model, config)
    if skips and skips.total:
        metrics["skipped"] = skips.total
    if noise is not None:
        metrics |= {"update_size": size, "gradient_noise_scale": noise}
    return metrics


def _fit_on_mesh(model: keras.Model, dataset: Batches, config: TrainConfig, *rest: Any) -> dict:
    """`fit` of a plain GPT that is divided among the devices of a mesh for the time of it."""
    if not isinstance(model, GPTModel) or is_wrapped(model):
        raise UserError(
            "A mesh divides a plain GPTModel, and this one is wrapped for pruning, quantization or "
            "distillation. Leave mesh out, and give fit a model that was trained on the mesh."
        )
    sharded = shard(model, Mesh.parse(config.mesh))
    try:
        return _fit_spread(sharded, model, dataset, config, *rest)
    finally:
        assign_weights(model, sharded.named_weights())


def _fit_in_stages(model: keras.Model, dataset: Batches, config: TrainConfig, *rest: Any) -> dict:
    """`fit` of a plain GPT whose blocks are spread over devices for the time of it."""
    parts = min(config.batch_size // config.accumulate, pipeline_parts(config.pipeline))
    piped = pipeline(require_gpt(model), config.pipeline, microbatches=max(1, parts))
    try:
        return _fit_spread(piped, model, dataset, config, *rest)
    finally:
        model.set_weights(piped.get_weights())


def _fit_spread(spread: keras.Model, model: keras.Model, *rest: Any) -> dict:
    """`fit` of `spread`, a copy of `model`, compiled as that one is."""
    if model._is_compiled:
        optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
        spread.compile(optimizer, model.loss)
    return fit(spread, *rest)


def _recompute(model: keras.Model) -> None:
    trained = getattr(model, "student", model)
    if not hasattr(trained, "recompute"):
        raise UserError(
            f"recompute needs a GPTModel. Received: {type(trained).__name__}. Leave it out."
        )
    trained.recompute = True


def random_generators(model: keras.Model) -> list[tf.random.Generator]:
    """The random states of `model`'s dropout layers, which Keras keeps out of checkpoints."""
    holders = [getattr(layer, "_random_generator", None) for layer in model._flatten_layers()]
    for holder in filter(None, holders):
        holder._maybe_init()  # Keras makes them when a layer is first called
    states = [getattr(holder, "_generator", None) for holder in holders]
    return [state for state in states if state is not None]


def _be_silent(report: Progress) -> None:
    """Progress of a worker that is not the chief."""


def _beside(checkpoint_dir: str | os.PathLike | None, name: str) -> Path:
    """The folder `name` next to the checkpoints."""
    if checkpoint_dir is None:
        raise UserError(
            f"{name}=True writes a folder beside the checkpoints, and there are none. Give fit a "
            "checkpoint_dir, or Monitor(folder) or Profile(folder) among its callbacks."
        )
    return Path(checkpoint_dir).absolute().parent / name


def _farewell(state: RunState, config: TrainConfig, folder: str | os.PathLike | None) -> str:
    where = f"Stopped after step {state.step} of {config.steps}"
    if folder is None:
        return f"{where}. There is no checkpoint: no folder for it was given."
    return f"{where}. The same call goes on from the checkpoint in {folder}."
