"""The sections of a recipe: one dataclass per stage, with the main job's values. No TensorFlow.

Each is the first argument of the stage function of its name, and its fields are the options of the
command of that name.
"""

from __future__ import annotations

import dataclasses
import math

from tf_gptopt._errors import UserError
from tf_gptopt.compression.distillation.config import DistillConfig
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.training.config import TrainConfig

SMALLEST_VOCAB = 257  # every byte and the end-of-text token, as data/tokenizer.py has it
LEAST_KEPT = 2 / 3  # of the student, in one of several rounds


@dataclasses.dataclass(frozen=True)
class CorpusSection:
    """Where the text comes from.

    Args:
        paths: text, .json or .jsonl files, packed or not, or folders; empty means the source code
            of the running Python's standard library.
        text_field: the field of a JSON object that holds its text.
        valid: text to validate on, of the same kinds; empty means that a share of the documents
            is held out.
    """

    paths: tuple[str, ...] = ()
    text_field: str = "text"
    valid: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TokenizerSection:
    """The byte-level BPE tokenizer.

    Args:
        vocab_size: entries, of which 256 are bytes and one ends a document.
    """

    vocab_size: int = 4096

    def __post_init__(self) -> None:
        _check_least("vocab_size", self.vocab_size, SMALLEST_VOCAB)


@dataclasses.dataclass(frozen=True)
class DatasetSection:
    """Packed tokens, split by document.

    Args:
        sequence_length: tokens a training example holds, the context of the model.
        valid_fraction: share of the text that is held out, in whole documents.
    """

    sequence_length: int = 256
    valid_fraction: float = 0.05

    def __post_init__(self) -> None:
        _check_least("sequence_length", self.sequence_length, 1)
        if not 0 < self.valid_fraction < 1:
            raise UserError(
                f"valid_fraction must be between 0 and 1. Received: {self.valid_fraction}."
            )


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The teacher's shape; vocabulary and context come from the tokenizer and the dataset.

    Args:
        embedding_dim: width of the residual stream.
        num_layers: number of blocks.
        num_heads: attention heads.
        intermediate_dim: neurons of the MLP; default 4 x width.
        dropout: rate after embeddings, in attention and after each residual branch.
        tie_embeddings: whether the logits use the token table.
    """

    embedding_dim: int = 192
    num_layers: int = 4
    num_heads: int = 6
    intermediate_dim: int | None = None
    dropout: float = 0.0
    tie_embeddings: bool = True


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """Train the teacher.

    Args:
        model: its shape.
        fit: its training.
    """

    model: ModelSection = ModelSection()
    fit: TrainConfig = TrainConfig(steps=600, learning_rate=2e-3)


@dataclasses.dataclass(frozen=True)
class ShrinkSection:
    """Remove whole heads, neurons, blocks or channels, without training.

    Args:
        target: the budget or the shape; it has to be given.
        calibration: examples of the training split that importance is measured on.
    """

    target: ShrinkConfig | None = None
    calibration: int = 128

    def __post_init__(self) -> None:
        _check_least("calibration", self.calibration, 1)
        if self.target is None:
            raise UserError("Say how small the model is to be, such as --target.parameters 0.67.")


@dataclasses.dataclass(frozen=True)
class DistillSection:
    """Distill a student that starts as a part of its teacher.

    In several rounds the student gets small step by step: each removes an equal fraction of what
    the budget counts, at most a third, and distills from the one original teacher before the next
    (Muralidharan et al. 2024, "Minitron", arXiv:2407.14679).

    Args:
        layers: how many blocks the student keeps, where `student` says nothing.
        student: what the student keeps: a budget or a shape.
        calibration: examples of the training split that importance is measured on.
        rounds: of shrinking and distilling; more than one need a budget.
        teachers: folders of further teachers (a stage's, a run's, a checkpoint's), beside the one
            that the student comes from.
        distillation: what the student learns from its teachers.
        quantization: a scheme that the student sees while it learns, or None for a float one.
        pruning: a schedule along which it gets sparse while it learns, or None to prune nothing.
        fit: its training, in each round.
    """

    layers: int = 2
    student: ShrinkConfig | None = None
    calibration: int = 128
    rounds: int = 1
    teachers: tuple[str, ...] = ()
    distillation: DistillConfig = DistillConfig()
    quantization: QuantConfig | None = None
    pruning: PruneConfig | None = None
    fit: TrainConfig = TrainConfig(steps=300, learning_rate=1e-3)

    def __post_init__(self) -> None:
        _check_least("layers", self.layers, 1)
        _check_least("calibration", self.calibration, 1)
        if self.quantization and self.pruning:
            raise UserError(
                "A student is pruned while it is distilled, or quantized, not both at once. Prune "
                "here, and quantize in the stage qat, which keeps the zeros."
            )
        if self.pruning:
            _check_schedule(self.pruning, self.fit)
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise UserError(f"rounds must be a positive integer. Received: {self.rounds!r}.")
        if self.rounds == 1:
            return
        if self.student is None or self.student.budget is None:
            raise UserError(
                "Several rounds need a budget that can be met part of the way: "
                "student.parameters or student.flops."
            )
        budget = getattr(self.student, self.student.budget)
        if isinstance(budget, float):
            check_rounds(budget, self.rounds)


def check_rounds(fraction: float, rounds: int) -> None:
    """Raise a `UserError` if `rounds` that leave `fraction` of a model remove too much each."""
    if fraction ** (1 / rounds) < LEAST_KEPT - 1e-9:
        enough = math.ceil(math.log(fraction) / math.log(LEAST_KEPT))
        raise UserError(
            f"{rounds} rounds down to {fraction:.3g} of the teacher would each remove more than a "
            f"third of the student, which distillation does not heal well. Take rounds={enough}, "
            "or rounds=1 to shrink at once."
        )


@dataclasses.dataclass(frozen=True)
class PruneSection:
    """Prune the student, by default while it trains on.

    Args:
        pruning: how much, where, by which score and along which schedule.
        calibration: examples of the training split for the scores that need some.
        one_shot: prune at once, whatever the schedule, and do not train.
        fit: its training; it must be long enough to reach the end of the schedule.
    """

    pruning: PruneConfig = PruneConfig(end_step=100)
    calibration: int = 128
    one_shot: bool = False
    fit: TrainConfig = TrainConfig(steps=150, learning_rate=5e-4)

    def __post_init__(self) -> None:
        _check_least("calibration", self.calibration, 1)
        schedule = self.pruning.schedule
        if self.one_shot and schedule == "adaptive":
            raise UserError(
                "An adaptive schedule watches the validation loss of a training, and one_shot has "
                "none. Leave one of the two out."
            )
        if not self.one_shot:
            _check_schedule(self.pruning, self.fit)


def _check_schedule(pruning: PruneConfig, fit: TrainConfig) -> None:
    if pruning.end_step > fit.steps and pruning.schedule != "constant":
        raise UserError(
            "The pruning schedule must end before its training does. Received: "
            f"pruning.end_step={pruning.end_step}, fit.steps={fit.steps}."
        )


@dataclasses.dataclass(frozen=True)
class QatSection:
    """Quantization-aware training, keeping the zeros of the pruning.

    Args:
        quantization: the scheme that training sees and the file will hold; default that of the
            model it reads, and int8 where that is not quantized.
        calibration: examples of the training split that ranges of static activations begin with.
        learned_ranges: whether the scales of weights are trained as well (LSQ).
        fit: its training.
    """

    quantization: QuantConfig | None = None
    calibration: int = 128
    learned_ranges: bool = False
    fit: TrainConfig = TrainConfig(steps=100, learning_rate=2e-4)

    def __post_init__(self) -> None:
        _check_least("calibration", self.calibration, 1)


@dataclasses.dataclass(frozen=True)
class QuantizeSection:
    """Quantization after training: round to nearest, GPTQ, SmoothQuant.

    Args:
        quantization: the scheme: a recipe's name (`tf-gptopt recipes` lists them), a file with one,
            or its fields; default that of the model it reads, and int8 where that is not quantized.
        calibration: examples of the training split for the schemes that look at text.
    """

    quantization: QuantConfig | None = None
    calibration: int = 128

    def __post_init__(self) -> None:
        _check_least("calibration", self.calibration, 1)


@dataclasses.dataclass(frozen=True)
class ExportSection:
    """The .tflite file.

    Args:
        quantization: the file's scheme; default that of the model it reads, and int8 where that is
            not quantized.
        calibration: examples of the training split for a scheme that looks at text, where no stage
            before it has done so.
    """

    quantization: QuantConfig | None = None
    calibration: int = 128

    def __post_init__(self) -> None:
        _check_least("calibration", self.calibration, 1)


@dataclasses.dataclass(frozen=True)
class DraftSection:
    """A student of the model that is exported, small enough to guess its tokens: `draft.tflite`
    beside `model.tflite`, for speculative decoding.

    A fixed guess is right as often as the target holds it to be likely, so the student learns the
    target's own probabilities (temperature 1) and little from the labels.

    Args:
        layers: how many of the target's blocks it begins with, where `student` says nothing.
        student: what it keeps: a budget or a shape.
        calibration: examples of the training split that importance is measured on.
        distillation: what it learns from the target.
        quantization: the file's scheme.
        fit: its training.
    """

    layers: int = 1
    student: ShrinkConfig | None = None
    calibration: int = 128
    distillation: DistillConfig = DistillConfig(temperature=1.0, alpha=0.9)
    quantization: QuantConfig = QuantConfig()
    fit: TrainConfig = TrainConfig(steps=300, learning_rate=1e-3)

    def __post_init__(self) -> None:
        _check_least("layers", self.layers, 1)
        _check_least("calibration", self.calibration, 1)


@dataclasses.dataclass(frozen=True)
class EvaluateSection:
    """What is measured, and how long.

    Args:
        tokens: held-out tokens that every model is scored on.
        speed_tokens: tokens generated to time decoding.
        threads: processor threads; default all.
        tolerance: how much worse than the teacher's perplexity a recommended file may be
            (0.1 = 10%).
        prompt: what the finished file is asked to complete; default the beginning of a text that
            was held out.
    """

    tokens: int = 32768
    speed_tokens: int = 64
    threads: int | None = None
    tolerance: float = 0.1
    prompt: str | None = None

    def __post_init__(self) -> None:
        _check_least("tokens", self.tokens, 1)
        _check_least("speed_tokens", self.speed_tokens, 1)
        if self.threads is not None:
            _check_least("threads", self.threads, 1)
        if self.tolerance < 0:
            raise UserError(f"tolerance must not be negative. Received: {self.tolerance}.")


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} must be at least {least}. Received: {name}={value}.")
