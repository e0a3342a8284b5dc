"""Where a training step's time goes: a trace of a few steps, and its summary as text."""

from __future__ import annotations

import collections
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._files import write_text
from tf_gptopt._keras import keras

SUMMARY = "summary.txt"
_TOP = 20


class Profile(keras.callbacks.Callback):
    """Traces a few steps and says which operations took their time.

    ```python
    model.fit(data, callbacks=[Profile("profile")])
    ```

    The summary is written to `summary.txt` in the folder and handed to `on_summary` when the
    training ends; the trace beside it is what TensorBoard's profiler and xprof read. Tracing slows
    the traced steps a little. In a cluster the chief alone traces.

    Args:
        folder: made if it is absent.
        start: batches before the trace: the first ones compile.
        steps: batches traced; with `steps_per_execution` at least one execution.
        on_summary: called with the text; None prints it on stderr.

    Raises:
        UserError: when the folder cannot be written, or a profiler is at work already.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        start: int = 5,
        steps: int = 5,
        on_summary: Callable[[str], Any] | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.start, self.steps = Path(folder), start, steps
        self.on_summary = on_summary or (lambda text: print(f"\n{text}", file=sys.stderr))
        self._began: tuple[int, float] | None = None
        self._done, self._seen = 0, 0
        self._seconds = 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._seen += batch + 1 - self._batch
        self._batch = batch + 1
        if self._began is not None and self._seen >= self._began[0] + self.steps:
            self._stop()
        elif self._began is None and not self._done and self._seen >= self.start:
            self._begin()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._batch = 0

    def on_train_end(self, logs: Any = None) -> None:
        self._stop()
        if self._done:
            text = summarize(self.folder, self._done, self._seconds)
            write_text(self.folder / SUMMARY, text + "\n")
            self.on_summary(text)
            self._done = 0

    def _begin(self) -> None:
        if not self.model.distribute_strategy.extended.should_save_summary:
            return
        self._wait()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tf.profiler.experimental.start(str(self.folder))
        except tf.errors.AlreadyExistsError:
            raise UserError(
                "A profiler is at work already in this process, and there can be one. Stop it, or "
                "leave Profile (TrainConfig.profile) out."
            ) from None
        except OSError as error:
            raise UserError(
                f"The folder {self.folder} cannot be written ({error.strerror}). Choose another "
                "one or mend its permissions."
            ) from None
        self._began = self._seen, time.perf_counter()

    def _stop(self) -> None:
        if self._began is None:
            return
        self._wait()
        before, since = self._began
        self._seconds, self._done = time.perf_counter() - since, self._seen - before
        self._began = None
        tf.profiler.experimental.stop()

    def _wait(self) -> None:
        self.model.optimizer.iterations.numpy()  # an accelerator may be behind


def summarize(folder: str | os.PathLike, steps: int, seconds: float) -> str:
    """The newest trace in `folder` as a table: kinds of operations by their own time.

    Args:
        folder: where `tf.profiler.experimental.start` wrote.
        steps: training steps in the trace.
        seconds: that they took.

    Raises:
        UserError: when there is no trace, or none with an operation.
    """
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    traces = sorted(Path(folder).rglob("*.xplane.pb"), key=os.path.getmtime)
    if not traces:
        raise UserError(f"There is no trace in {folder}. Train with Profile({str(folder)!r}).")
    space = xplane_pb2.XSpace()
    space.ParseFromString(traces[-1].read_bytes())
    rows = operations(space)
    if not rows:
        raise UserError(f"The trace {traces[-1]} has no operation: nothing ran while it was made.")
    total = sum(row.seconds for row in rows)
    lines = [
        f"{steps} steps of {seconds / steps * 1e3:,.0f} ms; in a step, operations' own time on the "
        "thread or stream that ran them:",
        f"{'ms':>10}{'share':>8}{'calls':>8}  operation, and its dearest one",
    ]
    for row in rows[:_TOP]:
        lines.append(
            f"{row.seconds / steps * 1e3:>10,.2f}{row.seconds / total:>8.1%}"
            f"{row.calls / steps:>8,.0f}  {row.kind:<28}  {row.dearest}"
        )
    if rest := rows[_TOP:]:
        seconds_left = sum(row.seconds for row in rest)
        lines.append(
            f"{seconds_left / steps * 1e3:>10,.2f}{seconds_left / total:>8.1%}"
            f"{sum(row.calls for row in rest) / steps:>8,.0f}  {len(rest)} more kinds"
        )
    return "\n".join(lines)


class Operation:
    """All calls of one kind of operation: `kind`, `seconds`, `calls`, and the `dearest` by name."""

    def __init__(self, kind: str) -> None:
        self.kind, self.seconds, self.calls = kind, 0.0, 0
        self._by_name: collections.Counter[str] = collections.Counter()

    def add(self, name: str, seconds: float) -> None:
        """Count a call."""
        self.seconds += seconds
        self.calls += 1
        self._by_name[name] += seconds

    @property
    def dearest(self) -> str:
        """The operation's name in the graph that took the most time."""
        return self._by_name.most_common(1)[0][0]


def operations(space: Any) -> list[Operation]:
    """Kinds of operations in a trace (an `XSpace`), the dearest first.

    An operation's own time is that between its begin and its end less that of operations inside it.
    On CPUs an operation is what TensorFlow ran under its name in the graph ("a/MatMul:MatMul"), an
    island of XLA under the name of its function; on accelerators a kernel, under the name of the
    operation it belongs to where the trace has it.
    """
    kinds: dict[str, Operation] = {}
    for plane in space.planes:
        device = plane.name.startswith("/device:")
        if not device and plane.name != "/host:CPU":
            continue
        for line in plane.lines:
            events = [
                (event.offset_ps, event.offset_ps + event.duration_ps, name)
                for event in line.events
                if (name := _name(plane, event, device))
            ]
            for (path, kind), picoseconds in _own_times(events):
                kinds.setdefault(kind, Operation(kind)).add(path, picoseconds / 1e12)
    return sorted(kinds.values(), key=lambda operation: -operation.seconds)


def _name(plane: Any, event: Any, device: bool) -> tuple[str, str] | None:
    """Its name and its kind; None for an event that is no operation."""
    metadata = plane.event_metadata[event.metadata_id]
    stats = {plane.stat_metadata[stat.metadata_id].name: stat for stat in event.stats}

    def text(stat: str) -> str:
        return stats[stat].str_value or plane.stat_metadata[stats[stat].ref_value].name

    path, _, kind = (text("tf_op") if "tf_op" in stats else metadata.name).rpartition(":")
    if path and kind and (device or metadata.display_name == kind):
        return path, kind
    if "hlo_module" in stats:  # "a_inference__gelu_1164__.1", from the function's name
        island = re.sub(r"^a_inference_+|_+\d+_+(\.\d+)?$", "", text("hlo_module"))
        return metadata.name, f"XLA {island}"
    return (metadata.name, metadata.name) if device else None


def _own_times(
    events: Iterable[tuple[int, int, tuple[str, str]]],
) -> Iterable[tuple[tuple[str, str], int]]:
    """What is left of each of a thread's events when those inside it are taken away."""
    stack: list[list[Any]] = []  # end, name, own time
    for begin, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while stack and stack[-1][0] <= begin:
            yield tuple(stack.pop()[1:])
        if stack:
            stack[-1][2] -= end - begin
        stack.append([end, name, end - begin])
    while stack:
        yield tuple(stack.pop()[1:])
