"""`fit`: Keras's `model.fit`, with a budget of steps, and able to go on after any interruption.

A run is a function of the model it starts from, the data and its `TrainConfig`. Batch k depends on
(seed, k) alone, and a checkpoint holds whatever else step k depends on, so a run that was killed
and started again ends with the very weights of an undisturbed one, bit by bit on one machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras, require_tf_keras
from tf_gptopt.training.callbacks import (
    Interruption,
    Progress,
    ProgressLine,
    RunState,
    TrainingLoop,
)
from tf_gptopt.training.checkpoint import Checkpoints
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import optimizer_for


class Batches(Protocol):
    """What `fit` needs of a dataset: `tf_gptopt.data.dataset.TokenDataset` has it."""

    sequence_length: int

    def batches(
        self, split: str, batch_size: int, seed: int = 0, start_step: int = 0
    ) -> tf.data.Dataset: ...


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
    raises at once. Random numbers that are drawn before `fit` (initial weights) are the caller's:
    call `keras.utils.set_random_seed` first for a run that can be repeated.

    Args:
        model: trained in place.
        dataset: gives batches of `(inputs, labels)`, `(batch, time)` int32.
        config: the run.
        checkpoint_dir: where checkpoints go; the two newest are kept. None trains without.
        callbacks: Keras callbacks, for example `pruning_callbacks(model)`. The whole run is one
            epoch to them.
        on_progress: called every `config.log_every` steps; None prints a line on stderr.

    Returns:
        `loss` (smoothed over the last twenty steps or so), `steps`, `tokens`, `seconds` of training
        over all interruptions, `tokens_per_second` after the first step.

    Raises:
        UserError: when model, data and config do not fit together, when the checkpoints are of
            another run or damaged, when the disk is full, and when the training diverges.
        KeyboardInterrupt: after Ctrl-C.
    """
    require_tf_keras(model)
    _check(model, dataset, config)
    strategy = model.distribute_strategy
    state = RunState()
    with strategy.scope():
        if not model._is_compiled:
            model.compile(optimizer_for(config), loss=NextTokenLoss())
        model.optimizer.build(model.trainable_variables)  # a checkpoint needs its moments
        checkpoints = None
        if checkpoint_dir is not None:
            run = _describe(model, dataset, config)
            checkpoints = Checkpoints(
                checkpoint_dir,
                run,
                model=model,
                optimizer=model.optimizer,
                random=random_generators(model),
                state=state,
            )
            checkpoints.restore()

    def save() -> None:
        with strategy.scope():
            checkpoints.save(state.step)

    loop = TrainingLoop(
        state,
        config,
        config.batch_size * dataset.sequence_length,
        on_progress or ProgressLine(),
        save if checkpoints else None,
    )
    if state.step < config.steps:
        batches = dataset.batches(
            "train", config.batch_size, seed=config.seed, start_step=state.step
        )
        with Interruption(loop):
            model.fit(
                batches,
                steps_per_epoch=config.steps - state.step,
                callbacks=[*callbacks, loop],
                verbose=0,
            )
            if checkpoints and not loop.failures:
                save()
    if loop.interrupted and state.step < config.steps:
        print(f"\n{_farewell(state, config, checkpoint_dir)}", file=sys.stderr, flush=True)
        raise KeyboardInterrupt
    return {
        "loss": state.loss,
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens_per_second,
    }


def random_generators(model: keras.Model) -> list[tf.random.Generator]:
    """The random states of `model`'s dropout layers, which Keras keeps out of checkpoints."""
    holders = [getattr(layer, "_random_generator", None) for layer in model._flatten_layers()]
    for holder in filter(None, holders):
        holder._maybe_init()  # Keras makes them when a layer is first called
    states = [getattr(holder, "_generator", None) for holder in holders]
    return [state for state in states if state is not None]


def _check(model: keras.Model, dataset: Batches, config: TrainConfig) -> None:
    """What would fail deep inside a training step, said beforehand."""
    length = dataset.sequence_length
    if config.sequence_length not in (None, length):
        raise UserError(
            f"The configuration asks for sequences of {config.sequence_length} tokens and the "
            f"dataset gives {length}. Open it with TokenDataset.load(folder, "
            f"sequence_length={config.sequence_length}), or leave sequence_length out."
        )
    shape = getattr(getattr(model, "student", model), "config", None)
    context = getattr(shape, "max_sequence_length", length)
    if length > context:
        raise UserError(
            f"The dataset's sequences are {length} tokens long and the model's context is "
            f"{context}. Open the dataset with sequence_length={context}, or build the model with "
            "a larger max_sequence_length."
        )
    tokens = getattr(getattr(dataset, "info", None), "vocab_size", 0)
    known = getattr(shape, "vocab_size", tokens)
    if tokens > known:
        raise UserError(
            f"The dataset has {tokens} different tokens and the model knows {known}. Build the "
            f"model with vocab_size={tokens}, or the dataset with the model's tokenizer."
        )
    policies = {layer.dtype_policy.name for layer in model._flatten_layers()}
    if config.precision != "auto" and config.precision not in policies:
        raise UserError(
            f"The configuration asks for {config.precision} and the model computes in "
            f"{', '.join(sorted(policies))}. Call "
            f"keras.mixed_precision.set_global_policy({config.precision!r}) before building it."
        )
    replicas = model.distribute_strategy.num_replicas_in_sync
    if config.batch_size % replicas:
        raise UserError(
            f"The batch is divided among {replicas} replicas. Received: "
            f"batch_size={config.batch_size}. Take a multiple of {replicas}."
        )


def _describe(model: keras.Model, dataset: Batches, config: TrainConfig) -> dict[str, Any]:
    """What has to be the same for a run to go on from its checkpoint."""
    run = config.to_dict()
    for name in ("checkpoint_every", "log_every", "precision"):
        del run[name]  # they may change on the way
    split = getattr(getattr(dataset, "info", None), "train", None)
    return {
        **run,
        "warmup_steps": config.warmup,
        "sequence_length": dataset.sequence_length,
        "data": getattr(split, "sha256", None),
        "parameters": sum(int(weight.shape.num_elements()) for weight in model.trainable_variables),
    }


def _farewell(state: RunState, config: TrainConfig, folder: str | os.PathLike | None) -> str:
    where = f"Stopped after step {state.step} of {config.steps}"
    if folder is None:
        return f"{where}. There is no checkpoint: no folder for it was given."
    return f"{where}. The same call goes on from the checkpoint in {folder}."
