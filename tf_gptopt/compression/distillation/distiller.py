"""Knowledge distillation: a small model learns from a large one, with Keras' own `fit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError, known_arguments
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.cache import CachedTeacher
from tf_gptopt.compression.distillation.config import DistillConfig, check_alpha
from tf_gptopt.compression.distillation.features import Comparison
from tf_gptopt.compression.distillation.forward import forward_with_taps
from tf_gptopt.compression.distillation.linear_soft_labels import linear_soft_labels
from tf_gptopt.compression.distillation.losses import FeatureLoss, Loss, SoftLabels
from tf_gptopt.compression.distillation.soft_labels import Logits, TopK, distillation_loss
from tf_gptopt.compression.distillation.teachers import (
    as_teachers,
    check_same_tokens,
    teacher_shares,
)
from tf_gptopt.models.compile_checks import compile_arguments
from tf_gptopt.models.fit_checks import CheckedFit, check_label_shape
from tf_gptopt.models.fused import CrossEntropy
from tf_gptopt.models.gpt import GPTModel, is_wrapped, require_gpt
from tf_gptopt.models.graph_errors import ReadableErrors
from tf_gptopt.models.token_means import (
    average_over_tokens,
    averages_tokens,
    check_labels,
    everywhere,
    labels_of,
    token_weights,
    weigh,
)


@known_arguments
class Distiller(CheckedFit, ReadableErrors, keras.Model):
    """Trains `student` on the labels and on what `teacher` thinks of every token.

    ```python
    distiller = Distiller(student=student, teacher=teacher, temperature=2.0, alpha=0.5)
    distiller.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    distiller.fit(data)                          # as any Keras model, under any strategy
    distiller.student.save("student.keras")      # the result

    Distiller(student, teacher, losses=[SoftLabels(2.0, "js"), HiddenStates(weight=0.1)])
    ```

    The loss, per token (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network",
    arXiv:1503.02531):

        alpha * sum of weight * loss + (1 - alpha) * compiled loss

    The logs show `loss`, its parts by name (`distillation_loss` for soft labels, with its T^2,
    `hidden_states_loss`, `attention_maps_loss`, `relations_loss`, each without its weight, and
    `hard_loss`, the compiled one) and the metrics, means over labels. Tokens with a negative label
    (padding) count in none of them, nor those that the compiled `NextTokenLoss` leaves out.

    Each model runs once a step. The teacher runs as in inference, gets no gradient, and is not part
    of the distiller: weights and checkpoints are the student's and, where hidden states differ in
    width, those of the map between them; what `save` writes is the student alone. Make both models
    in the scope of the strategy that trains. A student wrapped by `prune` or `quantize_aware` stays
    what it is.

    With `NextTokenLoss` the logits of student and teacher are never held whole: both losses start
    from the last hidden states, a chunk of rows at a time.

    Args:
        student: the `GPTModel` to train, in place.
        teacher: a `GPTModel` over the same tokens; a `GPT2CausalLM` or `GPT2Backbone` of keras-nlp;
            the path of a folder that `load_checkpoint` reads; a `CachedTeacher`, which goes with
            its own batches; or a list of models and paths. Of several teachers the soft labels are
            the mean of the probabilities, whose gradient is the mean of what each would give (the
            mean of the logits would be that of no mixture, and moves with each teacher's scale);
            features are those of the first.
        temperature: of the soft labels, where `losses` is not given.
        alpha: the teacher's share of the loss, in [0, 1]; with 0 the teacher is never run.
        losses: `SoftLabels`, `HiddenStates`, `AttentionMaps`, `Relations`, one or several; default
            `[SoftLabels(temperature)]`.
        teacher_weights: of several teachers, each positive; default equal.

    Attributes:
        student: the model that is trained.
        teachers: the frozen models; none with a `CachedTeacher`.
        alpha: the teacher's share.

    Raises:
        UserError: when the models do not speak the same tokens, cannot be compared in the way a
            loss asks for, or a number is out of its range.
    """

    def __init__(
        self,
        student: GPTModel,
        teacher: Any,
        temperature: float = DistillConfig.temperature,
        alpha: float = DistillConfig.alpha,
        name: str = "distiller",
        *,
        losses: Sequence[Loss] | None = None,
        teacher_weights: Sequence[float] | None = None,
    ) -> None:
        check_alpha(alpha)
        losses = (SoftLabels(temperature),) if losses is None else tuple(losses)
        soft, features = _sort(losses)
        with require_gpt(student).distribute_strategy.scope():
            super().__init__(name=name, dtype=student.dtype_policy)  # decides on loss scaling
            # a plain object, where Keras does not look: no weights, nothing in checkpoints
            self._lesson = lesson = _Lesson(student, teacher, teacher_weights, soft, features)
            names = [loss.NAME for loss in losses]
            self._means = [keras.metrics.Mean(name=x) for x in ("total_loss", *names, "hard_loss")]
        self.student = student
        self.projections = [x.projection for x in lesson.comparisons if x.projection is not None]
        self.distribute_reduction_method = student.distribute_reduction_method
        self.alpha = alpha
        self.built = True  # the student is

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        metrics: Any = None,
        loss_weights: Any = None,
        weighted_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """`keras.Model.compile`; the loss is the one on the labels, and has to be given.

        Raises:
            UserError: without a loss, and as `GPTModel.compile`.
        """
        if loss is None:
            raise UserError(
                "A Distiller needs a loss on the labels beside what the teacher says, for its share"
                " 1 - alpha and for the logs. Write compile(optimizer, loss=NextTokenLoss())."
            )
        checked = compile_arguments(optimizer, loss, metrics, weighted_metrics)
        super().compile(**checked, loss_weights=loss_weights, **kwargs)
        average_over_tokens(self)

    @property
    def teachers(self) -> tuple[GPTModel, ...]:
        """The frozen models that are learnt from."""
        return self._lesson.teachers

    @property
    def teacher(self) -> GPTModel | None:
        """The first of them."""
        return self.teachers[0] if self.teachers else None

    def call(self, inputs: Any, training: bool | None = None) -> tf.Tensor:
        token_ids = inputs["token_ids"] if isinstance(inputs, dict) else inputs
        if self.alpha == 0:
            return self.student(token_ids, training=training)
        logits, taps = self._lesson.student(token_ids, training)
        logits.taps = taps  # for `compute_loss`, as `head` is for `NextTokenLoss`
        return logits

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None
    ) -> tf.Tensor:
        """The weighted sum of all losses; Keras' train and test steps do the rest."""
        check_label_shape(y, y_pred.shape, self.loss)
        if self.alpha == 0:
            return super().compute_loss(x, y, y_pred, sample_weight)
        lesson = self._lesson
        labels = tf.cast(tf.reshape(y, tf.shape(y_pred)[:2]), tf.int32)
        labelled = tf.cast(labels_of(self.loss, labels), tf.float32)
        weights = labelled * token_weights(sample_weight)
        tokens = tf.reduce_sum(labelled)
        all_tokens = everywhere(tokens)

        def share(total: tf.Tensor) -> tf.Tensor:
            """This replica's share of the mean over all labels; Keras sums gradients of shares."""
            return tf.math.divide_no_nan(total, all_tokens)

        target, heads, taps = lesson.teach(x)
        parts, total = {}, 0.0
        for comparison in lesson.comparisons:
            loss = comparison.loss
            own = [y_pred.taps[name] for name in comparison.student_taps]
            losses = comparison(own, [taps[name] for name in comparison.teacher_taps])
            parts[loss.NAME] = share(tf.reduce_sum(losses * weights))
            total += self.alpha * loss.weight * parts[loss.NAME]
        soft, head = lesson.soft, getattr(y_pred, "head", None)
        form = self._fused_form()
        if soft and heads and head is not None and form is not None:
            check_labels(labels, y_pred.shape[-1])
            both, of_soft, of_hard = linear_soft_labels(
                head,
                heads,
                labels,
                weights,
                soft,
                self.alpha * soft.weight,
                1.0 - self.alpha,
                lesson.shares,
                form=form,
            )
            parts[soft.NAME], parts["hard_loss"] = share(of_soft), share(of_hard)
            total += share(both)
        else:
            if soft:
                losses = distillation_loss(
                    target, y_pred, soft.temperature, soft.divergence, soft.beta
                )
                parts[soft.NAME] = share(tf.reduce_sum(losses * weights))
                total += self.alpha * soft.weight * parts[soft.NAME]
                y_pred = tf.identity(y_pred)  # without its head, so that the loss takes these
            parts["hard_loss"] = super().compute_loss(x, y, y_pred, sample_weight)
            total += (1.0 - self.alpha) * parts["hard_loss"]
        parts["total_loss"] = total
        for metric in self._means:
            mean = tf.math.divide_no_nan(parts[metric.name] * all_tokens, tokens)
            metric.update_state(mean, sample_weight=tokens)
        weigh(self.optimizer, all_tokens)
        return total

    def _fused_form(self) -> CrossEntropy | None:
        """Of the compiled loss, if that is `NextTokenLoss` and nothing beside it."""
        alone = self.compiled_loss._user_loss_weights is None and not self.losses
        return getattr(self.loss, "form", None) if alone and averages_tokens(self.loss) else None

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> dict[str, Any]:
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        own = {metric.name: logs.pop(metric.name) for metric in self._means}
        if self.alpha == 0:
            return logs
        logs.pop("loss", None)  # the compiled one, which `hard_loss` is
        return {"loss": own.pop("total_loss"), **own, **logs}

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save the student: what `ModelCheckpoint` writes is the result, without the teacher."""
        self.student.save(*args, **kwargs)


class _Lesson:
    """What is learnt, from whom, and the forward passes that it takes.

    Attributes:
        soft: the soft labels, or None.
        comparisons: of features with those of the first teacher.
        student: forward pass of the student, with what the comparisons need.
    """

    def __init__(
        self,
        student: GPTModel,
        teacher: Any,
        weights: Sequence[float] | None,
        soft: SoftLabels | None,
        features: list[FeatureLoss],
    ) -> None:
        self.soft, self.teachers, self.shares = soft, (), (1.0,)
        self.comparisons: list[Comparison] = []
        self._cached = isinstance(teacher, CachedTeacher)
        if self._cached:
            teacher.check(student, soft, features)
        else:
            self.teachers = as_teachers(teacher)
            self.shares = teacher_shares(weights, len(self.teachers))
            for one in self.teachers:
                check_same_tokens(student, one)
            self.comparisons = [Comparison(loss, student, self.teachers[0]) for loss in features]
        own, others = (
            [tap for x in self.comparisons for tap in getattr(x, taps)]
            for taps in ("student_taps", "teacher_taps")
        )
        self.student = forward_with_taps(student, own)
        # the compiled loops of training are the faster ones, the same function without dropout
        self._forwards = [
            (
                forward_with_taps(one, () if i else others, logits=soft is not None),
                not (one.config.has_dropout or one.recompute or is_wrapped(one)),
            )
            for i, one in enumerate(self.teachers if soft else self.teachers[:1])
        ]

    def teach(self, x: Any) -> tuple[Logits | TopK | None, Any, dict[str, tf.Tensor]]:
        """For a batch: the target of the soft labels, where it comes from if that is known, and
        what lies inside the first teacher."""
        if self._cached:
            target = CachedTeacher.target(x)
            return target, target, {}
        token_ids = x["token_ids"] if isinstance(x, dict) else x
        outputs = [forward(token_ids, training) for forward, training in self._forwards]
        taps = outputs[0][1]
        if self.soft is None:
            return None, None, taps
        logits = tuple(tf.stop_gradient(logits) for logits, _ in outputs)
        heads = [getattr(logits, "head", None) for logits, _ in outputs]
        return Logits(logits, self.shares), None if None in heads else heads, taps


def _sort(losses: Sequence[Loss]) -> tuple[SoftLabels | None, list[FeatureLoss]]:
    """The soft labels, and the losses on features."""
    for loss in losses:
        if not isinstance(loss, Loss):
            raise UserError(
                "losses are SoftLabels, HiddenStates, AttentionMaps and Relations. "
                f"Received: {loss!r}."
            )
    names = [loss.NAME for loss in losses]
    if not losses or len(set(names)) < len(names):
        raise UserError(
            "losses hold one to four losses, one of a kind; several pairs of blocks go into one "
            f"layer_map. Received: {list(losses)}."
        )
    soft = [loss for loss in losses if isinstance(loss, SoftLabels)]
    return (soft[0] if soft else None), [loss for loss in losses if loss not in soft]
