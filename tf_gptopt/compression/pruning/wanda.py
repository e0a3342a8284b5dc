"""Wanda's half of a score: how large each input of a Dense layer is on calibration text.

Wanda (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
arXiv:2306.11695) prunes by `|W_ij| * ||X_i||`, i an input and j an output: a small weight on a
large input matters, a large weight on an input that is always near zero does not. The authors
compare the weights of one output with each other (`scope="output"`).

The inputs here are those of the model as it is handed in, for all layers at once. The authors'
code prunes block 0 and computes the inputs of block 1 from the pruned block 0, which ties the
score to one mask. Inputs of the original serve any sparsity, pattern, scope and schedule from one
pass through the model, and that is half the work.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt.compression.calibration import Progress, stream_inputs
from tf_gptopt.models.gpt import GPTModel


def input_norms(
    model: GPTModel,
    token_ids: Any,
    layers: Collection[str],
    on_progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """The l2 norm of every input feature of some Dense layers over all calibration tokens.

    Sums of squares are taken as batches pass, so nothing grows with the number of tokens.

    Args:
        model: a `GPTModel`, plain or wrapped; it is not changed.
        token_ids: `(examples, time)` integers; see `calibration_ids`.
        layers: names of the layers, without wrappers.
        on_progress: called as `on_progress(done, total, what)`.

    Returns:
        layer name -> `(in,)` float32.

    Raises:
        UserError: for tokens that are not for this model, and names that are no Dense layer's.
    """
    squares: dict[str, Any] = dict.fromkeys(layers, 0.0)

    def observe(name: str, x: tf.Tensor) -> None:
        squares[name] += tf.reduce_sum(tf.square(x), 0).numpy().astype(np.float64)

    stream_inputs(model, token_ids, layers, observe, on_progress=on_progress)
    return {name: np.sqrt(total).astype(np.float32) for name, total in squares.items()}
