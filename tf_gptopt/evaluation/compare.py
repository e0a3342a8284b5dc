"""evaluate: measure models side by side on the same held-out tokens."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.compression.pruning.pruner import count_parameters
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.evaluation.quality import Quality, measure_quality
from tf_gptopt.evaluation.report import Report, Row, recommend
from tf_gptopt.evaluation.size import Size, file_bytes
from tf_gptopt.evaluation.speed import Speed, measure_draft, measure_speed
from tf_gptopt.models.checkpoints import WEIGHTS_FILE, load_checkpoint, save_model
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.reading import count_weights
from tf_gptopt.tflite.runtime import TFLiteGPT


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Args:
        name: what the table calls it.
        source: a GPTModel, a folder with weights or a .tflite file.
        reference: the name of an earlier candidate that it is compared with.
    """

    name: str
    source: GPTModel | str | Path
    reference: str | None = None


def evaluate(
    models: Sequence[GPTModel | str | Path | Candidate],
    dataset: TokenDataset,
    *,
    tokens: int = 32768,
    speed_tokens: int = 64,
    threads: int | None = None,
    tolerance: float = 0.1,
    draft: str | Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure models on a dataset's held-out split and recommend the file to ship.

    Args:
        models: GPTModels, folders and .tflite files; the first is the reference of all that name
            no other.
        dataset: its `valid` split is scored in order, in windows of its sequence length.
        tokens: at most so many tokens are scored.
        speed_tokens: tokens decoded for the timing.
        threads: processor threads of the timing; default all.
        tolerance: how much worse than the first model's perplexity a recommended file may be.
        draft: a .tflite file that drafts for the last of the models, a file too: how much sooner
            that completes held-out text.
        on_progress: receives a line for each model begun.

    Raises:
        UserError: when the list is empty or the split holds no window.
    """
    candidates = [_candidate(model, models) for model in models]
    if not candidates:
        raise UserError("Name at least one model to evaluate: a folder or a .tflite file.")
    length = dataset.sequence_length
    batch = max(1, min(8, tokens // length))
    windows = max(1, tokens // (length * batch))
    qualities: dict[str, Quality] = {}
    rows = []
    for candidate in candidates:
        if on_progress:
            on_progress(candidate.name)
        batches = dataset.batches("valid", batch, max_batches=windows)
        kind, quality, size, speed = _measure(
            candidate.source, batches.as_numpy_iterator(), speed_tokens, threads
        )
        reference = candidate.reference
        rows.append(
            Row(
                name=candidate.name,
                kind=kind,
                size=size,
                speed=speed,
                loss=quality.loss,
                perplexity=quality.perplexity,
                agreement=quality.agreement(qualities[reference]) if reference else None,
                reference=reference,
            )
        )
        qualities[candidate.name] = quality
    scored = next(iter(qualities.values())).tokens
    recommended, why = recommend(rows, tolerance)
    speculative = None
    if draft is not None:
        if on_progress:
            on_progress(f"{candidates[-1].name} with {Path(draft).name}")
        prompts = held_out_prompts(dataset)
        target = TFLiteGPT(candidates[-1].source, threads=threads)
        speculative = measure_draft(target, draft, prompts, name=candidates[-1].name)
    valid = dataset.info.valid
    ratio = valid.text_bytes / valid.tokens
    return Report(tuple(rows), scored, recommended, why, speculative, ratio or None)


def held_out_prompts(dataset: TokenDataset, count: int = 8) -> list[np.ndarray]:
    """Beginnings of `count` windows, evenly spaced in the held-out split, of an eighth of the
    context each."""
    tokens, length = dataset.tokens("valid"), dataset.sequence_length
    starts = np.linspace(0, len(tokens) - length, count, dtype=int)
    return [tokens[start : start + max(1, length // 8)].astype(np.int32) for start in starts]


def _candidate(model: Any, models: Sequence[Any]) -> Candidate:
    if isinstance(model, Candidate):
        return model
    name = model.name if isinstance(model, GPTModel) else str(model)
    first = models[0]
    if model is first:
        return Candidate(name, model)
    reference = first.name if isinstance(first, (GPTModel, Candidate)) else str(first)
    return Candidate(name, model, reference)


def _measure(
    source: GPTModel | str | Path, batches: Any, speed_tokens: int, threads: int | None
) -> tuple[str, Quality, Size, Speed]:
    if isinstance(source, (str, Path)) and Path(source).is_file():
        runtime = TFLiteGPT(source, threads=threads)
        _, nonzero = count_weights(Path(source).read_bytes())
        size = Size(runtime.metadata["parameters"], nonzero, *file_bytes(source))
        quality = measure_quality(runtime, batches)
        return "tflite", quality, size, measure_speed(runtime, tokens=speed_tokens)

    model = source if isinstance(source, GPTModel) else load_checkpoint(source)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(source, GPTModel):
            save_model(model, folder)
            weights_file = Path(folder) / WEIGHTS_FILE
        else:
            weights_file = Path(source) / WEIGHTS_FILE
        size = Size(*count_parameters(model), *file_bytes(weights_file))
        float_file = Path(folder) / "model.tflite"
        export_tflite(model, float_file, QuantConfig("float32"))
        speed = measure_speed(TFLiteGPT(float_file, threads=threads), tokens=speed_tokens)
    return "keras", measure_quality(model, batches), size, speed
