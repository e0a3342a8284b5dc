"""Layer placement: the blocks of a GPT on several devices, with microbatches in flight.

Each stage, a run of blocks with their weights and moments, lives on a device of its own, and a
batch passes through the stages in microbatches: while the second stage works on the first
microbatch, the first stage works on the second (GPipe, Huang et al. 2019, arXiv:1811.06965). The
gradients are summed over the microbatches and the weights updated once, so the result is that of
the plain model. Each stage takes turns between forward and backward passes as early as it can
(1F1B: PipeDream, Harlap et al. 2018, arXiv:1806.03377, with GPipe's one update), so that stage s of
S keeps the activations of at most S - s microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._keras import keras
from tf_gptopt.models.fit_checks import check_label_shape
from tf_gptopt.models.gpt import GPTModel, is_wrapped, require_gpt, wrap_graph
from tf_gptopt.models.recompute import cut, recomputed
from tf_gptopt.models.token_means import count, weigh
from tf_gptopt.training.memory import split_blocks
from tf_gptopt.training.parallel.mesh import Mesh
from tf_gptopt.training.parallel.stages import PipelineStep


def pipeline(
    model: GPTModel,
    stages: int | None = None,
    *,
    devices: Sequence[str] | None = None,
    microbatches: int = 4,
) -> PipelinedGPT:
    """A copy of `model` whose blocks are spread over devices and train on microbatches.

    ```python
    piped = pipeline(GPTModel.from_preset("gpt2"), stages=4, microbatches=16)
    piped.compile(adamw(steps=2000), loss=NextTokenLoss())
    piped.fit(dataset)
    model = unpipeline(piped)
    ```

    Args:
        model: stays untouched.
        stages: number of devices, the first so many GPUs (or logical CPUs) of this machine.
        devices: their names instead, `["GPU:0", "GPU:1"]`.
        microbatches: parts of a batch. Devices idle for (stages - 1) of (microbatches + stages - 1)
            turns, so several times the stages is good, as long as a part keeps a device busy.

    Raises:
        UserError: when there are too few devices or blocks, or a strategy with replicas is active.
    """
    require_gpt(model)
    if is_wrapped(model):
        raise UserError(
            "A pruned or quantization-aware model cannot be a pipeline. Take the wrappers off with "
            "strip_pruning or strip_quantization, or train it on one device or replicas."
        )
    devices = _devices(stages, devices)
    if not isinstance(microbatches, int) or microbatches < 1:
        raise UserError(f"microbatches must be 1 or more. Received: {microbatches!r}.")
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1 or model.distribute_strategy.num_replicas_in_sync > 1:
        raise UserError(
            "A pipeline has all devices to itself and does not combine with a tf.distribute "
            "strategy. Build the model outside of the strategy's scope."
        )
    blocks = split_blocks(model.config.num_layers, len(devices))
    owner = {
        f"block_{i}": devices[s] for s, (first, end) in enumerate(blocks) for i in range(first, end)
    }

    def device_of(name: str) -> str:
        block = "_".join(name.split("_")[:2])
        return owner.get(block, devices[0 if "embedding" in name else -1])

    graph = _copy_graph(model, device_of)
    copy = PipelinedGPT.from_gpt_config(
        model.config, graph=(graph.inputs[0], graph.outputs[0]), name=model.name
    )
    _copy_weights(model, copy)
    copy.recompute = model.recompute
    copy.placement = Placement(copy, devices, microbatches)
    return copy


def unpipeline(model: GPTModel) -> GPTModel:
    """A plain copy of a pipelined model, on the default device."""
    graph = _copy_graph(require_gpt(model), lambda _: "")
    return _copy_weights(model, wrap_graph(graph, model.config, name=model.name))


class PipelinedGPT(GPTModel):
    """A `GPTModel` over several devices; `pipeline` makes one. It compiles, fits, evaluates,
    generates and gives checkpoints as any other. `unpipeline` it to transform or save it whole.

    In `fit` the loss of each microbatch is computed on the last device, so the logits of a batch
    are never whole. A loss that counts its labels, as `NextTokenLoss`, is averaged over the labels
    of the batch, any other one over its sequences.
    """

    placement: Placement

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.compile`; XLA cannot compile a step over several devices as a whole."""
        if kwargs.get("jit_compile"):
            raise UserError(
                "jit_compile=True compiles for one device. Leave it out: the costly parts of a "
                "block are compiled on their own."
            )
        super().compile(*args, **kwargs)
        if not isinstance(self.loss, keras.losses.Loss):
            raise UserError(
                "A pipeline needs to know how its loss averages: an instance of keras.losses.Loss, "
                f"for example NextTokenLoss(). Received: loss={self.loss!r}."
            )

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        x, table = inputs, self.placement.table()
        for stage in range(len(self.placement.stages)):
            with tf.device(self.placement.devices[stage]):
                x = self.placement.forward(stage, tf.identity(x), table, training)
        return x

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        check_label_shape(y, tf.TensorShape([*x.shape, self.config.vocab_size]), self.loss)
        loss, gradients = self.loss_and_gradients(x, y, sample_weight)
        counted = count(self.loss, y)
        weigh(self.optimizer, counted)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.placement.loss.update_state(loss, counted)
        return {metric.name: metric.result() for metric in self.metrics}

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        logits = self(x, training=False)
        self.placement.loss.update_state(self.loss(y, logits, sample_weight), count(self.loss, y))
        self.compiled_metrics.update_state(y, logits, sample_weight)
        return {metric.name: metric.result() for metric in self.metrics}

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The mean loss, then what `compile` was given."""
        return [self.placement.loss, *self.compiled_metrics.metrics] if self._is_compiled else []

    @tf.autograph.experimental.do_not_convert
    def loss_and_gradients(
        self, x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The compiled loss of a batch, a scalar, and its gradients by `trainable_variables`."""
        scale = getattr(self.optimizer, "get_scaled_loss", lambda loss: loss)
        step = PipelineStep(self, x, y, sample_weight, scale)
        loss, gradients = step.run()
        if hasattr(self.optimizer, "get_unscaled_gradients"):
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        # a loss can be NaN and its gradient finite: then the optimizer is to know
        shift = tf.where(tf.math.is_finite(loss), 0.0, float("nan"))
        with tf.device(gradients[-1].device):
            gradients[-1] += tf.cast(shift, gradients[-1].dtype)
        return loss, gradients


class Placement:
    """Which part of a model is where.

    Attributes:
        devices: of each stage.
        stages: of each the parts, one after another: Functional models that share the layers of the
            whole one. `front` maps token ids to the residual stream `(batch, time, width)`, each
            block maps it on, and `back` maps it to logits.
        microbatches: parts of a batch.
        loss: mean over labels, for reports; here because a metric of the model is among its
            weights.
    """

    def __init__(self, model: GPTModel, devices: Sequence[str], microbatches: int) -> None:
        self.devices, self.microbatches = list(devices), microbatches
        self.loss = keras.metrics.Mean(name="loss")
        self.model, self.tied = model, model.config.tie_embeddings
        self.embedding = model.base_layer("token_embedding")
        self.front, blocks, self.back = cut(model)
        split = split_blocks(len(blocks), len(devices))
        self.stages = [blocks[first:end] for first, end in split]
        self.stages[0].insert(0, self.front)
        self.stages[-1].append(self.back)

    def trainable_variables(self, stage: int) -> list[tf.Variable]:
        """A stage's weights."""
        return [variable for part in self.stages[stage] for variable in part.trainable_variables]

    def table(self) -> tf.Tensor | None:
        """The token table of the first stage, copied to the last one; None when logits have their
        own."""
        if not self.tied:
            return None
        with tf.device(self.devices[0]):
            _, table = self.embedding(tf.zeros([1, 1], tf.int32))
        with tf.device(self.devices[-1]):
            return tf.identity(table)

    def forward(self, stage: int, x: tf.Tensor, table: Any, training: bool | None) -> tf.Tensor:
        """One stage's work, on whatever device is current."""
        for part in self.stages[stage]:
            if part is self.front:
                x, _ = part(x, training=training)
            elif part is self.back and self.tied:
                x = part([x, table], training=training)
            elif part is not self.back and training and self.model.recompute:
                x = recomputed(part)(x)
            else:
                x = part(x, training=training)
        return x


# Copies of models, layer by layer


def _copy_graph(model: GPTModel, device_of: Callable[[str], str]) -> keras.Model:
    """The model's graph with new layers, their variables on `device_of` the layer's name."""

    def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
        copy = type(layer).from_config(layer.get_config())
        with tf.device(device_of(layer.name)), tf.name_scope(layer.name):
            if layer.built and not copy.built:
                copy.build(layer.input_shape)
            for part in copy._flatten_layers():
                random = getattr(part, "_random_generator", None)
                if random is not None:
                    random._maybe_init()
        return copy

    return keras.models.clone_model(model, clone_function=copy_layer)


def _copy_weights(source: GPTModel, target: GPTModel) -> GPTModel:
    target.tokenizer, target.sampler = source.tokenizer, source.sampler
    for layer in source.layers:
        target.get_layer(layer.name).set_weights(layer.get_weights())
    return target


def _devices(stages: int | None, names: Sequence[str] | None) -> list[str]:
    """One device for each stage."""
    if (stages is None) == (names is None):
        raise UserError("Give either stages, a number, or devices, a list of names.")
    if names is None:
        if not isinstance(stages, int) or stages < 2:
            raise UserError(f"A pipeline has two stages or more. Received: {stages!r}.")
        try:
            return Mesh(model=stages).devices()[0]
        except UserError:
            devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
            raise UserError(
                f"{stages} stages need as many devices. Found: {len(devices)}. Take fewer stages. "
                "To try it without GPUs, divide the CPU at the very start of the program, before "
                f"TensorFlow computes anything: Mesh(model={stages}).devices()."
            ) from None
    known = {d.name.rpartition("device:")[2]: d.name for d in tf.config.list_logical_devices()}
    short = [name.upper().removeprefix("/").removeprefix("DEVICE:") for name in names]
    for name, asked in zip(short, names, strict=True):
        if name not in known:
            raise UserError(f"There is no device {asked!r}.{suggest(name, known)}")
    if len(set(short)) < len(short) or len(short) < 2:
        raise UserError(f"A pipeline has two different devices or more. Received: {[*names]}.")
    return [known[name] for name in short]
