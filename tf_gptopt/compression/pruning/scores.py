"""How much a weight is worth. All scores of training are one formula, for a weight w of a kernel:

    score = |w| ** power * importance

| score | power | importance |
| --- | --- | --- |
| random | 0 | uniform numbers, drawn once from a seed: masks are nested as sparsity rises |
| magnitude | 1 | 1 (Han et al. 2015, "Learning both Weights and Connections", arXiv:1506.02626) |
| gradient | 0 | mean over batches of abs(dL/dw) |
| taylor | 1 | the same: abs(w dL/dw) is the change of the loss L when w becomes 0, to first order |
| wanda | 1 | norm of the input that w multiplies (Sun et al. 2023, arXiv:2306.11695) |

The Taylor score is the importance of Molchanov et al. 2019 ("Importance Estimation for Neural
Network Pruning", arXiv:1906.10771, equation 8) in absolute value, where they take squares: each
batch estimates it by itself, and the estimates are averaged after their signs are gone. Its
second-order ancestor is LeCun et al. 1989, "Optimal Brain Damage".

SparseGPT is no such score: it solves for mask and weights together (`sparsegpt.py`). What is zero
after that is the mask.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt.compression.agreement import agree
from tf_gptopt.compression.calibration import Progress
from tf_gptopt.compression.calibration_text import check_ids
from tf_gptopt.compression.pruning.wanda import input_norms
from tf_gptopt.models.fused import cross_entropy
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.linear_cross_entropy import linear_cross_entropy

MEASURED = ("gradient", "taylor", "wanda")  # importance that depends on data, and on the weights
_POWERS = {"random": 0, "gradient": 0}
_BATCH_TOKENS = 2048


def score_weights(kernel: tf.Tensor, score: str, importance: tf.Tensor | None) -> tf.Tensor:
    """The formula above: `(inputs, outputs)` float32, not negative."""
    if _POWERS.get(score, 1) == 0:
        return tf.convert_to_tensor(importance)
    magnitude = tf.abs(kernel)
    return magnitude if importance is None else magnitude * importance


def importance_shape(score: str, kernel_shape: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of a kernel's importance; None where it is 1 throughout."""
    if score == "wanda":
        return (kernel_shape[0], 1)
    return tuple(kernel_shape) if score in ("random", "gradient", "taylor") else None


def random_numbers(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """Uniform float32 in [0, 1), a function of the layer's name, the shape and the seed."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return rng.random(tuple(shape), np.float32)


class Measurement:
    """Measures the importance of a pruned model's kernels, as often as it is called.

    Under a strategy each replica takes its share of the batches, and one all-reduce a batch leaves
    the same bytes on all replicas of all workers.

    Args:
        model: a `GPTModel` whose kernels `layers` hold an `importance`.
        layers: its pruning wrappers.
        token_ids: `(examples, time)` int32, the same on every worker.
    """

    def __init__(self, model: GPTModel, layers: Sequence[Any], token_ids: np.ndarray) -> None:
        self.model, self.layers = model, list(layers)
        self.score = self.layers[0].score
        self.ids = check_ids(model, token_ids)
        if self.ids.shape[1] < 2:
            raise UserError(
                "A gradient needs a next token: calibration examples must have 2 tokens or more. "
                f"Received: token ids of shape {self.ids.shape}."
            )
        self._step: Callable | None = None

    def __call__(self, on_progress: Progress | None = None) -> None:
        """Measure with the weights that the model has now, and leave it in the variables."""
        if self.score == "wanda":
            names = [layer.layer.name for layer in self.layers]
            norms = input_norms(self.model, self.ids, names, on_progress=on_progress)
            values = agree(self.model.distribute_strategy, [norms[name] for name in names])
            for layer, value in zip(self.layers, values, strict=True):
                layer.importance.assign(value[:, None])
        else:
            self._measure_gradients(on_progress)

    def _measure_gradients(self, on_progress: Progress | None) -> None:
        strategy = self.model.distribute_strategy
        kernels = [layer.layer.kernel for layer in self.layers]
        variables = [layer.importance for layer in self.layers]

        def add(ids: tf.Tensor, weights: tf.Tensor) -> None:
            """One batch a replica: |gradient of the summed loss|, summed over replicas."""
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(kernels)
                loss = next_token_loss(self.model, ids, weights, for_gradient=True)
            sizes = [tf.abs(tf.cast(g, tf.float32)) for g in tape.gradient(loss, kernels)]
            replica = tf.distribute.get_replica_context()
            sizes = replica.all_reduce(tf.distribute.ReduceOp.SUM, sizes)
            for variable, size in zip(variables, sizes, strict=True):
                variable.assign_add(size)

        if self._step is None:
            self._step = tf.function(lambda *args: strategy.run(add, args), autograph=False)
        for variable in variables:
            variable.assign(tf.zeros(variable.shape))
        replicas = strategy.num_replicas_in_sync
        batches = list(batches_of(self.ids, replicas=replicas))
        for done, batch in enumerate(batches, start=1):
            spread = (
                strategy.experimental_distribute_values_from_function(
                    lambda context, part=part: tf.constant(part[context.replica_id_in_sync_group])
                )
                for part in batch
            )
            self._step(*spread)
            if on_progress:
                on_progress(done, len(batches), "gradients")
        tokens = np.sum(self.ids[:, 1:] >= 0)
        for layer, variable in zip(self.layers, variables, strict=True):
            mean = variable.numpy() / tokens
            if not np.isfinite(mean).all():
                raise UserError(
                    f"The gradient of {layer.layer.name} is not finite on the calibration text. "
                    "Mend the model (a diverged training has such weights), or calibrate under "
                    "float32 or bfloat16 if it computes in float16."
                )
            variable.assign(mean)


def next_token_loss(
    model: GPTModel, ids: tf.Tensor, weights: tf.Tensor, for_gradient: bool = False
) -> tf.Tensor:
    """`label_loss` of each token given those before it; ids `(batch, time)` int32, negative where
    there is no text."""
    return label_loss(model, tf.maximum(ids[:, :-1], 0), ids[:, 1:], weights, for_gradient)


def label_loss(
    model: GPTModel,
    inputs: tf.Tensor,
    labels: tf.Tensor,
    weights: tf.Tensor,
    for_gradient: bool = False,
) -> tf.Tensor:
    """Summed cross-entropy of the labels, without dropout.

    Call it in a graph, where the logits are never held whole.

    Args:
        inputs: `(batch, time)` int32.
        labels: the same shape; negative ones do not count.
        weights: `(batch, 1)` float32; an example of weight 0 does not count.

    Returns a float32 scalar. It is a sum because 16-bit gradients of a mean would vanish.
    """
    # attention in blocks belongs to training, which differs by nothing else without dropout
    training = for_gradient and not model.config.has_dropout
    logits = model(inputs, training=training)
    weights *= tf.cast(labels >= 0, tf.float32)
    labels = tf.maximum(labels, 0)
    head = getattr(logits, "head", None)
    if head is not None:
        return linear_cross_entropy(head._replace(training=for_gradient), labels, weights)
    flat = tf.reshape(logits, [-1, logits.shape[-1]])
    return tf.reduce_sum(cross_entropy(flat, tf.reshape(labels, [-1])) * tf.reshape(weights, [-1]))


def batches_of(*arrays: np.ndarray, replicas: int = 1) -> Any:
    """Of arrays `(examples, time)`, for every step `(replicas, batch, time)` each, and weights
    `(replicas, batch, 1)` float32.

    Batches hold some 2,048 tokens; the last ones are filled up with examples of weight 0.
    """
    examples, time = arrays[0].shape
    size = max(1, min(examples, _BATCH_TOKENS // time))
    step = size * replicas
    rest = -examples % step
    weights = np.ones((examples, 1), np.float32)
    padded = [np.pad(x, [(0, rest), (0, 0)]) for x in (*arrays, weights)]
    for start in range(0, examples, step):
        rows = slice(start, start + step)
        yield tuple(x[rows].reshape(replicas, size, -1) for x in padded)
