"""What the stages that train have in common: devices, data, `fit` with checkpoints, saving."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.calibration_text import calibration_ids
from tf_gptopt.compression.pruning.pruner import count_parameters
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.models.checkpoints import save_model
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.loss_log import LossLog
from tf_gptopt.training import trainer
from tf_gptopt.training.cluster import Alone, leads
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.parallel.mesh import Mesh
from tf_gptopt.training.precision import use_precision
from tf_gptopt.training.strategy import applicable, choose_strategy
from tf_gptopt.training.workers import workers_of

Metrics = dict[str, Any]

CHECKPOINTS = "checkpoints"  # what a stage needs to go on, and a finished one no more


def team() -> Alone:
    """The workers that run this stage together."""
    return workers_of(_strategy()[0])


@functools.cache
def _strategy() -> tuple[Any, str]:
    """One strategy for all stages of a process: a cluster can be joined only once."""
    return choose_strategy("auto")


@contextlib.contextmanager
def on_devices(config: TrainConfig, seed: int, console: Console) -> Iterator[None]:
    """The scope to build a model in: devices and dtype policy chosen, random numbers seeded."""
    scope, devices = _scope(config)
    precision, why = use_precision(config.precision)
    console.note_once(f"{devices}; {precision}: {why}")
    keras.utils.set_random_seed(seed)
    with scope:
        yield


def _scope(config: TrainConfig) -> tuple[Any, str]:
    """Where to build a model, and why there."""
    if config.mesh is None and config.pipeline is None:
        strategy, why = _strategy()
        return strategy.scope(), why
    if applicable(os.environ) == "multi_worker":
        raise UserError(
            "A mesh or a pipeline is made of the devices of one process, and this one is a worker "
            "of a cluster. Leave it out, or start the command alone."
        )
    mesh = Mesh.parse(config.mesh) if config.mesh else Mesh(model=config.pipeline)
    mesh.devices()  # first of all: a CPU is divided before TensorFlow computes, or not at all
    # `fit` divides the model, so it is built in the memory of the host
    what = f"a mesh of {mesh.size} devices, {mesh}"
    return tf.device("CPU:0"), what if config.mesh else f"a pipeline of {mesh.size} devices"


def matching_dataset(model: GPTModel, folder: Path) -> TokenDataset:
    """The dataset, if it was encoded with the model's tokenizer: another one is silent nonsense."""
    tokens = TokenDataset.load(folder)
    if model.tokenizer is not None:
        ours, theirs = model.tokenizer.fingerprint, tokens.info.tokenizer_fingerprint
        if ours != theirs:
            raise UserError(
                f"{folder} was encoded with another tokenizer than the model's. Make the dataset "
                "again with `tf-gptopt dataset --tokenizer MODEL_FOLDER`."
            )
    return tokens


def range_calibration(section: Any, tokens: TokenDataset) -> Any:
    """Text that a student's static activations begin with; None for a scheme without them."""
    is_static = section.quantization.activations == "static"
    return calibration_ids(tokens, section.calibration) if is_static else None


def fit(
    model: keras.Model,
    tokens: TokenDataset,
    config: TrainConfig,
    out: Path,
    seed: int,
    console: Console,
    callbacks: Any = (),
) -> Metrics:
    """Train with checkpoints in `out`/checkpoints, from the newest one if there is any."""
    config = dataclasses.replace(config, seed=seed + config.seed)
    report = console.step
    if leads():
        goes_on = any((out / CHECKPOINTS).glob("step-*"))
        report = LossLog(out, goes_on, report)
    try:
        history = trainer.fit(
            model,
            tokens,
            config,
            checkpoint_dir=out / CHECKPOINTS,
            callbacks=callbacks,
            on_progress=report,
        )
    finally:
        console.close()
    history["training_seconds"] = history.pop("seconds")  # over all interruptions
    return history


def save(model: GPTModel, out: Path) -> Metrics:
    if leads():
        save_model(model, out)
    parameters, nonzero = count_parameters(model)
    return {"parameters": parameters, "nonzero": nonzero}
