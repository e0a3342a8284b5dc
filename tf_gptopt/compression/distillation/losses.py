"""What a student may learn from its teacher, each a line in a call. Needs no TensorFlow.

```python
Distiller(student, teacher, losses=[SoftLabels(temperature=2.0), HiddenStates(weight=0.1)])
```

Every loss is a number per token, so that padding and sample weights treat all of them alike. What
is computed is in `soft_labels.py` and `features.py`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from tf_gptopt._errors import UserError, suggest

LayerMap = tuple[tuple[int, int], ...] | str

DIVERGENCES = ("forward", "reverse", "js")
LAYER_MAPS = ("uniform", "last")
ATTENTION_DIVERGENCES = ("kl", "mse")
ATTENTION_HEADS = ("match", "average")


@dataclasses.dataclass(frozen=True)
class SoftLabels:
    """The teacher's distribution over the next token (Hinton et al. 2015, arXiv:1503.02531).

    With p and q the softmax of the teacher's and the student's logits divided by T, the loss is T^2
    times

    - "forward": KL(p || q). The student covers all that the teacher thinks possible.
    - "reverse": KL(q || p). It keeps to what the teacher thinks likely (Gu et al. 2023, "MiniLLM",
      arXiv:2306.08543).
    - "js": beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, between the two
      (Agarwal et al. 2023, "GKD", arXiv:2306.13649).

    T^2 keeps the gradient as large as the labels' when T changes.

    Args:
        temperature: T, above 0; above 1 it brings out what the teacher thinks of unlikely tokens.
        divergence: "forward", "reverse" or "js".
        beta: of "js", in (0, 1).
        weight: of this loss among the teacher's.
    """

    temperature: float = 2.0
    divergence: str = "forward"
    beta: float = 0.5
    weight: float = 1.0

    NAME: ClassVar[str] = "distillation_loss"  # in the logs

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or self.temperature <= 0:
            raise UserError(
                "temperature must be a positive number; 1 to 4 is usual. "
                f"Received: temperature={self.temperature!r}."
            )
        _check_choice("divergence", self.divergence, DIVERGENCES)
        if not is_number(self.beta) or not 0.0 < self.beta < 1.0:
            raise UserError(
                "beta must be between 0 and 1, both left out: near 0 'js' is a forward KL, near 1 "
                f"a reverse one. Received: beta={self.beta!r}."
            )
        _check_weight(self.weight)


@dataclasses.dataclass(frozen=True)
class HiddenStates:
    """The residual stream after chosen blocks: mean squared error over its width.

    Where the widths differ, the student's state first passes a linear map that is learned with it
    and thrown away afterwards (Jiao et al. 2019, "TinyBERT", arXiv:1909.10351); one map serves all
    pairs, as all blocks of a model write to one stream. With `normalize` both states are scaled to
    length 1 and the squares are summed (Sun et al. 2019, "PKD", arXiv:1908.09355): 0 to 4, whatever
    the size of the states.

    Args:
        layer_map: "uniform" (student block i of n learns from teacher block (i + 1) m / n - 1 of m,
            rounded up), "last" (the last from the last), or pairs of block numbers (student,
            teacher), from 0.
        normalize: compare directions alone.
        weight: of this loss among the teacher's.
    """

    layer_map: LayerMap = "uniform"
    normalize: bool = False
    weight: float = 1.0

    NAME: ClassVar[str] = "hidden_states_loss"
    TAP: ClassVar[str] = "mlp_add"  # the layer of a block that is looked at

    def __post_init__(self) -> None:
        _check_layer_map(self.layer_map)
        _check_weight(self.weight)


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Where each head looks: softmax(Q K^T / sqrt(head_dim)) under the causal mask (Jiao et al.
    2019, "TinyBERT", arXiv:1909.10351).

    Args:
        layer_map: as in `HiddenStates`.
        divergence: "kl", KL(teacher || student) of each query; or "mse", the mean squared
            difference over the keys that the query sees.
        heads: "match" compares head by head, and refuses models that differ in their number;
            "average" compares the mean map of a block's heads.
        weight: of this loss among the teacher's.
    """

    layer_map: LayerMap = "uniform"
    divergence: str = "kl"
    heads: str = "match"
    weight: float = 1.0

    NAME: ClassVar[str] = "attention_maps_loss"
    TAP: ClassVar[str] = "qkv"

    def __post_init__(self) -> None:
        _check_layer_map(self.layer_map)
        _check_choice("divergence", self.divergence, ATTENTION_DIVERGENCES)
        _check_choice("heads", self.heads, ATTENTION_HEADS)
        _check_weight(self.weight)


@dataclasses.dataclass(frozen=True)
class Relations:
    """How queries, keys and values resemble each other across positions (Wang et al. 2020,
    "MiniLMv2", arXiv:2012.15828).

    All heads of a block are joined and cut anew into `heads` relation heads, so that models with
    other heads and other widths can be compared. The loss is the sum over A in Q, K, V of
    KL(teacher || student) of softmax(A A^T / sqrt(d)), d the width of a relation head, averaged
    over relation heads; a position is related to itself and those before it, as in attention.

    Args:
        layer_map: as in `HiddenStates`; MiniLM takes one block, the last (of teachers of 24 blocks
            and more one some way below it).
        heads: relation heads; they divide heads x head_dim of both models. None: as many as the
            teacher has heads, or the most below that which divide both.
        weight: of this loss among the teacher's.
    """

    layer_map: LayerMap = "last"
    heads: int | None = None
    weight: float = 1.0

    NAME: ClassVar[str] = "relations_loss"
    TAP: ClassVar[str] = "qkv"

    def __post_init__(self) -> None:
        _check_layer_map(self.layer_map)
        if self.heads is not None and not _is_count(self.heads):
            raise UserError(
                f"heads must be a positive number of relation heads. Received: heads={self.heads}."
            )
        _check_weight(self.weight)


FeatureLoss = HiddenStates | AttentionMaps | Relations
Loss = SoftLabels | FeatureLoss


def layer_pairs(
    layer_map: LayerMap, student_layers: int, teacher_layers: int
) -> tuple[tuple[int, int], ...]:
    """The pairs (student block, teacher block) of a map between models of these depths.

    Raises:
        UserError: for a block that one of them has not.
    """
    if layer_map == "last":
        return ((student_layers - 1, teacher_layers - 1),)
    if layer_map == "uniform":
        return tuple(
            (i, -(-(i + 1) * teacher_layers // student_layers) - 1) for i in range(student_layers)
        )
    for pair in layer_map:
        if not (0 <= pair[0] < student_layers and 0 <= pair[1] < teacher_layers):
            raise UserError(
                f"layer_map pairs blocks (student, teacher), counted from 0. Received: {pair}, and "
                f"the student has {student_layers} blocks, the teacher {teacher_layers}."
            )
    return tuple((int(s), int(t)) for s, t in layer_map)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_weight(weight: Any) -> None:
    if not is_number(weight) or weight <= 0:
        raise UserError(
            "The weight of a loss must be a positive number; leave the loss out to have none. "
            f"Received: weight={weight!r}."
        )


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"Unknown {name} {value!r}.{suggest(str(value), known)}")


def _check_layer_map(layer_map: Any) -> None:
    if isinstance(layer_map, str):
        _check_choice("layer_map", layer_map, LAYER_MAPS)
        return
    try:
        sound = bool(layer_map) and all(
            len(pair) == 2 and all(isinstance(i, int) for i in pair) for pair in layer_map
        )
    except TypeError:
        sound = False
    if not sound:
        raise UserError(
            "layer_map must be 'uniform', 'last' or pairs of block numbers (student, teacher), for "
            f"example [(0, 1), (1, 3)]. Received: {layer_map!r}."
        )
