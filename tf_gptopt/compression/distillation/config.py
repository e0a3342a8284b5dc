"""`DistillConfig`: how a student listens to its teacher. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses

from tf_gptopt._errors import UserError, known_arguments
from tf_gptopt.compression.distillation.losses import (
    AttentionMaps,
    HiddenStates,
    LayerMap,
    Loss,
    Relations,
    SoftLabels,
    is_number,
)


@known_arguments
@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Knowledge distillation as plain values (Hinton et al. 2015, arXiv:1503.02531).

    ```python
    Distiller(student, teacher, alpha=config.alpha, losses=config.losses())
    ```

    The loss is `alpha * (sum of weight x loss) + (1 - alpha) * labels`. A weight of 0 leaves a loss
    out.

    Args:
        temperature: divides both models' logits before the softmax; above 1 it brings out what the
            teacher thinks of the unlikely tokens.
        alpha: weight of the teacher in [0, 1]; the labels get `1 - alpha`. 0 is plain training, and
            then the teacher is never run.
        divergence: of the soft labels: "forward", "reverse" or "js".
        beta: of "js", in (0, 1).
        soft_labels: weight of the soft labels.
        hidden_states: weight of the hidden states.
        hidden_layers: "uniform", "last" or pairs of block numbers (student, teacher), from 0.
        hidden_normalize: compare their directions alone.
        attention_maps: weight of the attention maps.
        attention_layers: as hidden_layers.
        attention_divergence: "kl" or "mse".
        attention_heads: "match" or "average".
        relations: weight of the relations of queries, keys and values.
        relation_layers: as hidden_layers.
        relation_heads: of the relations; default the teacher's number of heads.
        top_k: write the teacher's so many likeliest tokens to disk first, and train without it;
            None runs the teacher beside the student.

    Raises:
        UserError: when a value is out of its range.
    """

    temperature: float = 2.0
    alpha: float = 0.5
    divergence: str = "forward"
    beta: float = 0.5
    soft_labels: float = 1.0
    hidden_states: float = 0.0
    hidden_layers: LayerMap = "uniform"
    hidden_normalize: bool = False
    attention_maps: float = 0.0
    attention_layers: LayerMap = "uniform"
    attention_divergence: str = "kl"
    attention_heads: str = "match"
    relations: float = 0.0
    relation_layers: LayerMap = "last"
    relation_heads: int | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        # the values of a loss that is left out are checked too
        SoftLabels(self.temperature, self.divergence, self.beta)
        HiddenStates(self.hidden_layers)
        AttentionMaps(self.attention_layers, self.attention_divergence, self.attention_heads)
        Relations(self.relation_layers, self.relation_heads)
        for name in ("soft_labels", "hidden_states", "attention_maps", "relations"):
            weight = getattr(self, name)
            if not is_number(weight) or weight < 0:
                raise UserError(
                    f"{name} is the weight of a loss: 0 or a positive number. "
                    f"Received: {name}={weight!r}."
                )
        if self.alpha and not self.losses():
            raise UserError(
                "With alpha above 0 the student learns from its teacher, and every loss has weight "
                "0. Give one a weight, or set alpha=0."
            )
        if self.top_k is not None:
            if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
                raise UserError(
                    "top_k must be a positive number of tokens; 16 to 64 is usual. "
                    f"Received: top_k={self.top_k!r}."
                )
            if self.hidden_states or self.attention_maps or self.relations:
                raise UserError(
                    "What top_k writes to disk are soft labels alone. Leave it out, or set "
                    "hidden_states, attention_maps and relations to 0."
                )

    def losses(self) -> tuple[Loss, ...]:
        """The losses with a weight above 0."""
        losses: list[Loss] = []
        if self.soft_labels:
            losses.append(
                SoftLabels(self.temperature, self.divergence, self.beta, self.soft_labels)
            )
        if self.hidden_states:
            losses.append(
                HiddenStates(self.hidden_layers, self.hidden_normalize, self.hidden_states)
            )
        if self.attention_maps:
            losses.append(
                AttentionMaps(
                    self.attention_layers,
                    self.attention_divergence,
                    self.attention_heads,
                    self.attention_maps,
                )
            )
        if self.relations:
            losses.append(Relations(self.relation_layers, self.relation_heads, self.relations))
        return tuple(losses)


def check_alpha(alpha: float) -> None:
    """Raise a `UserError` unless `alpha` is a share."""
    if not is_number(alpha) or not 0.0 <= alpha <= 1.0:
        raise UserError(
            f"alpha must be in [0, 1]: the teacher's share of the loss. Received: alpha={alpha!r}."
        )
