"""What lies inside two models, compared token by token: hidden states, attention maps, relations.

A feature is taken from the flat graph by its layer's name, so a wrapped student (sparse,
quantization-aware) or one with blocks of different sizes is looked at like any other.
"""

from __future__ import annotations

import math

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.losses import (
    AttentionMaps,
    FeatureLoss,
    HiddenStates,
    Relations,
    layer_pairs,
)
from tf_gptopt.compression.distillation.soft_labels import distillation_loss
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.layers import CausalSelfAttention


class Comparison:
    """A loss between features of one student and one teacher, ready to be computed.

    Attributes:
        loss: what is compared.
        student_taps, teacher_taps: names of the layers whose outputs are compared, pair by pair.
        projection: the student's learned map, or None.

    Raises:
        UserError: when the two models cannot be compared in this way, with what would do.
    """

    def __init__(self, loss: FeatureLoss, student: GPTModel, teacher: GPTModel) -> None:
        self.loss = loss
        self._pairs = layer_pairs(
            loss.layer_map, student.config.num_layers, teacher.config.num_layers
        )
        self.student_taps = [f"block_{s}_{loss.TAP}" for s, _ in self._pairs]
        self.teacher_taps = [f"block_{t}_{loss.TAP}" for _, t in self._pairs]
        self._attentions = [
            (_attention(student, s), _attention(teacher, t)) for s, t in self._pairs
        ]
        self.projection = None
        if isinstance(loss, HiddenStates):
            widths = student.config.embedding_dim, teacher.config.embedding_dim
            if widths[0] != widths[1]:
                policy = student.dtype_policy
                self.projection = keras.layers.Dense(
                    widths[1], use_bias=False, name="hidden_projection", dtype=policy
                )
                self.projection.build((None, None, widths[0]))
        elif isinstance(loss, AttentionMaps):
            for pair, (s, t) in zip(self._pairs, self._attentions, strict=True):
                if loss.heads == "match" and s.num_heads != t.num_heads:
                    raise UserError(
                        f"Block {pair[0]} of the student has {s.num_heads} heads and block "
                        f"{pair[1]} of the teacher {t.num_heads}, so their attention maps do not "
                        "pair up. Use AttentionMaps(heads='average'), or Relations(), which needs "
                        "no equal heads."
                    )
        else:
            self._relation_heads = [
                _relation_heads(loss, _inner_width(student, s), _inner_width(teacher, t), heads)
                for (s, t), (_, heads) in zip(self._pairs, self._attentions, strict=True)
            ]

    def __call__(self, student: list[tf.Tensor], teacher: list[tf.Tensor]) -> tf.Tensor:
        """The loss of each token, the mean over pairs of blocks: `(batch, time)` float32.

        Args:
            student, teacher: outputs of the taps, `(batch, time, ...)`.
        """
        losses = [
            self._of_pair(i, s, tf.stop_gradient(t))
            for i, (s, t) in enumerate(zip(student, teacher, strict=True))
        ]
        return tf.add_n(losses) / len(losses)

    def _of_pair(self, i: int, student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        if isinstance(self.loss, HiddenStates):
            if self.projection is not None:
                student = self.projection(student)
            return hidden_states_loss(student, teacher, self.loss.normalize)
        s, t = self._attentions[i]
        if isinstance(self.loss, AttentionMaps):
            return attention_maps_loss(
                s.split_heads(student),
                t.split_heads(teacher),
                self.loss.divergence,
                self.loss.heads,
            )
        return relations_loss(student, teacher, self._relation_heads[i])


def hidden_states_loss(
    student: tf.Tensor, teacher: tf.Tensor, normalize: bool = False
) -> tf.Tensor:
    """Squared error of states `(batch, time, width)`: `(batch, time)` float32. The mean over the
    width; with `normalize` the sum over it, of states scaled to length 1."""
    student, teacher = tf.cast(student, tf.float32), tf.cast(teacher, tf.float32)
    if normalize:
        student, teacher = (tf.math.l2_normalize(x, -1) for x in (student, teacher))
        return tf.reduce_sum(tf.math.squared_difference(student, teacher), -1)
    return tf.reduce_mean(tf.math.squared_difference(student, teacher), -1)


def attention_maps_loss(
    student: list[tf.Tensor], teacher: list[tf.Tensor], divergence: str, heads: str
) -> tf.Tensor:
    """How each query's attention differs, the mean over heads: `(batch, time)` float32.

    Args:
        student, teacher: q, k (and v), each `(batch, num_heads, time, head_dim)`.
        divergence: "kl" or "mse".
        heads: "match" or "average".
    """
    s, t = (_scores(q * q.shape[-1] ** -0.5, k) for q, k, *_ in (student, teacher))
    if heads == "average" or divergence == "mse":
        s, t = tf.nn.softmax(s), tf.nn.softmax(t)
        if heads == "average":
            s, t = (tf.reduce_mean(x, 1, keepdims=True) for x in (s, t))
        if divergence == "mse":
            seen = tf.range(1.0, tf.cast(tf.shape(s)[-1], tf.float32) + 1.0)
            losses = tf.reduce_sum(tf.math.squared_difference(s, t), -1) / seen
            return tf.reduce_mean(losses, 1)
        # the softmax of a logarithm is the map again; keys that nobody sees stay at 0
        s, t = (tf.math.log(tf.maximum(x, 1e-30)) for x in (s, t))
    return tf.reduce_mean(distillation_loss(t, s, 1.0), 1)


def relations_loss(student: tf.Tensor, teacher: tf.Tensor, heads: int) -> tf.Tensor:
    """KL between relations, summed over Q-Q, K-K and V-V, the mean over relation heads:
    `(batch, time)` float32.

    Args:
        student, teacher: queries, keys and values side by side, `(batch, time, 3 * inner)`; `heads`
            divides both inner widths.
    """
    relation = CausalSelfAttention(heads, dtype=student.dtype)
    losses = []
    for s, t in zip(relation.split_heads(student), relation.split_heads(teacher), strict=True):
        own, other = (_scores(x * x.shape[-1] ** -0.5, x) for x in (s, t))
        losses.append(tf.reduce_mean(distillation_loss(other, own, 1.0), 1))
    return tf.add_n(losses)


def _scores(q: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    """q k^T under the causal mask, `(batch, heads, time, time)` float32."""
    scores = tf.cast(tf.matmul(q, k, transpose_b=True), tf.float32)
    time = tf.shape(scores)[-1]
    return scores - 1e9 * (1.0 - tf.linalg.band_part(tf.ones([time, time]), -1, 0))


def _attention(model: GPTModel, block: int) -> CausalSelfAttention:
    layer = model.base_layer(f"block_{block}_attention")
    return getattr(layer, "layer", layer)


def _inner_width(model: GPTModel, block: int) -> int:
    return model.config.block_heads[block] * model.config.head_dim


def _relation_heads(
    loss: Relations, student: int, teacher: int, attention: CausalSelfAttention
) -> int:
    """Relation heads between blocks whose heads are so wide together; `attention` is the
    teacher's."""
    common = math.gcd(student, teacher)
    if loss.heads is None:
        return max(n for n in range(1, attention.num_heads + 1) if common % n == 0)
    if common % loss.heads:
        choices = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UserError(
            f"Relation heads divide the width of all heads together, and {loss.heads} does not "
            f"divide {student} (student) and {teacher} (teacher). These do: {choices}. Or leave "
            "heads out."
        )
    return loss.heads
