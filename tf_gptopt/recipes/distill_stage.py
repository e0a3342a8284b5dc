"""The distill stage: a student starts as a part of its teacher and learns from it, in rounds.

Each round has a folder: the last one that of the stage, those before it `round-1`, `round-2` and so
on inside. The student that a round starts from is written before it trains, and its metrics.json
when it is done, so a run that was killed goes on in the middle of a round with the same student.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from tf_gptopt._files import read_json, write_json
from tf_gptopt._keras import keras
from tf_gptopt.compression.calibration_text import calibration_ids
from tf_gptopt.compression.distillation.cache import CachedTeacher
from tf_gptopt.compression.distillation.cache_writer import cache_logits
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
from tf_gptopt.compression.pruning.config import CALIBRATED, PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, sparsity, strip_pruning
from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.compression.structured.shrinking import shrink
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.evaluation.report import human_bytes
from tf_gptopt.models.checkpoints import load_checkpoint, save_model
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.counting import token_flops, weight_count
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.places import model_place
from tf_gptopt.recipes.sections import DistillSection, DraftSection, check_rounds
from tf_gptopt.recipes.stage_parts import (
    CHECKPOINTS,
    Metrics,
    fit,
    matching_dataset,
    on_devices,
    range_calibration,
    save,
    team,
)
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.training.precision import use_precision

DRAFT = "draft.tflite"


def distill(
    section: DistillSection,
    teacher_folder: Path,
    dataset_folder: Path,
    out: Path,
    seed: int,
    console: Console,
) -> Metrics:
    """Distill a teacher into a student that starts as a part of it."""
    return _Distillation(section, teacher_folder, dataset_folder, out, seed, console).run()


def draft(
    section: DraftSection,
    teacher_folder: Path,
    dataset_folder: Path,
    out: Path,
    seed: int,
    console: Console,
) -> Metrics:
    """Distill a target into a student that guesses its tokens, and write draft.tflite."""
    student = DistillSection(
        section.layers,
        section.student,
        section.calibration,
        distillation=section.distillation,
        fit=section.fit,
    )
    metrics = distill(student, teacher_folder, dataset_folder, out, seed, console)
    if team().is_chief:
        model = load_checkpoint(out)
        info = export_tflite(model, out / DRAFT, section.quantization)
        console.note(f"{human_bytes(info.bytes)}, {info.scheme}")
        metrics = {**metrics, "file": dataclasses.asdict(info)}
    return metrics


@dataclasses.dataclass(frozen=True)
class _Distillation:
    section: DistillSection
    teacher_folder: Path
    dataset_folder: Path
    out: Path
    seed: int
    console: Console

    def run(self) -> Metrics:
        """All rounds; each gives the next one its student."""
        workers, section = team(), self.section
        if self.top_k:
            if workers.is_chief:
                self.write_logits()
            workers.share(None)  # all wait until it is on disk
        source, rounds = self.teacher_folder, []
        for number in range(1, section.rounds + 1):
            last = number == section.rounds
            folder = self.out if last else self.out / f"round-{number}"
            finished = folder / "metrics.json"
            metrics = workers.share(read_json(finished) if not last and finished.exists() else None)
            if section.rounds > 1:
                note = " [dim]· finished before[/]" if metrics else ""
                self.console.note(f"round {number} of {section.rounds}{note}")
            if metrics is None:
                student = folder / CHECKPOINTS / "student"
                if workers.is_chief and not (student / "config.json").exists():
                    save_model(self.shrunk(source, number), student)
                workers.share(None)
                metrics = self.learn(student, folder, self.seed + number - 1)
                if workers.is_chief and not last:
                    write_json(finished, metrics)
            if workers.is_chief and not last:
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            rounds.append(metrics)
            source = folder
        return {**metrics, "rounds": rounds} if section.rounds > 1 else metrics

    def shrunk(self, source: Path, number: int) -> GPTModel:
        """The student that a round starts from: a part of the model in `source`."""
        section = self.section
        keras.utils.set_random_seed(self.seed)
        use_precision("float32")
        model = load_checkpoint(source)
        if section.student is None:
            return shrink(model, layers=section.layers)
        teacher = model if number == 1 else load_checkpoint(self.teacher_folder)
        target = part_of_the_way(section.student, teacher.config, number, section.rounds)
        tokens = matching_dataset(model, self.dataset_folder)
        ids = calibration_ids(tokens, section.calibration)
        return shrink(model, target, ids, on_progress=self.console.progress)

    def learn(self, student_folder: Path, out: Path, seed: int) -> Metrics:
        """One round's training; the student goes to `out`."""
        section, config = self.section, self.section.distillation
        with on_devices(section.fit, seed, self.console):
            student = load_checkpoint(student_folder)
            tokens = matching_dataset(student, self.dataset_folder)
            self.console.note(f"a student of {student.count_params():,} parameters")
            student, callbacks, strip = self.wrapped(student, tokens)
            if self.top_k:
                teacher = tokens = CachedTeacher.open(self.logits, tokens)
            else:
                teacher = self.teachers()
            distiller = Distiller(
                student, teacher, alpha=config.alpha, losses=config.losses() or None
            )
        history = fit(distiller, tokens, section.fit, out, seed, self.console, callbacks)
        return {**save(strip(student), out), **history}

    def wrapped(
        self, student: GPTModel, tokens: TokenDataset
    ) -> tuple[GPTModel, list[keras.callbacks.Callback], Callable[[GPTModel], GPTModel]]:
        """The student as it learns, its callbacks, and the way back to a plain model."""
        section, config = self.section, self.section.pruning
        if section.quantization:  # which keeps zeros as well
            ids = range_calibration(section, tokens)
            aware = quantize_aware(student, section.quantization, calibration=ids)
            return aware, [], strip_quantization
        if config:
            ids = calibration_ids(tokens, section.calibration)
            ids = ids if config.score in CALIBRATED else None
            sparse = prune(student, config, ids, on_progress=self.console.progress)
            return sparse, pruning_callbacks(sparse, tokens), strip_pruning
        if sparsity(student)["total"] > 0:  # a part of a pruned teacher: its zeros stay
            protect = PruneConfig(sparsity=0.0, schedule="constant")
            return prune(student, protect), [], strip_pruning
        return student, [], lambda student: student

    def teachers(self) -> list[GPTModel]:
        others = (model_place(folder) for folder in self.section.teachers)
        return [load_checkpoint(path) for path in (self.teacher_folder, *others)]

    @property
    def top_k(self) -> int | None:
        """How many logits are written first, and the teachers never run again."""
        config = self.section.distillation
        return config.top_k if config.alpha else None

    @property
    def logits(self) -> Path:
        return self.out / CHECKPOINTS / "logits"

    def write_logits(self) -> None:
        config = self.section.distillation
        use_precision("float32")
        teachers = self.teachers()
        tokens = matching_dataset(teachers[0], self.dataset_folder)
        cache_logits(
            teachers,
            tokens,
            self.logits,
            self.top_k,
            temperature=config.temperature,
            on_progress=self.console.progress,
        )


def part_of_the_way(
    target: ShrinkConfig, teacher: GPTConfig, number: int, rounds: int
) -> ShrinkConfig:
    """What round `number` of `rounds` leaves: each keeps the same share of what the one before it
    left, and the last one has met the budget.

    Raises:
        UserError: when that share is too small.
    """
    if rounds == 1:
        return target
    amount = getattr(target, target.budget)
    if target.budget == "parameters":
        whole = weight_count(teacher)
    else:
        whole = token_flops(teacher, teacher.max_sequence_length)
    fraction = amount if isinstance(amount, float) else amount / whole
    check_rounds(fraction, rounds)
    return dataclasses.replace(
        target, **{target.budget: int(whole * fraction ** (number / rounds))}
    )
