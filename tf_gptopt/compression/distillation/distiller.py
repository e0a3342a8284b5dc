"""Knowledge distillation: a small model learns from a large one's logits, with Keras' own `fit`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.config import DistillConfig
from tf_gptopt.models.gpt import GPTModel, require_gpt


class Distiller(keras.Model):
    """Trains `student` on the labels and on what `teacher` thinks of every token.

    ```python
    distiller = Distiller(student=student, teacher=teacher, temperature=2.0, alpha=0.5)
    distiller.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    distiller.fit(data)                          # as any Keras model, under any strategy
    distiller.student.save("student.keras")      # the result
    ```

    The loss, per token (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network",
    arXiv:1503.02531), at temperature T:

        alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * compiled loss

    T^2 keeps the teacher's gradient as large as the labels' when T changes. The logs show `loss`,
    its parts `distillation_loss` (with T^2) and `hard_loss` (the compiled one), and the metrics.
    Tokens with a negative label (padding) count in neither; `NextTokenLoss` ignores them as well.

    The teacher runs as in inference, gets no gradient, and is not part of the distiller: weights,
    checkpoints and saved files are the student's alone. Make both models in the scope of the
    strategy that trains. A student wrapped by `prune` or `quantize_aware` stays what it is.

    Args:
        student: the `GPTModel` to train, in place.
        teacher: a `GPTModel` over the same tokens.
        temperature: T, above 0.
        alpha: the teacher's share of the loss, in [0, 1]; with 0 the teacher is never run.

    Raises:
        UserError: when the two do not speak the same tokens, or a number is out of its range.
    """

    def __init__(
        self,
        student: GPTModel,
        teacher: GPTModel,
        temperature: float = DistillConfig.temperature,
        alpha: float = DistillConfig.alpha,
        name: str = "distiller",
    ) -> None:
        config = DistillConfig(temperature, alpha)
        check_same_tokens(require_gpt(student), require_gpt(teacher))
        inner = student.base_layer("block_0_qkv")
        policy = getattr(inner, "layer", inner).dtype_policy  # decides on loss scaling
        super().__init__(name=name, dtype=policy)
        self.student = student
        self.distribute_reduction_method = student.distribute_reduction_method
        self.temperature = config.temperature
        self.alpha = config.alpha
        # in a closure, where Keras does not find it: no weights, no checkpoint entry, no gradient
        self._get_teacher = lambda: teacher
        # The compiled loops of training are the faster ones, and the same function without dropout
        wrapped = any(isinstance(layer, keras.layers.Wrapper) for layer in teacher.layers)
        self._teach_as_in_training = not (wrapped or teacher.config.dropout or teacher.recompute)
        self._distillation_loss = keras.metrics.Mean(name="distillation_loss")
        self._total_loss = keras.metrics.Mean(name="total_loss")
        self.built = True  # the student is

    @property
    def teacher(self) -> GPTModel:
        """The frozen model that is learnt from."""
        return self._get_teacher()

    def call(self, inputs: Any, training: bool | None = None) -> tf.Tensor:
        return self.student(inputs, training=training)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None
    ) -> tf.Tensor:
        """The weighted sum of both losses; Keras' train and test steps do the rest."""
        y_pred = tf.identity(y_pred)  # without its head, so that the loss takes these logits
        hard = super().compute_loss(x, y, y_pred, sample_weight)
        if self.alpha == 0:
            return hard
        logits = tf.stop_gradient(self.teacher(x, training=self._teach_as_in_training))
        losses = distillation_loss(logits, y_pred, self.temperature)  # (batch, time)
        if sample_weight is not None:
            weight = tf.cast(sample_weight, losses.dtype)
            losses *= weight if weight.shape.rank == 2 else tf.reshape(weight, [-1, 1])
        labelled = tf.cast(tf.reshape(y, tf.shape(losses)) >= 0, losses.dtype)
        tokens = tf.reduce_sum(labelled)
        replica = tf.distribute.get_replica_context()
        replicas = replica.num_replicas_in_sync
        if replicas > 1:
            tokens = replica.all_reduce(tf.distribute.ReduceOp.MEAN, tokens)
        # Keras sums gradients over replicas and has divided the compiled loss for it; so do we
        soft = tf.math.divide_no_nan(tf.reduce_sum(losses * labelled), tokens) / replicas
        total = self.alpha * soft + (1.0 - self.alpha) * hard
        examples = tf.shape(losses)[0]
        self._distillation_loss.update_state(soft * replicas, sample_weight=examples)
        self._total_loss.update_state(total * replicas, sample_weight=examples)
        return total

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> dict[str, Any]:
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        hard, soft, total = (logs.pop(name) for name in ("loss", "distillation_loss", "total_loss"))
        if self.alpha == 0:
            return {"loss": hard, **logs}
        return {"loss": total, "distillation_loss": soft, "hard_loss": hard, **logs}

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save the student: what `ModelCheckpoint` writes is the result, without the teacher."""
        self.student.save(*args, **kwargs)


def distillation_loss(
    teacher_logits: tf.Tensor, student_logits: tf.Tensor, temperature: float
) -> tf.Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of each token.

    Only the student gets a gradient, T * (softmax(student / T) - softmax(teacher / T)), and it is
    made together with the loss: one array of logits' size is kept for the backward pass.

    Args:
        teacher_logits, student_logits: `(batch, time, vocab_size)`, any float dtype.
        temperature: T.

    Returns:
        `(batch, time)` float32, in nats.
    """
    teacher_logits = tf.cast(teacher_logits, tf.float32)

    @tf.custom_gradient
    def loss_of_student(logits: tf.Tensor) -> tuple[tf.Tensor, Any]:
        loss, gradient = _loss_and_gradient(teacher_logits, logits, temperature)
        return loss, lambda upstream: upstream[..., None] * gradient

    return loss_of_student(tf.cast(student_logits, tf.float32))


@tf.function(jit_compile=True)  # an XLA island: a third less time than the same ops one by one
def _loss_and_gradient(
    teacher_logits: tf.Tensor, student_logits: tf.Tensor, temperature: float
) -> tuple[tf.Tensor, tf.Tensor]:
    t, exp_t, sum_t = _shifted_exp(teacher_logits / temperature)
    s, exp_s, sum_s = _shifted_exp(student_logits / temperature)
    p = exp_t / sum_t  # the teacher's probabilities
    kl = tf.reduce_sum(p * (t - s), -1) + tf.math.log(sum_s / sum_t)[..., 0]
    return temperature**2 * kl, temperature * (exp_s / sum_s - p)


def _shifted_exp(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`x` less its maximum, the exponential of that, and the sum of those over the vocabulary."""
    x -= tf.reduce_max(x, -1, keepdims=True)
    exp = tf.exp(x)
    return x, exp, tf.reduce_sum(exp, -1, keepdims=True)


def check_same_tokens(student: GPTModel, teacher: GPTModel) -> None:
    """Raise a `UserError` unless token 17 is the same token to both models."""
    if student is teacher:
        raise UserError(
            "Student and teacher are one model. Make the student first, for example with "
            "shrink(teacher, layers=...)."
        )
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            "Student and teacher must share one vocabulary. Received: student "
            f"vocab_size={sizes[0]}, teacher vocab_size={sizes[1]}. Build the student with "
            f"vocab_size={sizes[1]} and the teacher's tokenizer."
        )
    prints = [getattr(m.tokenizer, "fingerprint", None) for m in (student, teacher)]
    if all(prints) and prints[0] != prints[1]:
        raise UserError(
            "Student and teacher carry different tokenizers (fingerprints "
            f"{prints[0][:12]} and {prints[1][:12]}), so their logits do not mean the same tokens. "
            "Train the student on the teacher's tokenizer."
        )
