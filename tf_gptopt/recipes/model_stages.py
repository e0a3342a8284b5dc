"""The stages that make and measure models, each a function that also stands alone.

A stage reads folders, writes one folder and returns its metrics. Its signature is always
`stage(section, inputs..., out, seed, console)`; the sections are in `recipe.py`. What a stage
leaves is a plain model (weights, config.json, tokenizer), so any stage's folder feeds any other
stage, `evaluate` and `generate`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._files import write_json
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.pruning import magnitude
from tf_gptopt.compression.pruning.structured import shrink
from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.data.tokenizer import Tokenizer
from tf_gptopt.evaluation.compare import Candidate
from tf_gptopt.evaluation.compare import evaluate as measure
from tf_gptopt.evaluation.report import human_bytes, write_report
from tf_gptopt.models.checkpoints import load_checkpoint, save_model
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.recipe import (
    DistillSection,
    EvaluateSection,
    ExportSection,
    PruneSection,
    QatSection,
    TrainSection,
)
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.training import trainer
from tf_gptopt.training.cluster import leads
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.parallel.mesh import Mesh
from tf_gptopt.training.precision import use_precision
from tf_gptopt.training.strategy import applicable, choose_strategy

Metrics = dict[str, Any]


def train(
    section: TrainSection, dataset_folder: Path, out: Path, seed: int, console: Console
) -> Metrics:
    """Train a GPT from scratch."""
    tokens = TokenDataset.load(dataset_folder)
    encoder = Tokenizer.load(dataset_folder)
    shape = dataclasses.asdict(section.model)
    with _devices(section.fit, seed, console):
        model = GPTModel(
            vocab_size=encoder.vocab_size, max_sequence_length=tokens.sequence_length, **shape
        )
    model.tokenizer = encoder
    console.note(f"{model.count_params():,} parameters")
    history = _fit(model, tokens, section.fit, out, seed, console)
    return {**_save(model, out), **history}


def distill(
    section: DistillSection,
    teacher_folder: Path,
    dataset_folder: Path,
    out: Path,
    seed: int,
    console: Console,
) -> Metrics:
    """Distill a teacher into a student that starts as some of its blocks."""
    with _devices(section.fit, seed, console):
        teacher = load_checkpoint(teacher_folder)
        student = shrink(teacher, layers=section.layers)
        distiller = Distiller(
            student=student, teacher=teacher, **dataclasses.asdict(section.soft_labels)
        )
    tokens = _matching_dataset(teacher, dataset_folder)
    console.note(f"{teacher.count_params():,} -> {student.count_params():,} parameters")
    history = _fit(distiller, tokens, section.fit, out, seed, console)
    return {**_save(distiller.student, out), **history}


def prune(
    section: PruneSection,
    model_folder: Path,
    dataset_folder: Path,
    out: Path,
    seed: int,
    console: Console,
) -> Metrics:
    """Remove weights by magnitude along a schedule while training on."""
    with _devices(section.fit, seed, console):
        model = load_checkpoint(model_folder)
        sparse = magnitude.prune(model, section.pruning)
    tokens = _matching_dataset(model, dataset_folder)
    callbacks = magnitude.pruning_callbacks(sparse)
    history = _fit(sparse, tokens, section.fit, out, seed, console, callbacks)
    return {**_save(magnitude.strip_pruning(sparse), out), **history}


def qat(
    section: QatSection,
    model_folder: Path,
    dataset_folder: Path,
    out: Path,
    seed: int,
    console: Console,
) -> Metrics:
    """Train on with fake-quantized weights; zeros stay zero."""
    with _devices(section.fit, seed, console):
        model = load_checkpoint(model_folder)
        aware = quantize_aware(model, section.quantization)
    tokens = _matching_dataset(model, dataset_folder)
    history = _fit(aware, tokens, section.fit, out, seed, console)
    return {**_save(strip_quantization(aware), out), **history}


def export(
    section: ExportSection, model_folder: Path, out: Path, seed: int, console: Console
) -> Metrics:
    """Write model.tflite, with its tokenizer beside it."""
    use_precision("float32")
    model = load_checkpoint(model_folder)
    info = export_tflite(
        model, out / "model.tflite", section.quantization, tokenizer=model.tokenizer
    )
    write_json(out / "config.json", {"format": "tflite", "gpt": model.config.to_dict()})
    console.note(f"{human_bytes(info.bytes)}, {section.quantization.scheme}")
    return dataclasses.asdict(info)


def evaluate(
    section: EvaluateSection,
    candidates: Sequence[Candidate],
    dataset_folder: Path,
    out: Path,
    seed: int,
    console: Console,
) -> Metrics:
    """Measure all candidates on the held-out split; writes report.json and report.md."""
    use_precision("float32")
    report = measure(
        candidates,
        TokenDataset.load(dataset_folder),
        tokens=section.tokens,
        speed_tokens=section.speed_tokens,
        threads=section.threads,
        tolerance=section.tolerance,
        on_progress=console.note,
    )
    write_report(report, out, "From text to a file, stage by stage")
    return report.to_dict()


# Shared by the stages


@functools.cache
def _strategy() -> tuple[Any, str]:
    """One strategy for all stages of a process: a cluster can be joined only once."""
    return choose_strategy("auto")


@contextlib.contextmanager
def _devices(config: TrainConfig, seed: int, console: Console) -> Iterator[None]:
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


def _matching_dataset(model: GPTModel, folder: Path) -> TokenDataset:
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


def _fit(
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
    checkpoints = out / "checkpoints"
    try:
        history = trainer.fit(
            model,
            tokens,
            config,
            checkpoint_dir=checkpoints,
            callbacks=callbacks,
            on_progress=console.step,
        )
    finally:
        console.close()
    history["training_seconds"] = history.pop("seconds")  # over all interruptions
    return history


def _save(model: GPTModel, out: Path) -> Metrics:
    if leads():
        save_model(model, out)
    parameters, nonzero = magnitude.count_parameters(model)
    return {"parameters": parameters, "nonzero": nonzero}
