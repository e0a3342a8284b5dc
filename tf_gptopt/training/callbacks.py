"""What happens between training steps: reports, checkpoints, Ctrl-C, the end of a hopeless run."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.training.config import TrainConfig

_MEMORY = 0.95  # of the smoothed loss, per step: about the last twenty count
_PATIENCE = 3  # such reports, and the training has diverged


@dataclasses.dataclass(frozen=True)
class Progress:
    """A report: `step` of `steps` is done.

    Attributes:
        loss: of the last twenty steps or so, in nats a token.
        tokens_per_second: since this process took its first step.
        seconds_left: at that speed.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


class ProgressLine:
    """Prints reports on stderr: one line rewritten in place on a terminal, else one every 10 s."""

    def __init__(self) -> None:
        self._printed = -math.inf

    def __call__(self, report: Progress) -> None:
        minutes, seconds = divmod(round(report.seconds_left), 60)
        line = (
            f"step {report.step:,}/{report.steps:,}  loss {report.loss:.4f}  "
            f"{report.tokens_per_second:,.0f} tokens/s  {minutes}:{seconds:02d} left"
        )
        last = report.step >= report.steps
        if sys.stderr.isatty():
            print(f"\r{line}\033[K", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or time.monotonic() - self._printed >= 10:
            self._printed = time.monotonic()
            print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(eq=False)
class RunState(tf.train.experimental.PythonState):
    """Where a run stands, beside its variables; a part of every checkpoint.

    Attributes:
        step: updates done.
        tokens: labels seen.
        seconds: spent in training, all processes of the run together.
        smooth, weight: of the smoothed loss, which is their ratio.
        tokens_per_second: at the last report.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    smooth: float = 0.0
    weight: float = 0.0
    tokens_per_second: float = 0.0

    @property
    def loss(self) -> float:
        return self.smooth / self.weight if self.weight else math.nan

    def add_loss(self, loss: float, steps: int) -> None:
        """Let the mean `loss` of `steps` steps count."""
        keep = _MEMORY**steps
        self.smooth = keep * self.smooth + (1 - keep) * loss
        self.weight = keep * self.weight + (1 - keep)

    def serialize(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def deserialize(self, string_value: bytes | str) -> None:
        for name, value in json.loads(string_value).items():
            setattr(self, name, value)


class TrainingLoop(keras.callbacks.Callback):
    """Counts steps in a `RunState`, reports and saves between them.

    Put it last, so that a checkpoint holds what other callbacks did at the same step. The loss is
    fetched from the device only for a report: Keras's running mean starts anew after each.

    Args:
        state: counted up, from where it stands.
        config: of the run.
        tokens_per_step: labels in a global batch.
        on_progress: called with a `Progress`.
        save: writes a checkpoint; None for a run without.
    """

    _supports_tf_logs = True  # leave the loss on the device

    def __init__(
        self,
        state: RunState,
        config: TrainConfig,
        tokens_per_step: int,
        on_progress: Callable[[Progress], Any],
        save: Callable[[], Any] | None,
    ) -> None:
        super().__init__()
        self.state, self.config = state, config
        self.tokens_per_step, self.on_progress, self.save = tokens_per_step, on_progress, save
        self.interrupted = False
        self.failures = 0  # reports in a row without a finite loss or weight
        self._first = self._window = state.step
        self._logs: dict[str, Any] = {}
        self._timed_from: tuple[int, float] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._begun = self._now = self._saved = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.state.step == self._window:
            self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        before, state, every = self.state.step, self.state, self.config.log_every
        self._logs = logs
        state.step = self._first + batch + 1  # with steps_per_execution, batch leaps
        state.tokens += (state.step - before) * self.tokens_per_step
        now = time.perf_counter()
        state.seconds += now - self._now
        self._now = now
        if self._timed_from is None:
            self._timed_from = state.step, now  # the first step traces and compiles
        done = state.step >= self.config.steps or self.interrupted
        if done or state.step // every > before // every:
            self._report()
        if self.interrupted:
            self.model.stop_training = True

    def on_train_end(self, logs: Any = None) -> None:
        if self.state.step > self._window:  # another callback stopped the training
            self._report()

    def _report(self) -> None:
        state, config = self.state, self.config
        steps, self._window = state.step - self._window, state.step
        loss = float(self._logs["loss"])
        if not math.isfinite(loss) or not weights_are_finite(self.model):
            self.failures += 1
            if self.failures >= _PATIENCE or state.step >= config.steps:
                raise UserError(_diverged(loss, state.step, config))
            return  # and no checkpoint: the newest one is from before
        self.failures = 0
        state.add_loss(loss, steps)
        start, since = self._timed_from
        if state.step > start:
            rate = (state.step - start) * self.tokens_per_step / (self._now - since)
        else:
            rate = steps * self.tokens_per_step / (self._now - self._begun)
        state.tokens_per_second = rate
        left = max(0, config.steps - state.step) * self.tokens_per_step / rate
        self.on_progress(Progress(state.step, config.steps, state.loss, rate, left))
        due = config.checkpoint_every and self._now - self._saved >= config.checkpoint_every
        if self.save and due and state.step < config.steps and not self.interrupted:
            self.save()
            self._saved = time.perf_counter()


class Interruption:
    """Turns the first Ctrl-C of a block into `loop.interrupted`, so that a step ends first; the
    second one interrupts at once."""

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop
        self._before: Any = None

    def __enter__(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self._loop.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def weights_are_finite(model: keras.Model) -> bool:
    """Whether no trainable weight is NaN or infinite."""
    sums = [tf.cast(tf.reduce_sum(weight), tf.float32) for weight in model.trainable_variables]
    return math.isfinite(float(tf.add_n(sums)))


def _diverged(loss: float, step: int, config: TrainConfig) -> str:
    what = f"The loss is {loss}" if not math.isfinite(loss) else "Weights are NaN or infinite"
    return (
        f"{what} at step {step}: the training has diverged. Lower learning_rate (it is "
        f"{config.learning_rate:g}), raise warmup_steps ({config.warmup}) or set clip_norm to 1; "
        "under mixed_float16 use float32 or mixed_bfloat16. A label outside the vocabulary makes "
        "the loss NaN too. Checkpoints are from before and stay."
    )
