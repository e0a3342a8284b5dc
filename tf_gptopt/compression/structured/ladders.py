"""How far each group of units has been cut, how far it may be, and what that is known to cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.compression.structured.gates import open_gates
from tf_gptopt.compression.structured.surgery import Units
from tf_gptopt.models.config import GPTConfig


class Group(NamedTuple):
    """Units that one decision is about: an axis of `AXES`, and a block, which width has not."""

    axis: str
    block: int = 0


@dataclasses.dataclass
class Ladder:
    """One group.

    Attributes:
        sizes: how many units stay at each level: all of them at level 0, then ever fewer.
        scores: of its units.
        order: its units, the first to go first.
        damage: nats of loss that each level adds to the model's, as far as it was measured.
        reach: the last level that was measured.
    """

    sizes: tuple[int, ...]
    scores: np.ndarray
    order: np.ndarray
    damage: np.ndarray
    reach: int = 0

    def gone(self, level: int) -> np.ndarray:
        """The units that are not there at this level."""
        return self.order[: self.sizes[0] - self.sizes[level]]

    def kept(self, level: int) -> np.ndarray:
        """The units that are, ascending."""
        return np.sort(self.order[self.sizes[0] - self.sizes[level] :])


Levels = dict[Group, int]


class Cuts:
    """All groups of a model, each on a level of its ladder."""

    def __init__(self, config: GPTConfig, shrinking: ShrinkConfig) -> None:
        self.config = config
        self.ladders = {
            group: Ladder(sizes, np.zeros(sizes[0]), np.arange(sizes[0]), np.zeros(len(sizes)))
            for group, sizes in _sizes(config, shrinking).items()
        }
        self.levels: Levels = dict.fromkeys(self.ladders, 0)

    def size(self, group: Group, levels: Levels | None = None) -> int:
        """Units of a group that stay."""
        return self.ladders[group].sizes[(levels or self.levels)[group]]

    def alive(self, levels: Levels | None = None) -> list[int]:
        """The blocks that stay."""
        blocks = range(self.config.num_layers)
        return [i for i in blocks if self.size(Group("layers", i), levels)]

    def can_fall(self, group: Group) -> bool:
        """Whether the group may lose more, however far it was measured."""
        alive = self.alive()
        if group.axis == "layers" and alive == [group.block]:
            return False
        inside_of_none = group.axis in ("heads", "neurons") and group.block not in alive
        return not inside_of_none and self.levels[group] < len(self.ladders[group].sizes) - 1

    def neighbours(self, step: int) -> list[Levels]:
        """The levels one cut further (`step=1`) or less far (`step=-1`) in one of the groups."""
        alive, result = self.alive(), []
        for group, level in self.levels.items():
            if group.axis in ("heads", "neurons") and group.block not in alive:
                continue
            fits = level < self.ladders[group].reach and self.can_fall(group) if step > 0 else level
            if fits:
                result.append({**self.levels, group: level + step})
        return result

    def inside(self, block: int, levels: Levels | None = None) -> float:
        """Nats that the cuts inside a block add to the loss."""
        levels = levels or self.levels
        both = Group("heads", block), Group("neurons", block)
        return float(sum(self.ladders[group].damage[levels[group]] for group in both))

    def damage(self, levels: Levels) -> float:
        """Nats that the cuts are expected to add to the loss."""
        width, total = Group("width"), 0.0
        total += self.ladders[width].damage[levels[width]]
        for i in range(self.config.num_layers):
            layer = Group("layers", i)
            gone = self.ladders[layer].damage[levels[layer]]
            total += max(self.inside(i, levels), gone)  # a block that goes takes its cuts along
        return float(total)

    def rank(self, scores: Units) -> None:
        """Take new scores for the units that are still there."""
        for group, ladder in self.ladders.items():
            if group.axis == "layers":
                ladder.scores = scores.layers[[group.block]]
                continue
            ladder.scores = _of(scores, group)
            gone = ladder.gone(self.levels[group])
            left = ladder.order[len(gone) :]
            by_score = left[np.argsort(ladder.scores[left], kind="stable")]
            ladder.order = np.concatenate([gone, by_score])

    def gates(self) -> Units:
        """Gates that are closed for every unit that is gone, `(1, units)` each."""
        gates = open_gates(self.config)
        for group, level in self.levels.items():
            close(gates, group, self.ladders[group].gone(level))
        return gates

    def kept(self) -> Units:
        """The units that stay."""

        def of(axis: str, block: int = 0) -> np.ndarray:
            group = Group(axis, block)
            return self.ladders[group].kept(self.levels[group])

        blocks = range(self.config.num_layers)
        return Units(
            np.array(self.alive()),
            [of("heads", i) for i in blocks],
            [of("neurons", i) for i in blocks],
            of("width"),
        )

    def least(self, cost: Callable[[GPTConfig], int]) -> int:
        """The cost that every way down the ladders can reach, whichever block stays the last."""
        fewest = {group: ladder.sizes[-1] for group, ladder in self.ladders.items()}
        blocks = [
            (fewest[Group("heads", i)], fewest[Group("neurons", i)])
            for i in range(self.config.num_layers)
        ]

        def of(blocks: list[tuple[int, int]]) -> int:
            return cost(
                dataclasses.replace(
                    self.config,
                    embedding_dim=fewest[Group("width")],
                    num_layers=len(blocks),
                    num_heads=tuple(heads for heads, _ in blocks),
                    intermediate_dim=tuple(neurons for _, neurons in blocks),
                )
            )

        return of(blocks) if fewest[Group("layers", 0)] else max(of([block]) for block in blocks)


def close(gates: Units, group: Group, gone: np.ndarray) -> None:
    """Close the gates of a group's units, in place."""
    _of(gates, group)[..., gone] = 0.0


def _of(units: Units, group: Group) -> np.ndarray:
    if group.axis == "width":
        return units.channels
    if group.axis == "layers":
        return units.layers[..., group.block : group.block + 1]
    return getattr(units, group.axis)[group.block]


def _sizes(config: GPTConfig, shrinking: ShrinkConfig) -> dict[Group, tuple[int, ...]]:
    """The ladder of every group; one that is on none of the axes has its full size alone."""

    def multiples(axis: str, most: int, multiple: int) -> tuple[int, ...]:
        fewer = range((most - 1) // multiple * multiple, 0, -multiple)
        return (most, *fewer) if axis in shrinking.axes else (most,)

    sizes = {Group("width"): multiples("width", config.embedding_dim, shrinking.width_multiple)}
    blocks = zip(config.block_heads, config.block_intermediate_dims, strict=True)
    for i, (heads, neurons) in enumerate(blocks):
        may_go = "layers" in shrinking.axes and config.num_layers > 1
        sizes[Group("layers", i)] = (1, 0) if may_go else (1,)
        sizes[Group("heads", i)] = multiples("heads", heads, 1)
        sizes[Group("neurons", i)] = multiples("neurons", neurons, shrinking.neuron_multiple)
    return sizes
