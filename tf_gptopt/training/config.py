"""How long and how fast to train: `TrainConfig`. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tf_gptopt._errors import UserError, known_arguments, suggest
from tf_gptopt.training.parallel.mesh import Mesh

SCHEDULES = ("constant", "cosine", "linear", "plateau", "wsd")
# Fields that change how a run goes, and not what comes of it
ON_THE_WAY = ("checkpoint_every", "log_every", "profile", "tensorboard", "recompute")
PRECISIONS = ("auto", "float32", "graph_bfloat16", "mixed_bfloat16", "mixed_float16")


@known_arguments
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        steps: optimizer updates.
        batch_size: sequences an update, all replicas together.
        sequence_length: tokens a sequence; None takes the dataset's.
        learning_rate: the peak, reached after the warm-up.
        warmup_steps: updates in which the learning rate rises from 0; None is 5% of the steps.
        schedule: after the warm-up, "cosine", "linear", "constant", "wsd" (stable, then a decay) or
            "plateau" (halved when the smoothed loss stops improving).
        final_learning_rate: where the schedule ends, as a fraction of the peak.
        weight_decay: decoupled decay (AdamW) of matrices; biases and norms never decay.
        beta_1: Adam's decay of the mean gradient.
        beta_2: Adam's decay of the mean squared gradient.
        clip_norm: the longest gradient, all weights together; None does not clip.
        seed: order of the data (initial weights and dropout: `keras.utils.set_random_seed`).
        precision: the dtype policy that the model is built under, or "graph_bfloat16" (see
            `use_precision`); "auto" takes what the processor computes fastest.
        checkpoint_every: seconds between checkpoints; 0 writes one at the end only.
        log_every: updates between two reports.
        decay_fraction: how many of the steps the decay of "wsd" takes.
        plateau_patience: updates without a new best loss after which "plateau" cuts.
        tensorboard: write loss, learning rate, speed and more for TensorBoard, into the folder
            `tensorboard` beside the checkpoints.
        profile: trace a few steps into the folder `profile` beside the checkpoints, and say which
            operations took the time.
        accumulate: microbatches that a batch is computed in, one after the other; more of them need
            less memory and give the same update.
        max_batch_size: sequences an update may grow to, by doubling, while the gradient noise scale
            says that larger batches pay; None keeps `batch_size`.
        mesh: devices to divide the model and the batch among, such as "batch=2,model=2" (see
            `parallel/tensor.py`); None is for `tf.distribute` strategies and one device.
        pipeline: devices to divide the blocks among, with microbatches in flight between them (see
            `parallel/pipeline.py`); not together with `mesh`.
        recompute: keep only the input of every block and compute the rest again for the gradient
            (`GPTModel.recompute`): less memory, a third more time, the same result. Not on a mesh.

    Raises:
        UserError: when a number is out of its range.
    """

    steps: int = 1000
    batch_size: int = 8
    sequence_length: int | None = None
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    schedule: str = "cosine"
    final_learning_rate: float = 0.1
    weight_decay: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.95
    clip_norm: float | None = 1.0
    seed: int = 0
    precision: str = "auto"
    checkpoint_every: float = 30.0
    log_every: int = 10
    decay_fraction: float = 0.2
    plateau_patience: int = 100
    tensorboard: bool = False
    profile: bool = False
    accumulate: int = 1
    max_batch_size: int | None = None
    mesh: str | None = None
    pipeline: int | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "plateau_patience", "accumulate"):
            _check_int(name, getattr(self, name), 1)
        if self.max_batch_size is not None:
            _check_int("max_batch_size", self.max_batch_size, self.batch_size)
        if self.mesh is not None and self.batch_size % (rows := Mesh.parse(self.mesh).batch):
            raise UserError(
                f"The mesh {self.mesh} divides the batch among {rows} rows of devices. Received: "
                f"batch_size={self.batch_size}. Take a multiple of {rows}."
            )
        if self.pipeline is not None:
            _check_int("pipeline", self.pipeline, 2)
            if self.mesh is not None:
                raise UserError(
                    "The devices are either a mesh or a pipeline. Received: "
                    f"mesh={self.mesh!r}, pipeline={self.pipeline}. Leave one of them out."
                )
        if self.sequence_length is not None:
            _check_int("sequence_length", self.sequence_length, 1)
        _check_int("seed", self.seed, 0)
        if self.warmup_steps is not None:
            _check_int("warmup_steps", self.warmup_steps, 0)
        if self.warmup >= self.steps:
            raise UserError(
                "The warm-up must be shorter than the training. Received: "
                f"warmup_steps={self.warmup_steps}, steps={self.steps}. Lower warmup_steps or "
                "leave it out (5% of the steps)."
            )
        for name, low, high in (
            ("learning_rate", 1e-12, 10.0),
            ("final_learning_rate", 0.0, 1.0),
            ("weight_decay", 0.0, 10.0),
            ("beta_1", 0.0, 0.9999999),
            ("beta_2", 0.0, 0.9999999),
            ("checkpoint_every", 0.0, math.inf),
            ("decay_fraction", 1e-12, 1.0),
        ):
            _check_number(name, getattr(self, name), low, high)
        if self.clip_norm is not None:
            _check_number("clip_norm", self.clip_norm, 1e-12, math.inf)
        if self.recompute and self.mesh is not None:
            raise UserError(
                "A mesh keeps its activations. Received: recompute=True with "
                f"mesh={self.mesh!r}. Leave one of them out, or take a pipeline instead of a mesh."
            )
        for name in ("tensorboard", "profile", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is True or False. Received: {getattr(self, name)!r}.")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"Unknown {name} {value!r}.{suggest(str(value), known)}")

    @property
    def warmup(self) -> int:
        """Updates of warm-up, the default worked out."""
        return self.steps // 20 if self.warmup_steps is None else self.warmup_steps

    @property
    def max_accumulate(self) -> int:
        """Microbatches an update may grow to."""
        return self.accumulate * ((self.max_batch_size or self.batch_size) // self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `TrainConfig(**values)` reads them back."""
        return dataclasses.asdict(self)


def _check_int(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UserError(f"{name} must be an integer, {low} or more. Received: {name}={value!r}.")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fine:
        raise UserError(
            f"{name} must be a number from {low:g} to {high:g}. Received: {name}={value!r}."
        )
