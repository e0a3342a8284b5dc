"""Spending a budget of weights or operations where it hurts least.

Importances rank units of one kind; they say nothing about a head against a block. The common
currency is what a cut really costs: **loss on calibration data, measured**. For every group of
units (the heads of a block, its neurons, the block itself, the channels) some of the least
important ones are closed by gates, exactly as if they were gone, and the loss is computed; between
such probes it is spread by importance. Taylor scores alone would be a currency too, but a poor one:
they hold near the whole model, and a model without a block is not near it.

The cheapest cut is made first: the least loss for each weight (or operation) saved. Cuts do not add
up, though: with one half of the MLPs gone, the other half is worth more. So the way to the budget
is divided into steps of an eighth at most, all is ranked and measured again after each, and no
group goes further in one step than it was probed. At last, what was cut beyond the budget is given
back where it is worth most, until nothing more could be given back within it.

What a cut costs before training is not what it costs after: recovered by training, width loses less
than depth (Muralidharan et al. 2024, arXiv:2407.14679), while depth saves more time a weight.
Choose the axes with that in mind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.compression.calibration import Progress
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.compression.structured.gates import GatedGPT
from tf_gptopt.compression.structured.importance import importance
from tf_gptopt.compression.structured.ladders import Cuts, Group, Levels
from tf_gptopt.compression.structured.probing import Probe
from tf_gptopt.compression.structured.surgery import Units
from tf_gptopt.models.config import GPTConfig

STEP = 1 / 8  # of the model, between two measurements
PROBES = (0.25, 0.5)  # fractions of what a group can still lose


def spend(
    gpt: GatedGPT,
    token_ids: np.ndarray,
    target: int,
    cost: Callable[[GPTConfig], int],
    config: ShrinkConfig,
    on_progress: Progress | None = None,
) -> Units:
    """The units to keep, so that what is left costs `target` at most.

    Args:
        gpt: the whole model.
        token_ids: `(examples, time)` int32.
        target: the budget.
        cost: what a shape comes to, a sum over blocks.
        config: axes, multiples and importance.
        on_progress: called with what is done, what is to do, and its name.

    Raises:
        UserError: when the budget is below the smallest model that the axes allow.
    """
    cuts = Cuts(gpt.config, config)
    least = cuts.least(cost)
    if least > target:
        raise UserError(
            f"The budget cannot be met: {target:,} {config.budget} are allowed, and {least:,} are "
            f"left when {', '.join(config.axes)} are cut as far as they go. Allow more, cut along "
            "more axes, or take smaller multiples."
        )
    spending = Spending(cuts, cost)
    whole = spending.cost()
    steps = max(1, math.ceil(math.log(target / whole) / math.log(1 - STEP) - 1e-9))
    step = 0
    while spending.cost() > target:
        step += 1
        gates, tell = cuts.gates(), _named(on_progress, f"step {step} of {max(step, steps)}: ")
        cuts.rank(importance(gpt, token_ids, config.importance, tell, gates))
        measure(cuts, Probe(gpt, token_ids, gates), tell)
        goal = int(whole * (target / whole) ** (step / steps)) if step < steps else target
        spending.cut(goal)
    spending.give_back(target)
    return cuts.kept()


def _named(on_progress: Progress | None, prefix: str) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total, what: on_progress(done, total, prefix + what)


def measure(cuts: Cuts, probe: Probe, on_progress: Progress | None = None) -> None:
    """Probe every group that can be cut further, and write its damage into its ladder."""
    groups = [group for group in cuts.ladders if cuts.can_fall(group)]
    for done, group in enumerate(groups, 1):
        ladder, level = cuts.ladders[group], cuts.levels[group]
        further = len(ladder.sizes) - 1 - level
        probes = sorted({level + max(1, round(part * further)) for part in PROBES})
        losses = [probe(group, ladder.gone(p)) for p in probes]
        # units go in the order of their scores: a step down is worth what goes with it
        worth = np.array([ladder.scores[ladder.gone(p)].sum() for p in range(len(ladder.sizes))])
        worth += np.arange(len(worth)) * max(1e-9 * worth[-1], 1e-30)  # all scores may be 0
        before = cuts.inside(group.block) if group.axis == "layers" else ladder.damage[level]
        damage = before + np.maximum.accumulate([0.0, *losses])
        ladder.damage[level + 1 :] = np.interp(worth, worth[[level, *probes]], damage)[level + 1 :]
        ladder.reach = probes[-1]
        if on_progress is not None:
            on_progress(done, len(groups), f"loss without some of the {group.axis}")


class Spending:
    """Which cut is the cheapest, by the ladders' damage and by what a shape costs."""

    def __init__(self, cuts: Cuts, cost: Callable[[GPTConfig], int]) -> None:
        self._cuts, self._cost = cuts, cost
        self._known: dict[tuple[int, ...], int] = {}

    def cut(self, goal: int) -> None:
        """Cut until `cost() <= goal`, or as far as was measured."""
        cuts = self._cuts
        cost, damage = self.cost(), cuts.damage(cuts.levels)
        while cost > goal:
            best = None
            for levels in cuts.neighbours(1):
                after, hurt = self.cost(levels), cuts.damage(levels)
                saved = min(cost - after, cost - goal)  # more than was asked for is worth nothing
                if saved > 0 and (best is None or (hurt - damage) / saved < best[0]):
                    best = ((hurt - damage) / saved, levels, after, hurt)
            if best is None:
                return
            _, cuts.levels, cost, damage = best

    def give_back(self, target: int) -> None:
        """Take cuts back, the most harmful first, as long as `cost() <= target`."""
        cuts = self._cuts
        while True:
            cost, damage = self.cost(), cuts.damage(cuts.levels)
            options = []
            for levels in cuts.neighbours(-1):
                after = self.cost(levels)
                if after <= target:
                    healed = damage - cuts.damage(levels)
                    options.append((healed / (after - cost), after, levels))
            if not options:
                return
            cuts.levels = max(options, key=lambda option: option[:2])[2]

    def cost(self, levels: Levels | None = None) -> int:
        """What the model costs after the cuts."""
        cuts = self._cuts
        width = cuts.size(Group("width"), levels)
        total = self._of_block(width)
        for i in cuts.alive(levels):
            heads, neurons = (cuts.size(Group(a, i), levels) for a in ("heads", "neurons"))
            total += self._of_block(width, heads, neurons)
        return total

    def _of_block(self, width: int, heads: int = 0, neurons: int = 0) -> int:
        """The cost of a block, and without a block of everything else."""
        key = (width, heads, neurons)
        if key not in self._known:
            shape = {"num_heads": heads or 1, "intermediate_dim": neurons or 1}
            one, two = (
                self._cost(
                    dataclasses.replace(
                        self._cuts.config, embedding_dim=width, num_layers=layers, **shape
                    )
                )
                for layers in (1, 2)
            )
            self._known[key] = two - one if heads else 2 * one - two
        return self._known[key]
