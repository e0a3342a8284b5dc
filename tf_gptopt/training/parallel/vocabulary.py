"""Cross-entropy of logits whose vocabulary is divided among devices: they are never gathered.

Each device holds the logits of its share of the vocabulary. What travels is three numbers a token:
the share's largest logit, its sum of exponentials and the label's logit (Shoeybi et al. 2019,
section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import tensorflow as tf

from tf_gptopt.models.custom_gradients import custom_gradient
from tf_gptopt.models.fused import xla
from tf_gptopt.training.parallel.collectives import on, on_each


def sharded_cross_entropy(
    logits: Sequence[tf.Tensor], labels: tf.Tensor, starts: Sequence[int], devices: Sequence[str]
) -> tf.Tensor:
    """-log softmax(logits)[label] of every token, float32 `(tokens,)` on the first device.

    Args:
        logits: of each device, `(tokens, share of the vocabulary)` float32.
        labels: `(tokens,)` int32. One outside the vocabulary gives NaN.
        starts: first id of each share, and the size of the vocabulary at the end.
        devices: where the shares are.
    """
    largest, owns = [], []
    for device, share, start in zip(devices, logits, starts, strict=False):
        with tf.device(device):
            largest.append(tf.reduce_max(share, -1))  # cancels out: needs no gradient
            owns.append(labels - start)
    steps = [partial(_sum_and_pick, largest, own) for own in owns]
    sums, chosen = on_each(devices, steps, logits)

    def loss(*parts: tf.Tensor) -> tf.Tensor:
        sums, chosen = parts[: len(devices)], parts[len(devices) :]
        top = tf.reduce_max(tf.stack(largest), 0)
        is_token = (labels >= 0) & (labels < starts[-1])
        return tf.where(is_token, top + tf.math.log(tf.add_n(sums)) - tf.add_n(chosen), np.nan)

    return on(devices[0], loss, *sums, *chosen)


def _sum_and_pick(
    largest: Sequence[tf.Tensor], own: tf.Tensor, share: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Of each token, a share's sum of exp(logit - largest logit of all shares), and the logit of
    its label `own`, 0 where another share has it."""
    top = tf.reduce_max(tf.stack(largest), 0)

    @custom_gradient
    def run(share: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], Callable]:
        sums = tf.reduce_sum(tf.exp(share - top[:, None]), -1)
        last = share.shape[-1] - 1
        picked = tf.gather(share, tf.clip_by_value(own, 0, last), batch_dims=1)
        chosen = tf.where((own >= 0) & (own <= last), picked, 0.0)
        return (sums, chosen), lambda *upstream: _slope(share, top, own, *upstream)

    return run(share)


@xla
def _slope(
    share: tf.Tensor, top: tf.Tensor, own: tf.Tensor, of_sum: tf.Tensor, of_chosen: tf.Tensor
) -> tf.Tensor:
    one_hot = tf.one_hot(own, share.shape[-1])
    return tf.exp(share - top[:, None]) * of_sum[:, None] + one_hot * of_chosen[:, None]
