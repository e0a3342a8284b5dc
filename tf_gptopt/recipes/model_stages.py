"""The stages that make and measure models, each a function that also stands alone.

A stage reads folders, writes one folder and returns its metrics. Its signature is always
`stage(section, inputs..., out, seed, console)`; the sections are in `sections.py`. What a stage
leaves is a plain model (weights, config.json, tokenizer), so any stage's folder feeds any other
stage, `evaluate` and `generate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tf_gptopt._files import write_json
from tf_gptopt._folder import changing
from tf_gptopt.compression.calibration_text import calibration_ids
from tf_gptopt.compression.pruning import pruner
from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
from tf_gptopt.compression.pruning.config import CALIBRATED
from tf_gptopt.compression.quantization import ptq
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
from tf_gptopt.compression.structured import shrinking
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.data.tokenizer import Tokenizer
from tf_gptopt.evaluation.compare import Candidate
from tf_gptopt.evaluation.compare import evaluate as measure
from tf_gptopt.evaluation.report import human_bytes, write_report
from tf_gptopt.models.checkpoints import load_checkpoint
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.recipes.advice import on_length
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.schemes import decided, say_if_left
from tf_gptopt.recipes.sections import (
    EvaluateSection,
    ExportSection,
    PruneSection,
    QatSection,
    QuantizeSection,
    ShrinkSection,
    TrainSection,
)
from tf_gptopt.recipes.stage_parts import (
    Metrics,
    fit,
    matching_dataset,
    on_devices,
    range_calibration,
    save,
)
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.training.precision import use_precision


def train(
    section: TrainSection, dataset_folder: Path, out: Path, seed: int, console: Console
) -> Metrics:
    """Train a GPT from scratch."""
    tokens = TokenDataset.load(dataset_folder)
    encoder = Tokenizer.load(dataset_folder)
    shape = dataclasses.asdict(section.model)
    with on_devices(section.fit, seed, console):
        model = GPTModel(
            vocab_size=encoder.vocab_size, max_sequence_length=tokens.sequence_length, **shape
        )
    model.tokenizer = encoder
    parameters = model.count_params()
    console.note(f"{parameters:,} parameters")
    passes, advice = on_length(
        section.fit, tokens.sequence_length, tokens.num_tokens("train"), parameters
    )
    for line in advice:
        console.note(line)
    history = fit(model, tokens, section.fit, out, seed, console)
    return {**save(model, out), "passes": round(passes, 3), **history}


def shrink(
    section: ShrinkSection,
    model_folder: Path,
    dataset_folder: Path,
    out: Path,
    seed: int,
    console: Console,
) -> Metrics:
    """Remove heads, neurons, blocks or channels, and train nothing."""
    use_precision("float32")
    model = load_checkpoint(model_folder)
    tokens = matching_dataset(model, dataset_folder)
    ids = calibration_ids(tokens, section.calibration)
    small = shrinking.shrink(model, section.target, ids, on_progress=console.progress)
    console.note(shrinking.describe_shrink(model, small))
    return save(small, out)


def prune(
    section: PruneSection,
    model_folder: Path,
    dataset_folder: Path,
    out: Path,
    seed: int,
    console: Console,
) -> Metrics:
    """Remove weights, along a schedule while training on or at once."""
    config = section.pruning
    if section.one_shot:
        config = dataclasses.replace(config, schedule="constant", begin_step=0)
    else:
        say_if_left(model_folder, console)
    with on_devices(section.fit, seed, console):
        model = load_checkpoint(model_folder)
        tokens = matching_dataset(model, dataset_folder)
        calibration = None
        if config.score in CALIBRATED:
            calibration = calibration_ids(tokens, section.calibration)
        sparse = pruner.prune(model, config, calibration, on_progress=console.progress)
    history = {}
    if not section.one_shot:
        callbacks = pruning_callbacks(sparse, tokens)
        history = fit(sparse, tokens, section.fit, out, seed, console, callbacks)
    plain = pruner.strip_pruning(sparse)
    return {**save(plain, out), "sparsity": pruner.sparsity(plain)["total"], **history}


def qat(
    section: QatSection,
    model_folder: Path,
    dataset_folder: Path,
    out: Path,
    seed: int,
    console: Console,
) -> Metrics:
    """Train on with fake-quantized weights; zeros stay zero."""
    section = decided(section, model_folder, console, trains=True)
    with on_devices(section.fit, seed, console):
        model = load_checkpoint(model_folder)
        tokens = matching_dataset(model, dataset_folder)
        aware = quantize_aware(
            model,
            section.quantization,
            calibration=range_calibration(section, tokens),
            learned_ranges=section.learned_ranges,
        )
    history = fit(aware, tokens, section.fit, out, seed, console)
    scheme = {"quantization": section.quantization.to_dict()}
    return {**save(strip_quantization(aware), out), **scheme, **history}


def quantize(
    section: QuantizeSection,
    model_folder: Path,
    out: Path,
    seed: int,
    console: Console,
    dataset_folder: Path | None = None,
) -> Metrics:
    """Put the weights on their grids, and train nothing."""
    use_precision("float32")
    config = decided(section, model_folder, console).quantization
    model = load_checkpoint(model_folder)
    ids = _calibration(model, config, dataset_folder, section.calibration)
    quantized = ptq.quantize(model, config, ids, on_progress=console.progress)
    return {**save(quantized, out), "quantization": config.to_dict()}


def export(
    section: ExportSection,
    model_folder: Path,
    out: Path,
    seed: int,
    console: Console,
    dataset_folder: Path | None = None,
    text_folder: Path | None = None,
) -> Metrics:
    """Write model.tflite, with its tokenizer beside it, checked on text of either dataset."""
    use_precision("float32")
    config = decided(section, model_folder, console).quantization
    model = load_checkpoint(model_folder)
    ids = _calibration(model, config, dataset_folder, section.calibration)
    text = dataset_folder or text_folder
    with changing(out) as new:
        info = export_tflite(
            model,
            new / "model.tflite",
            config,
            tokenizer=model.tokenizer,
            calibration=ids,
            check=True if text is None else calibration_ids(matching_dataset(model, text), 1),
        )
        write_json(new / "config.json", {"format": "tflite", "gpt": model.config.to_dict()})
    info = dataclasses.replace(info, path=str(out / "model.tflite"))
    console.note(f"{human_bytes(info.bytes)}, {config.name}")
    return dataclasses.asdict(info)


def _calibration(
    model: GPTModel, config: QuantConfig, dataset_folder: Path | None, examples: int
) -> np.ndarray | None:
    """Text for a scheme that looks at some; whoever needs it and finds none says so."""
    if dataset_folder is None or not config.needs_calibration:
        return None
    return calibration_ids(matching_dataset(model, dataset_folder), examples)


def evaluate(
    section: EvaluateSection,
    candidates: Sequence[Candidate],
    dataset_folder: Path,
    out: Path,
    seed: int,
    console: Console,
    draft_file: Path | None = None,
) -> Metrics:
    """Measure all candidates on the held-out split; writes report.json and report.md.

    With a draft, also what it makes of the last candidate's speed.
    """
    use_precision("float32")
    report = measure(
        candidates,
        TokenDataset.load(dataset_folder),
        tokens=section.tokens,
        speed_tokens=section.speed_tokens,
        threads=section.threads,
        tolerance=section.tolerance,
        draft=draft_file,
        on_progress=console.note,
    )
    write_report(report, out, "From text to a file, stage by stage")
    return report.to_dict()
