"""What has to be true before a run starts or goes on: model, data and configuration fit together,
the checkpoint is of the same run, and all workers train the same one."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Protocol

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.training.callbacks import RunState
from tf_gptopt.training.cluster import Alone
from tf_gptopt.training.config import ON_THE_WAY, TrainConfig
from tf_gptopt.training.microbatches import check_accumulation
from tf_gptopt.training.precision import model_policies, policy_of
from tf_gptopt.training.schedules import schedule_for
from tf_gptopt.training.settings import differences, flat


class Batches(Protocol):
    """What `fit` needs of a dataset: `tf_gptopt.data.dataset.TokenDataset` has it."""

    sequence_length: int

    def batches(
        self, split: str, batch_size: int, seed: int = 0, start_step: int = 0
    ) -> tf.data.Dataset: ...


def check(model: keras.Model, dataset: Batches, config: TrainConfig) -> None:
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
    policies = model_policies(model)
    if config.precision != "auto" and policy_of(config.precision) not in policies:
        raise UserError(
            f"The configuration asks for {config.precision} and the model computes in "
            f"{', '.join(sorted(policies))}. Call use_precision({config.precision!r}) before "
            "building it (for a policy it is keras.mixed_precision.set_global_policy)."
        )
    check_accumulation(model, config)


def describe(model: keras.Model, dataset: Batches, config: TrainConfig) -> dict[str, Any]:
    """What has to be the same for a run to go on from its checkpoint."""
    run = config.to_dict()
    for name in (*ON_THE_WAY, "precision"):
        del run[name]
    if config.schedule in ("constant", "plateau", "wsd"):
        del run["steps"]  # a longer run begins in the same way: see check_length
    for name, schedule in (("decay_fraction", "wsd"), ("plateau_patience", "plateau")):
        if config.schedule != schedule:
            del run[name]
    split = getattr(getattr(dataset, "info", None), "train", None)
    return {
        **run,
        "warmup_steps": config.warmup,
        "sequence_length": dataset.sequence_length,
        "data": getattr(split, "sha256", None),
        "parameters": sum(int(weight.shape.num_elements()) for weight in model.trainable_variables),
    }


def check_same(workers: Alone, run: dict[str, Any]) -> None:
    """Workers that train different runs would mix them into one, without a word."""
    different = differences(flat(run), flat(workers.share(run)))
    with workers.agreed():
        if different:
            theirs = (f"{name} is {ours!r}, not {its!r}" for name, (ours, its) in different.items())
            raise UserError(
                f"Worker {workers.index} trains another run than worker 0: {', '.join(theirs)}. "
                "Give all workers the same command, and a file system on which they see the same "
                "files."
            )


def check_length(state: RunState, config: TrainConfig, folder: str | os.PathLike) -> None:
    """A run may be made longer or shorter until something has depended on its length."""
    if state.step > config.steps:
        raise UserError(
            f"The checkpoint in {folder} is of step {state.step}, and the run is to end at "
            f"{config.steps}. Raise steps, or delete the folder to start over."
        )
    if config.schedule == "wsd" and state.steps not in (0, config.steps):
        lengths = sorted((state.steps, config.steps))
        start = schedule_for(dataclasses.replace(config, steps=lengths[0])).decay_start
        if state.step > start:
            raise UserError(
                f"The checkpoint in {folder} is of step {state.step}, and the learning rate of a "
                f"run of {lengths[0]} steps falls from step {start} on, so it cannot become one "
                f"of {lengths[1]}. Give steps={state.steps}, or go on from a checkpoint of step "
                f"{start} or earlier."
            )
    state.steps = config.steps
