"""A batch through the stages of a pipeline, microbatch by microbatch, as one graph.

A stage's forward or backward pass on one microbatch is a *task*. Control dependencies make each
device do its tasks in the order of `schedule`, and TensorFlow's executor runs the devices side by
side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.token_means import averages_tokens, count

if TYPE_CHECKING:
    from tf_gptopt.training.parallel.pipeline import PipelinedGPT

FORWARD, BACKWARD = "forward", "backward"


@dataclasses.dataclass
class Work:
    """What a stage keeps of a microbatch between its forward and its backward task."""

    tape: tf.GradientTape
    sources: list[tf.Tensor]
    output: tf.Tensor


class PipelineStep:
    """The graph of one batch: its tasks in order, and the sums that come of them."""

    def __init__(self, model: PipelinedGPT, x: Any, y: Any, weights: Any, scale: Callable) -> None:
        self.model, self.place, self.scale = model, model.placement, scale
        count = self.place.microbatches
        self.labels = split_batch(y, count)
        self.weights = [None] * count if weights is None else split_batch(weights, count)
        self.shares = _shares(model.loss, self.labels)
        self.inputs = {(0, m): part for m, part in enumerate(split_batch(x, count))}
        self.upstream: dict[tuple[int, int], tf.Tensor] = {}
        self.work: dict[tuple[int, int], Work] = {}
        self.losses: list[tf.Tensor] = []
        self.sums: dict[Any, Any] = {}  # gradients by variable, and that of the table's copy
        self.last_task: list[list[tf.Tensor]] = [[] for _ in self.place.stages]

    def run(self) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Loss and gradients of the batch."""
        with tf.GradientTape() as tape:
            self.table = self.place.table()
        for stage, microbatch, task in schedule(len(self.place.stages), self.place.microbatches):
            with tf.device(self.place.devices[stage]):
                (self._forward if task == FORWARD else self._backward)(stage, microbatch)
        if self.table is not None:  # its use in the logits; the sums have that in the embedding
            with tf.device(self.place.devices[0]):
                variables = self.place.embedding.trainable_variables
                upstream = tf.identity(self.sums.pop(self.table.ref()))
                self._add(variables, tape.gradient(self.table, variables, upstream))
        gradients = []
        for variable in self.model.trainable_variables:
            with tf.device(variable.device):
                gradients.append(tf.convert_to_tensor(self.sums[variable.ref()]))
        return tf.add_n(self.losses), gradients

    def _forward(self, stage: int, m: int) -> None:
        last = stage == len(self.place.stages) - 1
        x = self._in_turn(stage, self.inputs.pop((stage, m)))
        sources = ([x] if stage else []) + ([self.table] if last and self.place.tied else [])
        with tf.GradientTape() as tape:
            tape.watch(sources)
            output = self.place.forward(stage, x, self.table, training=True)
            if last:
                output = self.scale(self._loss(m, output))
        self.work[stage, m] = Work(tape, sources, output)
        if last:
            self.upstream[stage, m] = tf.ones_like(output)
        else:
            self.inputs[stage + 1, m] = output
        self.last_task[stage] = [output]

    def _loss(self, m: int, logits: tf.Tensor) -> tf.Tensor:
        labels = tf.identity(self.labels[m])
        loss = self.model.loss(labels, logits, self.weights[m]) * self.shares[m]
        self.losses.append(loss)
        self.model.compiled_metrics.update_state(labels, logits, self.weights[m])
        return loss

    def _backward(self, stage: int, m: int) -> None:
        work = self.work.pop((stage, m))
        upstream = self._in_turn(stage, self.upstream.pop((stage, m)))
        to = [*work.sources, *self.place.trainable_variables(stage)]
        gradients = work.tape.gradient(work.output, to, upstream)
        if stage:  # the first source is what the stage before has sent
            self.upstream[stage - 1, m] = gradients[0]
            to, gradients = to[1:], gradients[1:]
        self.last_task[stage] = self._add(to, gradients)

    def _in_turn(self, stage: int, tensor: tf.Tensor) -> tf.Tensor:
        """`tensor` on the current device, once the stage's last task is done."""
        with tf.control_dependencies(self.last_task[stage]):
            return tf.identity(tensor)

    def _add(self, to: Sequence[Any], gradients: Sequence[Any]) -> list[tf.Tensor]:
        """Add to the sums; returns what they are now."""
        for target, gradient in zip(to, gradients, strict=True):
            before = self.sums.get(target.ref())
            self.sums[target.ref()] = gradient if before is None else _plus(before, gradient)
        now = [self.sums[target.ref()] for target in to]
        return [total.values if isinstance(total, tf.IndexedSlices) else total for total in now]


def schedule(stages: int, microbatches: int) -> Iterator[tuple[int, int, str]]:
    """Tasks `(stage, microbatch, forward or backward)`, each after those that it waits for.

    A stage's own tasks are in 1F1B order: as many forward tasks as there are stages from it to the
    last, then one backward and one forward task in turn.
    """
    queues = []
    for stage in range(stages):
        ahead = min(stages - stage, microbatches)
        queue = [(FORWARD, m) for m in range(ahead)]
        for m in range(microbatches):
            queue.append((BACKWARD, m))
            if m + ahead < microbatches:
                queue.append((FORWARD, m + ahead))
        queues.append(queue)
    done = set()
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                task, m = queue[0]
                if task == FORWARD:
                    ready = stage == 0 or (stage - 1, m, FORWARD) in done
                else:
                    ready = stage == stages - 1 or (stage + 1, m, BACKWARD) in done
                if not ready:
                    break
                done.add((stage, m, task))
                yield stage, m, task
                queue.pop(0)


def split_batch(x: Any, count: int) -> list[tf.Tensor]:
    """`count` parts of the first axis, as equal as can be."""
    x = tf.convert_to_tensor(x)
    rows = x.shape[0] or tf.shape(x)[0]
    if isinstance(rows, int) and rows < count:
        raise UserError(
            f"A batch of {rows} sequences cannot be divided into {count} microbatches. Take a "
            "larger batch or fewer microbatches."
        )
    return [x[rows * m // count : rows * (m + 1) // count] for m in range(count)]


def _shares(loss: keras.losses.Loss, labels: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """How much each microbatch's loss counts in the batch's."""
    if loss.reduction == keras.losses.Reduction.SUM and not averages_tokens(loss):
        return [tf.ones([]) for _ in labels]
    sizes = [count(loss, part) for part in labels]
    total = tf.add_n(sizes)
    return [tf.math.divide_no_nan(size, total) for size in sizes]


def _plus(a: Any, b: Any) -> Any:
    """The sum of two gradients, sparse when both are."""
    if isinstance(a, tf.IndexedSlices) and isinstance(b, tf.IndexedSlices):
        values, indices = tf.concat([a.values, b.values], 0), tf.concat([a.indices, b.indices], 0)
        return tf.IndexedSlices(values, indices, a.dense_shape)
    return tf.convert_to_tensor(a) + tf.convert_to_tensor(b)
