"""`shrink`: a smaller dense model out of a larger one, whose best parts it keeps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.compression.calibration import Progress
from tf_gptopt.compression.calibration_text import calibration_ids, check_ids
from tf_gptopt.compression.pruning.pruner import strip_pruning
from tf_gptopt.compression.structured.budget import spend
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.compression.structured.gates import GatedGPT
from tf_gptopt.compression.structured.importance import importance
from tf_gptopt.compression.structured.surgery import Units, all_units, extract
from tf_gptopt.models.checkpoints import named_weights
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.counting import token_flops, weight_count
from tf_gptopt.models.finite import check_finite
from tf_gptopt.models.gpt import GPTModel, require_gpt


def shrink(
    model: GPTModel,
    target: ShrinkConfig | int | Sequence[int] | None = None,
    calibration: Any = None,
    *,
    layers: int | Sequence[int] | None = None,
    on_progress: Progress | None = None,
) -> GPTModel:
    """A smaller copy of `model`: some of its blocks, heads, neurons and channels, the best ones.

    ```python
    student = shrink(teacher, layers=6)     # of 12 blocks: 0, 2, 4, 7, 9, 11
    student = shrink(teacher, ShrinkConfig(parameters=0.67), calibration=dataset)
    print(describe_shrink(teacher, student))
    ```

    What is taken out is gone: the result is an ordinary dense model whose blocks may differ in
    shape. Train it on afterwards, best by distilling from `model`.

    Zeros that pruning has made come along with the parts that stay. An N:M pattern holds on only
    where no input was taken out, as the inputs that remain make other groups: prune again, by the
    same pattern, once the model has its shape.

    A number of blocks without calibration keeps that many evenly spaced, the first and the last
    among them: the choice of DistilGPT2 (Hugging Face, 2019), which follows DistilBERT's finding
    that a student copied from its teacher's layers learns far better than a fresh one (Sanh et al.
    2019, arXiv:1910.01108). With calibration the most important blocks stay.

    Args:
        model: a `GPTModel`; it stays untouched. One that is being pruned is stripped first.
        target: a `ShrinkConfig`, or what its `layers` may be: how many blocks to keep, or which.
        calibration: text of the kind that the model is for, to rank its parts on: token ids
            `(examples, time)`, a `tf.data.Dataset` or a `TokenDataset` (of which 128 are taken).
        layers: another way to say `target`.
        on_progress: called with what is done, what is to do, and its name.

    Returns:
        A new, plain `GPTModel` with copied weights, the same dtype policy and tokenizer, made in
        the current strategy scope and not compiled; `.config` says its shape.

    Raises:
        UserError: when `model` is no GPTModel, is quantization-aware or has not these parts, the
            budget cannot be met, or calibration is missing or not for this model.
    """
    require_gpt(model)
    config = _as_config(target, layers)
    config.check_fits(model.config)
    if config.needs_calibration and calibration is None:
        raise UserError(
            "Choosing what to cut takes text to measure on. Expected: shrink(model, config, "
            "calibration=...) with token ids (examples, time), a tf.data.Dataset or a "
            "TokenDataset. A number of layers alone needs none."
        )
    model = strip_pruning(model)
    check_finite(named_weights(model))
    ranks = config.needs_calibration or isinstance(config.layers, int)
    if calibration is None or not ranks:
        kept = all_units(model.config)
        return extract(model, kept._replace(layers=_without_scores(config, model.config)))
    ids = check_ids(model, calibration_ids(calibration))
    if ids.shape[1] < 2:
        raise UserError(
            "Calibration measures the loss of the next token, which takes examples of 2 tokens or "
            f"more. Received: {ids.shape[1]}."
        )
    gpt = GatedGPT(named_weights(model), model.config)
    if config.budget is not None:
        flops = functools.partial(token_flops, length=model.config.max_sequence_length)
        cost = weight_count if config.budget == "parameters" else flops
        amount = getattr(config, config.budget)
        allowed = int(amount * cost(model.config)) if isinstance(amount, float) else amount
        return extract(model, spend(gpt, ids, allowed, cost, config, on_progress))
    scores = importance(gpt, ids, config.importance, on_progress)
    return extract(model, _fill_shape(config, model.config, scores))


def evenly_spaced(keep: int, num_layers: int) -> tuple[int, ...]:
    """`keep` of the blocks `0 ... num_layers - 1`, the first and (for two or more) the last too."""
    return tuple(int(i) for i in np.round(np.linspace(0, num_layers - 1, keep)))


def describe_shrink(before: GPTModel | GPTConfig, after: GPTModel | GPTConfig) -> str:
    """What shrinking took, in a few lines for people."""
    old, new = (getattr(model, "config", model) for model in (before, after))

    def fell(name: str, was: float, now: float) -> str:
        return f"{name:<12} {was:>15,} -> {now:>15,}  ({now / was - 1:+.1%})"

    def sizes(name: str, was: tuple[int, ...], now: tuple[int, ...]) -> str:
        return f"{name:<12} {' '.join(map(str, was))} -> {' '.join(map(str, now))}"

    length = old.max_sequence_length
    return "\n".join(
        [
            fell("parameters", weight_count(old), weight_count(new)),
            fell("FLOPs/token", token_flops(old, length), token_flops(new, length)),
            fell("blocks", old.num_layers, new.num_layers),
            fell("width", old.embedding_dim, new.embedding_dim),
            sizes("heads", old.block_heads, new.block_heads),
            sizes("neurons", old.block_intermediate_dims, new.block_intermediate_dims),
        ]
    )


def _as_config(target: Any, layers: Any) -> ShrinkConfig:
    if target is not None and layers is not None:
        raise UserError(
            f"shrink takes one target. Received: target={target!r} and layers={layers!r}. Say "
            "layers inside the ShrinkConfig."
        )
    wanted = layers if target is None else target
    return wanted if isinstance(wanted, ShrinkConfig) else ShrinkConfig(layers=wanted)


def _without_scores(config: ShrinkConfig, shape: GPTConfig) -> np.ndarray:
    if isinstance(config.layers, tuple):
        return np.array(config.layers)
    return np.array(evenly_spaced(config.layers, shape.num_layers))


def _fill_shape(config: ShrinkConfig, shape: GPTConfig, scores: Units) -> Units:
    """The best units of the shape that was asked for."""
    if config.layers is None:
        layers = list(range(shape.num_layers))
    elif isinstance(config.layers, tuple):
        layers = list(config.layers)
    else:
        layers = _best(scores.layers, config.layers).tolist()

    def sizes(name: str, there: tuple[int, ...]) -> dict[int, int]:
        wanted = getattr(config, name)
        if isinstance(wanted, tuple) and len(wanted) != len(layers):
            raise UserError(
                f"{name} must be one number or one per block that stays ({len(layers)}). "
                f"Received: {name}={wanted}."
            )
        each = wanted if isinstance(wanted, tuple) else (wanted,) * len(layers)
        chosen = dict(zip(layers, each, strict=True))
        for i, count in chosen.items():
            if count is not None and count > there[i]:
                raise UserError(
                    f"Block {i} has {there[i]} of {name}; shrinking makes no new ones. "
                    f"Received: {name}={wanted}."
                )
        return {i: count or there[i] for i, count in chosen.items()}

    heads = sizes("num_heads", shape.block_heads)
    neurons = sizes("intermediate_dim", shape.block_intermediate_dims)
    return Units(
        np.array(layers),
        [_best(values, heads.get(i, 0)) for i, values in enumerate(scores.heads)],
        [_best(values, neurons.get(i, 0)) for i, values in enumerate(scores.neurons)],
        _best(scores.channels, config.embedding_dim or shape.embedding_dim),
    )


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest, in their old order."""
    return np.sort(np.argsort(scores, kind="stable")[len(scores) - count :])
