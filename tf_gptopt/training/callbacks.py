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

from tf_gptopt._clock import clock
from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.fit_checks import CheckedFit, warn_of
from tf_gptopt.training.cluster import Alone
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.flops import Utilisation
from tf_gptopt.training.guard import NonFiniteGuard, hopeless, weights_are_finite
from tf_gptopt.training.microbatches import UpdateCount, optimizer_of, update_size
from tf_gptopt.training.schedules import PlateauSchedule, learning_rate_of, schedule_of

_MEMORY = 0.95  # of the smoothed loss, per step: about the last twenty count
_AGREE_EVERY = 1.0  # seconds between two agreements of workers, or a step if it takes longer
_PATIENCE = 3  # reports in a row of a model that cannot mend
_LOOK_EVERY = 10  # updates between two looks for skipped ones


@dataclasses.dataclass(frozen=True)
class Progress:
    """A report: `step` of `steps` is done.

    Attributes:
        loss: of the last twenty steps or so, in nats a token.
        tokens_per_second: since this process took its first step.
        seconds_left: at that speed.
        learning_rate: of the last update.
        mfu: model-FLOP utilisation, the share of `peak` that was used; None where it is not known.
        peak: what all processors together can do, in words.
        skipped: updates that were skipped so far, because they were not finite.
        loss_scale: under mixed_float16; None elsewhere.
        batch_size: sequences of the last update.
        gradient_noise_scale: in sequences; None where it is not measured.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    learning_rate: float = math.nan
    mfu: float | None = None
    peak: str = ""
    skipped: int = 0
    loss_scale: float | None = None
    batch_size: int = 0
    gradient_noise_scale: float | None = None

    def __str__(self) -> str:
        """A line for people; what is not known, or has not happened, is left out."""
        parts = [
            f"step {self.step:,}/{self.steps:,}",
            f"loss {self.loss:.4f}",
            f"{self.tokens_per_second:,.0f} tokens/s",
        ]
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.0%}")
        if self.gradient_noise_scale is not None:
            parts.append(f"batch {self.batch_size}  noise scale {self.gradient_noise_scale:.3g}")
        if self.skipped:
            parts.append(f"{self.skipped} skipped")
        if self.loss_scale is not None:
            parts.append(f"loss scale {self.loss_scale:g}")
        return "  ".join([*parts, f"{clock(self.seconds_left)} left"])


class ProgressLine:
    """Prints reports on stderr: one line rewritten in place on a terminal, else one every 10 s."""

    def __init__(self) -> None:
        self._printed = -math.inf
        self._peak = ""

    def __call__(self, report: Progress) -> None:
        if report.mfu is not None and report.peak != self._peak:
            self._peak = report.peak
            print(f"MFU 100% is {report.peak}", file=sys.stderr, flush=True)
        last = report.step >= report.steps
        if sys.stderr.isatty():
            print(f"\r{report}\033[K", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or time.monotonic() - self._printed >= 10:
            self._printed = time.monotonic()
            print(report, file=sys.stderr, flush=True)


@dataclasses.dataclass(eq=False)
class RunState(tf.train.experimental.PythonState):
    """Where a run stands, beside its variables; a part of every checkpoint.

    Attributes:
        step: updates done or skipped.
        batches: batches of the dataset that went into them.
        steps: of the whole run, as it was planned when it was saved; 0 before.
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
    steps: int = 0
    batches: int = 0

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
        values = json.loads(string_value)
        for name, value in {"batches": values["step"], **values}.items():
            setattr(self, name, value)


class TrainingLoop(keras.callbacks.Callback):
    """Counts steps in a `RunState`, reports and saves between them.

    Put it last, so that a checkpoint holds what other callbacks did at the same step. The loss is
    fetched from the device only for a report: Keras's running mean starts anew after each.

    Args:
        state: counted up, from where it stands.
        config: of the run.
        tokens_per_batch: labels in a global batch.
        on_progress: called with a `Progress`.
        save: writes a checkpoint; None for a run without.
        utilisation: of the model; None leaves it out of the reports.
        workers: that train together. The clock of the chief and the signals that any of them gets
            count for all: they agree at every report, and every second or so in between.
    """

    _supports_tf_logs = True  # leave the loss on the device

    def __init__(
        self,
        state: RunState,
        config: TrainConfig,
        tokens_per_batch: int,
        on_progress: Callable[[Progress], Any],
        save: Callable[[], Any] | None,
        utilisation: Utilisation | None = None,
        workers: Alone | None = None,
    ) -> None:
        super().__init__()
        self.state, self.config = state, config
        self.tokens_per_batch, self.on_progress, self.save = tokens_per_batch, on_progress, save
        self.utilisation = utilisation
        self.requested = 0  # the signal that this process was sent
        self.interrupted = 0  # the signal that all workers stop for
        self.workers = workers or Alone()
        self._agreement, self._due = state.step + 1, False  # when to ask; a checkpoint is due
        self.failures = 0  # reports in a row without finite weights, or a loss that nothing skips
        self._first = self._window = state.step
        self._first_batch = state.batches
        self._guard = NonFiniteGuard()
        self._logs: dict[str, Any] = {}
        self._timed_from: tuple[int, float] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._begun = self._now = self._saved = time.perf_counter()
        self._agreed = self.state.step, self._begun
        schedule = schedule_of(self.model.optimizer)
        self._plateau = schedule if isinstance(schedule, PlateauSchedule) else None
        self._updated, self._sum = True, tf.zeros([])
        self._count = UpdateCount(self.model, self.config.accumulate)
        self._guard.begin(self.model)
        self._fresh = True  # no microbatch since the last report

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._fresh or (self._plateau and self._updated):
            self.model.reset_metrics()
        self._fresh = False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        before, state, every = self.state.step, self.state, self.config.log_every
        self.workers.progress()
        self._logs = logs
        updates, batches = self._count.after(batch + 1)  # with steps_per_execution, batch leaps
        state.step, seen = self._first + updates, self._first_batch + batches
        state.tokens += (seen - state.batches) * self.tokens_per_batch
        state.batches = seen
        self._updated = state.step > before
        if self._plateau and self._updated:  # it is told every update's own loss
            self._plateau.observe(logs["loss"], state.step - before)
            self._sum += (state.step - before) * tf.cast(logs["loss"], tf.float32)
        now = time.perf_counter()
        state.seconds += now - self._now
        self._now = now
        if not self._updated:
            return  # amid an update
        if self._timed_from is None:
            self._timed_from = state.tokens, now  # the first step traces and compiles
        due = state.step >= self.config.steps or state.step // every > before // every
        if due or state.step >= self._agreement:
            self._agree()
        if due or self.interrupted:
            self._report()
        elif state.step // _LOOK_EVERY > before // _LOOK_EVERY:
            self._guard.look(float(self._logs["loss"]), state.step)
        if self.interrupted or state.step >= self.config.steps:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        optimizer = optimizer_of(self.model)
        if getattr(optimizer, "max_accumulate", 1) > 1:  # the next run begins this update anew;
            optimizer.forget_microbatches()  # Keras would have it made of what is there

    def on_train_end(self, logs: Any = None) -> None:
        if self.state.step > self._window:  # another callback stopped the training
            self._report()
        if not isinstance(self.model, CheckedFit):  # whose own `fit` does
            warn_of(self._logs.get("hard_loss", self._logs.get("loss")), self.model)

    def _report(self) -> None:
        state, config = self.state, self.config
        steps, self._window = state.step - self._window, state.step
        loss = float(self._sum / steps if self._plateau else self._logs["loss"])
        self._sum, self._fresh = tf.zeros([]), True
        skips = self._guard.look(loss, state.step)
        # a skipped update has done no harm, however its loss looks; broken weights never mend
        finite = math.isfinite(loss)
        if not weights_are_finite(self.model) or not (finite or skips):
            self.failures += 1
            if self.failures >= _PATIENCE or state.step >= config.steps:
                raise UserError(hopeless(self.model, loss, state.step, skips))
            return  # and no checkpoint: the newest one is from before
        self.failures = 0
        if finite:
            state.add_loss(loss, steps)
        size, noise = update_size(self.model, config)
        start, since = self._timed_from
        if state.tokens > start:
            rate = (state.tokens - start) / (self._now - since)
        else:
            tokens = (state.batches - self._first_batch) * self.tokens_per_batch
            rate = tokens / (self._now - self._begun)
        state.tokens_per_second = rate
        batches_left = max(0, config.steps - state.step) * size / config.batch_size
        left = batches_left * self.tokens_per_batch / rate
        self.on_progress(
            Progress(
                state.step,
                config.steps,
                state.loss,
                rate,
                left,
                learning_rate_of(self.model.optimizer),
                self.utilisation(rate) if self.utilisation else None,
                self.utilisation.why if self.utilisation else "",
                skips.total if skips else 0,
                skips.loss_scale if skips else None,
                size,
                noise,
            )
        )
        if self.save and self._due and state.step < config.steps and not self.interrupted:
            self.save()
            self._saved = time.perf_counter()

    def _agree(self) -> None:
        """Whether to stop and whether to save, the same on all workers, and when to ask again."""
        config, ahead = self.config, 1
        due = config.checkpoint_every and self._now - self._saved >= config.checkpoint_every
        if self.workers.count > 1:
            step, then = self._agreed
            ahead = max(1, int((self.state.step - step) * _AGREE_EVERY / (self._now - then)))
            self._agreed = self.state.step, self._now
        chief = self.workers.is_chief
        interrupts, terminations, due, ahead = self.workers.total(
            [
                self.requested == signal.SIGINT,
                self.requested == signal.SIGTERM,
                chief and bool(due),
                chief and ahead,
            ]
        )
        self._due, self._agreement = bool(due), self.state.step + ahead
        if interrupts or terminations:
            self.interrupted = signal.SIGTERM if terminations else signal.SIGINT


class Interruption:
    """Turns the first Ctrl-C or SIGTERM of a block into `loop.requested`, so that a step ends
    first; the second one interrupts at once."""

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) is default:  # a handler of the caller's own stays
                self._before[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, *_: Any) -> None:
        self._loop.requested = number
        self.__exit__()

    def __exit__(self, *_: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
