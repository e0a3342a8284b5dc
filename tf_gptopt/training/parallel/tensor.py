"""Tensor parallelism (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053) of a GPT.

`shard(model, mesh)` gives a Keras model with the same function, spread over the mesh's devices:

    weight                       in a mesh with `model` columns
    ---------------------------  ---------------------------------------------------------------
    token table, untied head     cut by vocabulary
    qkv kernel and bias          cut by attention head: a head's q, k and v stay together
    proj kernel                  cut by row: the rows that read the column's own heads
    fc kernel and bias           cut by column: the column's own neurons
    out kernel                   cut by row: the rows that read the column's own neurons
    norms, positions, proj and   whole
      out biases

    x --+-- norm -- qkv 0 -- attention -- proj 0 --\\                column 0
        |                                           (+) -- x + ... -> the same for fc, gelu, out
    x --+-- norm -- qkv 1 -- attention -- proj 1 --/                column 1

Both columns hold the residual stream x; each computes with its own heads and neurons, and after
proj and after out their partial products are summed (an all-reduce): two sums a block forwards and
two backwards. Logits stay cut by vocabulary; the loss needs three numbers a token of each column.

Rows of the mesh (`batch`) each take a part of the batch. They do not repeat the weights: a piece
and its optimizer moments lie on one device of its column (a whole weight on any one), chosen so
that all devices carry the same, and the others get a copy for the duration of a step; gradients are
summed where the piece lies (as in ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054). So weights at
rest, moments and gradients shrink with the whole mesh, and heads, neurons and logits too; copies of
the weights shrink with the columns, and the residual stream with the rows.

Why not DTensor, as of TensorFlow and tf_keras 2.21? With `tf_keras.dtensor.experimental.LayoutMap`
a `GPTModel` builds, its forward pass and gradients are right, and without dropout
`keras.optimizers.AdamW(mesh=...)` trains it on a `DTensorDataset`. But with dropout the step fails
where q, k and v part ("SPMD expansion resulted in op output inconsistent with the provided layout"
for `tf.unstack`; `tf.split`: "Spliting over sharded dimension is not supported"); `fit` takes no
ordinary dataset ("Could not find `tf._element_layouts`"); the fused update of this package's AdamW
(`ResourceApplyAdam`) ends the process with a segmentation fault; weights take no NumPy arrays; and
a layout cuts the fused qkv kernel across q, k and v, not by head.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.checkpoints import assign_weights, named_weights
from tf_gptopt.models.compile_checks import compile_arguments
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.fit_checks import CheckedFit
from tf_gptopt.models.fused import PLAIN
from tf_gptopt.models.gpt import GPTModel, require_gpt
from tf_gptopt.models.graph_errors import ReadableErrors
from tf_gptopt.models.token_means import average_over_tokens, check_labels
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.parallel.collectives import (
    all_reduce,
    beside_inputs,
    on,
    on_each,
)
from tf_gptopt.training.parallel.local import LocalGPT
from tf_gptopt.training.parallel.mesh import Mesh
from tf_gptopt.training.parallel.placement import HEAD, TABLE, place, read
from tf_gptopt.training.parallel.sharding import check_columns, join_weight
from tf_gptopt.training.parallel.vocabulary import sharded_cross_entropy

# AutoGraph would rewrite thousands of calls, which takes longer than tracing them
as_written = tf.autograph.experimental.do_not_convert


def shard(model: GPTModel, mesh: Mesh | str) -> ShardedGPT:
    """The same function with the weights divided among the devices of `mesh`.

    ```python
    sharded = shard(GPTModel.from_preset("gpt2"), "batch=2,model=2")
    sharded.compile(adamw(steps=2000), loss=NextTokenLoss())
    sharded.fit(dataset)
    model = unshard(sharded)
    ```

    Args:
        model: a plain GPT; it is read and stays as it is. Build it under `tf.device("CPU:0")` when
            one GPU cannot hold it.
        mesh: a `Mesh`, or how it is written.

    Raises:
        UserError: for too few devices, more columns than heads, and a wrapped model.
    """
    mesh = Mesh.parse(mesh) if isinstance(mesh, str) else mesh
    weights = named_weights(require_gpt(model))
    policy = model.base_layer("block_0_qkv").dtype_policy
    sharded = ShardedGPT(weights, model.config, mesh, policy, name=model.name)
    sharded.tokenizer = model.tokenizer
    return sharded


def unshard(sharded: ShardedGPT) -> GPTModel:
    """A plain `GPTModel` with the weights of `sharded`."""
    model = GPTModel.from_gpt_config(sharded.config, dtype=sharded.dtype_policy, name=sharded.name)
    assign_weights(model, sharded.named_weights())
    model.tokenizer = sharded.tokenizer
    return model


class ShardedGPT(CheckedFit, ReadableErrors, keras.Model):
    """A GPT over a mesh; made by `shard`.

    An ordinary `keras.Model`: `compile`, `fit`, `evaluate`, callbacks and `tf.train.Checkpoint`
    work. `call` gives logits `(batch, time, vocab_size)` float32 for `(batch, time)` int32,
    gathered on the first device. Under `NextTokenLoss` without metrics, label smoothing and z-loss
    they are never gathered.

    Attributes:
        config: the shape.
        mesh: the mesh.
        pieces: the weights by name, each a list of its pieces.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        config: GPTConfig,
        mesh: Mesh,
        policy: Any = None,
        name: str = "gpt",
    ) -> None:
        super().__init__(name=name, dtype=policy)
        check_columns(config, mesh.model)
        self.config, self.mesh, self.tokenizer = config, mesh, None
        self._grid = mesh.devices()
        self._local = [
            [
                LocalGPT(config, row, column, mesh.model, device, dtype=policy)
                for column, device in enumerate(devices)
            ]
            for row, devices in enumerate(self._grid)
        ]
        firsts = [layer.first_token for layer in self._local[0]]
        self._starts = [*firsts, config.vocab_size]
        self.pieces = place(weights, config, self._grid)
        if config.has_dropout:  # a seed, and how often masks were drawn
            seed = tf.random.uniform([1], maxval=2**31 - 1, dtype=tf.int64)
            self._dropout_state = tf.Variable(tf.concat([seed, [0]], 0), trainable=False)
        self._keeps_logits_apart = False
        self.built = True

    # Keras

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, **kwargs: Any) -> None:
        """`keras.Model.compile`."""
        metrics = kwargs.get("metrics") or kwargs.get("weighted_metrics")
        plain = isinstance(loss, NextTokenLoss) and loss.form == PLAIN
        self._keeps_logits_apart = plain and not metrics
        if self._keeps_logits_apart:
            super().compile(optimizer, _TokenLosses.from_config(loss.get_config()), **kwargs)
            self.loss = loss
        else:
            weighted = kwargs.pop("weighted_metrics", None)
            checked = compile_arguments(optimizer, loss, kwargs.pop("metrics", None), weighted)
            super().compile(**checked, **kwargs)
        average_over_tokens(self)

    @as_written
    def call(self, token_ids: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        def together(*logits: tf.Tensor) -> tf.Tensor:
            columns = self.mesh.model
            rows = [logits[i : i + columns] for i in range(0, len(logits), columns)]
            return tf.concat([tf.concat(row, -1) for row in rows], 0)

        logits = self.sharded_logits(token_ids, training)
        return on(self._grid[0][0], together, *itertools.chain(*logits))

    @as_written
    def train_step(self, data: Any) -> dict[str, Any]:
        if not self._keeps_logits_apart:
            return super().train_step(data)
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self.token_losses(x, y, training=True), weights)
        with beside_inputs():
            pairs = self.optimizer.compute_gradients(loss, self.trainable_variables, tape)
            # sums over the whole mesh already: one more would carry them to the first device
            self.optimizer.apply_gradients(pairs, skip_gradients_aggregation=True)
        return self.get_metrics_result()

    @as_written
    def test_step(self, data: Any) -> dict[str, Any]:
        if not self._keeps_logits_apart:
            return super().test_step(data)
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        self.compute_loss(x, y, self.token_losses(x, y), weights)
        return self.get_metrics_result()

    def get_config(self) -> dict[str, Any]:
        raise UserError(
            "A model over a mesh is not saved as it is. Save what unshard(model) gives."
        )

    # Forward

    def token_losses(
        self, token_ids: tf.Tensor, labels: tf.Tensor, training: bool = False
    ) -> tf.Tensor:
        """Cross-entropy of each token, `(batch, time)` float32; NaN where the label is negative."""
        check_labels(labels, self.config.vocab_size)
        losses = []
        logits = self.sharded_logits(token_ids, training)
        for devices, row, own in zip(self._grid, logits, self._rows(labels), strict=True):
            rows = [
                on(device, lambda part: tf.reshape(part, [-1, part.shape[-1]]), part)
                for device, part in zip(devices, row, strict=True)
            ]
            own = tf.reshape(tf.cast(own, tf.int32), [-1])
            losses.append(sharded_cross_entropy(rows, own, self._starts, devices))
        losses = on(self._grid[0][0], lambda *rows: tf.concat(rows, 0), *losses)
        return tf.reshape(losses, tf.shape(labels))

    def sharded_logits(
        self, token_ids: tf.Tensor, training: bool | None = None
    ) -> list[list[tf.Tensor]]:
        """Logits where they are computed: `[row][column]` of the mesh, each
        `(rows of the batch, time, share of the vocabulary)` float32."""
        training, seed = training is True, None
        if training and self.config.has_dropout:
            seed = tf.convert_to_tensor(self._dropout_state.assign_add([0, 1]))
        weights = read(self.pieces, self.config, self._grid, self.compute_dtype)
        return [
            self._row_logits(row, own, weights[row], training, seed)
            for row, own in enumerate(self._rows(token_ids))
        ]

    def _row_logits(
        self, row: int, token_ids: tf.Tensor, weights: Mapping[str, list], training: bool, seed: Any
    ) -> list[tf.Tensor]:
        devices, local = self._grid[row], self._local[row]

        def each(method: str, first: tuple, *inputs: list[tf.Tensor]) -> Any:
            functions = [partial(getattr(layer, method), *first) for layer in local]
            return on_each(devices, functions, *inputs)

        def of(*names: str) -> list[list[tf.Tensor]]:
            return [weights[name] for name in names]

        vectors = all_reduce(each("embed", (token_ids,), *of(TABLE)), devices)
        x = each("start", (seed,), vectors, *of("position_embedding/embeddings"))
        for i in range(self.config.num_layers):
            block = f"block_{i}"
            norm = of(f"{block}_attention_norm/gamma", f"{block}_attention_norm/beta")
            kernels = of(f"{block}_qkv/kernel", f"{block}_qkv/bias", f"{block}_proj/kernel")
            x, terms = each("attend", (i, training), x, *norm, *kernels)
            norm = of(f"{block}_mlp_norm/gamma", f"{block}_mlp_norm/beta")
            kernels = of(f"{block}_fc/kernel", f"{block}_fc/bias", f"{block}_out/kernel")
            attended = all_reduce(terms, devices)
            bias = of(f"{block}_proj/bias")
            x, terms = each("mlp", (i, training, seed), x, attended, *bias, *norm, *kernels)
            summed = all_reduce(terms, devices)
            x = each("finish", (i, seed), x, summed, *of(f"{block}_out/bias"))
        norm = of("final_norm/gamma", "final_norm/beta")
        return each("logits", (training,), x, *norm, *of(HEAD))

    def _rows(self, values: tf.Tensor) -> list[tf.Tensor]:
        """`values` `(batch, ...)` divided among the rows of the mesh, as evenly as they can be."""
        values, count = tf.convert_to_tensor(values), self.mesh.batch
        batch = values.shape[0] if values.shape[0] is not None else tf.shape(values)[0]
        return tf.split(values, [(batch + count - 1 - i) // count for i in range(count)])

    # Weights

    def named_weights(self) -> dict[str, np.ndarray]:
        """Copies of the weights, whole, by names like `"block_0_qkv/kernel"`."""
        return {
            name: join_weight(name, [piece.numpy() for piece in pieces], self.config)
            for name, pieces in self.pieces.items()
        }


class _TokenLosses(NextTokenLoss):
    """`NextTokenLoss` of a model that knows the loss of each token already."""

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return tf.where(self.labelled(y_true), y_pred, 0.0)
