"""Who trains in benchmarks/train.py, each in a process of its own: ours and its peers, a function a
house, which calls `turns.done` after every step.

The model is GPT-2's architecture with tied logits; AdamW with gradients clipped to 1, no dropout,
random tokens. The tasks:

- "train": from scratch;
- "distill": the same model learns from a teacher of its own size (soft labels at temperature 2 and
  the labels, half and half);
- "prune": half of each block's kernels by magnitude, masks updated every 10 steps;
- "qat", "qat-int4", "qat-static": quantization-aware, as `QAT` says.
"""

from __future__ import annotations

import itertools
import os
import resource
import time
from multiprocessing.connection import Connection
from typing import Any

WARM_UP = 2  # steps that trace and compile
ENDLESS = 1_000_000  # steps; the parent says when to stop
TEMPERATURE = 2.0
PRUNING = {"sparsity": 0.5, "end_step": 1000, "frequency": 10}
QAT = {
    "qat": {"weights": "int8"},
    "qat-int4": {"weights": "int4", "granularity": 32},
    "qat-static": {"weights": "int8", "activations": "static"},
}


class Turns:
    """In a contestant's process: `done` is called after each step, and waits after a turn."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._left = WARM_UP
        self._marks = [self._now()]

    def done(self, loss: float, **facts: Any) -> None:
        self._marks.append(self._now())
        self._left -= 1
        if self._left:
            return
        wall, processor = (
            [b - a for a, b in itertools.pairwise(times)]
            for times in zip(*self._marks, strict=True)
        )
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._pipe.send({"wall": wall, "processor": processor, "mb": memory, "loss": loss, **facts})
        self._left = self._pipe.recv()
        if not self._left:
            os._exit(0)
        self._marks = [self._now()]

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def ours(shape: dict[str, int], precision: str, task: str, turns: Turns) -> None:
    """`fit` of this package, as its recipes call it."""
    from tf_gptopt._keras import keras
    from tf_gptopt.compression.distillation.distiller import Distiller
    from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
    from tf_gptopt.compression.pruning.config import PruneConfig
    from tf_gptopt.compression.pruning.pruner import prune
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.compression.quantization.qat import quantize_aware
    from tf_gptopt.training.config import TrainConfig
    from tf_gptopt.training.precision import use_precision
    from tf_gptopt.training.trainer import fit

    policy, _ = use_precision()
    model, callbacks = gpt(shape), []
    parameters = model.count_params()
    if task == "prune":
        model = prune(model, PruneConfig(**PRUNING))
        callbacks = pruning_callbacks(model)
    if task in QAT:
        model = quantize_aware(model, QuantConfig(**QAT[task]))
    if task == "distill":
        model = Distiller(student=model, teacher=gpt(shape), temperature=TEMPERATURE, alpha=0.5)
    ticks = ticking(keras, turns, parameters=parameters, precision=policy)
    config = TrainConfig(ENDLESS, shape["batch"], learning_rate=3e-4)
    fit(model, Random(shape), config, None, [*callbacks, ticks], lambda report: None)


def tfmot(shape: dict[str, int], precision: str, task: str, turns: Turns) -> None:
    """tfmot's own pruning wrapper around the same layers of the same model, with Keras's `fit`."""
    import tensorflow_model_optimization as tfmot

    from tf_gptopt._keras import keras
    from tf_gptopt.training.loss import NextTokenLoss
    from tf_gptopt.training.optimizer import adamw

    sparsity = tfmot.sparsity.keras
    schedule = sparsity.PolynomialDecay(
        0.0, PRUNING["sparsity"], 0, PRUNING["end_step"], frequency=PRUNING["frequency"]
    )
    model = gpt(shape)
    parameters = model.count_params()

    def wrap(layer: Any) -> Any:
        copy = type(layer).from_config(layer.get_config())
        prunable = layer.name.startswith("block_") and isinstance(layer, keras.layers.Dense)
        return sparsity.prune_low_magnitude(copy, schedule) if prunable else copy

    model = keras.models.clone_model(model, clone_function=wrap)
    model.compile(adamw(ENDLESS, 3e-4), NextTokenLoss())
    callbacks = [sparsity.UpdatePruningStep(), ticking(keras, turns, parameters=parameters)]
    data = Random(shape).batches("train", shape["batch"])
    model.fit(data, steps_per_epoch=ENDLESS, verbose=0, callbacks=callbacks)


def gpt(shape: dict[str, int]) -> Any:
    from tf_gptopt._keras import keras
    from tf_gptopt.models.gpt import GPTModel

    keras.utils.set_random_seed(0)
    vocab, width, layers, heads = (shape[key] for key in ("vocab", "width", "layers", "heads"))
    return GPTModel(vocab, width, layers, heads, max_sequence_length=shape["time"])


class Random:
    """Random tokens as a dataset of this package."""

    def __init__(self, shape: dict[str, int]) -> None:
        self.shape, self.sequence_length = shape, shape["time"]

    def batches(self, split: str, batch_size: int, **_: int) -> Any:
        import tensorflow as tf

        ids = tf.constant(random_tokens(self.shape), tf.int32)
        return tf.data.Dataset.from_tensors((ids[:, :-1], ids[:, 1:])).repeat()


def ticking(keras: Any, turns: Turns, **facts: Any) -> Any:
    """A callback of either Keras that reports every step."""

    class Ticks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            turns.done(float(logs["loss"]), **facts)

    return Ticks()


def torch(shape: dict[str, int], precision: str, task: str, turns: Turns) -> None:
    """nanoGPT's model and step in PyTorch."""
    import torch
    import torch.nn.functional as F

    from benchmarks.nanogpt import GPT, adamw

    sizes = [shape[key] for key in ("vocab", "width", "layers", "heads", "time")]

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(ids), labels.view(-1))

    def loss_to(logits: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        target = F.log_softmax(taught / TEMPERATURE, -1)
        guess = F.log_softmax(logits / TEMPERATURE, -1)
        soft = F.kl_div(guess, target, reduction="batchmean", log_target=True)
        return 0.5 * TEMPERATURE**2 * soft + 0.5 * F.cross_entropy(logits, labels.view(-1))

    torch.manual_seed(0)
    model, teacher = GPT(*sizes), GPT(*sizes) if task == "distill" else None
    optimizer = adamw(model, 3e-4)
    compiled = torch.compile(loss_of)
    if task == "distill":  # compiled as one, it takes five times as long
        student, teaching, combined = map(torch.compile, (model, teacher, loss_to))

        def compiled(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                taught = teaching(ids)
            return combined(student(ids), labels, taught)

    data = torch.tensor(random_tokens(shape))
    ids, labels = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    parameters = sum(p.numel() for p in model.parameters())
    while True:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = compiled(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.done(loss.item(), parameters=parameters, precision=precision)


def keras_nlp(shape: dict[str, int], precision: str, task: str, turns: Turns) -> None:
    """keras-nlp's GPT-2 with its own compile and fit, on the TensorFlow backend."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import keras_nlp
    import numpy as np
    import tensorflow as tf

    if precision == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    keras.utils.set_random_seed(0)
    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size=shape["vocab"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        hidden_dim=shape["width"],
        intermediate_dim=4 * shape["width"],
        dropout=0.0,
        max_sequence_length=shape["time"],
    )
    model = keras_nlp.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(
        keras.optimizers.AdamW(3e-4, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    ids = np.asarray(random_tokens(shape), "int32")
    inputs = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, :-1])}
    data = tf.data.Dataset.from_tensors((inputs, ids[:, 1:])).repeat()

    ticks = ticking(keras, turns, parameters=model.count_params(), precision=precision)
    model.fit(data, steps_per_epoch=ENDLESS, epochs=1, verbose=0, callbacks=[ticks])


def random_tokens(shape: dict[str, int]) -> Any:
    import numpy as np

    size = (shape["batch"], shape["time"] + 1)
    return np.random.default_rng(0).integers(0, shape["vocab"], size)


HOUSES = {"ours": ours, "tfmot": tfmot, "torch": torch, "keras-nlp": keras_nlp}
