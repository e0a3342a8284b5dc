"""From logits to the next token: numpy only, no TensorFlow.

A sampler is called with `logits` `(batch, vocab_size)` float32 and a `numpy.random.Generator`, and
returns `(batch,)` int64 token ids. The same objects serve Keras models and TFLite files.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError, suggest

Sampler = Callable[[np.ndarray, "np.random.Generator"], np.ndarray]


@dataclasses.dataclass(frozen=True)
class GreedySampler:
    """The most likely token (the lowest id among equals)."""

    def __call__(self, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _check(logits).argmax(-1)


@dataclasses.dataclass(frozen=True)
class RandomSampler:
    """A draw from softmax(logits / temperature)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(self, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _draw(_softmax(_check(logits), self.temperature), rng)


@dataclasses.dataclass(frozen=True)
class TopKSampler:
    """A draw from the `k` most likely tokens (Fan et al. 2018)."""

    k: int = 5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_k(self.k)
        _check_temperature(self.temperature)

    def __call__(self, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        ids, kept = largest(_check(logits), self.k)
        return _pick(ids, _draw(_softmax(kept, self.temperature), rng))


@dataclasses.dataclass(frozen=True)
class TopPSampler:
    """A draw from the fewest most likely tokens whose probabilities reach `p` (nucleus sampling,
    Holtzman et al. 2020); of the `k` most likely alone, and of those at least `min_p` times as
    likely as the likeliest, where these are given."""

    p: float = 0.9
    k: int | None = None
    temperature: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.p <= 1.0:
            raise UserError(f"top_p must be in (0, 1]. Received: p={self.p}.")
        if self.k is not None:
            _check_k(self.k)
        _check_temperature(self.temperature)
        if self.min_p:
            _check_min_p(self.min_p)

    def __call__(self, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _check(logits)
        if self.k is not None:
            ids, logits = largest(logits, self.k)
            kept = _nucleus(_softmax(logits, self.temperature), self.p, self.min_p)
        else:
            probabilities = _softmax(logits, self.temperature)
            # sorting 50,000 numbers costs as much as a small model; the nucleus is nearly always
            # among the first few hundred
            count = 512
            ids, head = largest(probabilities, count)
            while (head.sum(-1) < self.p).any() and count < probabilities.shape[-1]:
                count *= 8
                ids, head = largest(probabilities, count)
            kept = _nucleus(head, self.p, self.min_p)
        return _pick(ids, _draw(kept, rng))


@dataclasses.dataclass(frozen=True)
class MinPSampler:
    """A draw from the tokens at least `p` times as likely as the likeliest, at this temperature
    (Nguyen et al. 2024, arXiv:2407.01082)."""

    p: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_min_p(self.p)
        _check_temperature(self.temperature)

    def __call__(self, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # a ratio of probabilities is a difference of logits: few of them ever need a softmax
        lowest = _check(logits).max(-1, keepdims=True) + self.temperature * np.log(self.p)
        count = int((logits >= lowest).sum(-1).max())
        if count > 1024:  # not worth sorting
            kept = np.where(logits >= lowest, logits, -np.inf)
            return _draw(_softmax(kept, self.temperature), rng)
        ids, kept = largest(logits, count)
        kept = np.where(kept >= lowest, kept, -np.inf)
        return _pick(ids, _draw(_softmax(kept, self.temperature), rng))


@dataclasses.dataclass(frozen=True)
class BeamSampler:
    """Beam search: the `num_beams` likeliest continuations go on together, and the one wins whose
    log-probability divided by (its number of new tokens) ** `length_penalty` is largest.

    It is searched for by `models.beam_search`, not drawn: Keras models alone have it.
    """

    num_beams: int = 4
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not is_count(self.num_beams):
            raise UserError(
                f"num_beams must be a positive integer. Received: num_beams={self.num_beams!r}."
            )
        if not -float("inf") < self.length_penalty < float("inf"):
            raise UserError(
                "length_penalty must be a finite number; above 0 favours long completions, below "
                f"0 short ones. Received: length_penalty={self.length_penalty}."
            )


SAMPLERS: dict[str, type] = {
    "greedy": GreedySampler,
    "random": RandomSampler,
    "top_k": TopKSampler,
    "top_p": TopPSampler,
    "min_p": MinPSampler,
    "beam": BeamSampler,
}


def get_sampler(sampler: str | dict[str, Any] | Sampler | BeamSampler) -> Sampler | BeamSampler:
    """A sampler from its name (`"top_k"`), a dictionary (`{"name": "top_k", "k": 40}`), or itself.

    Raises:
        UserError: for an unknown name or option (with the nearest known one), or an impossible
            value.
    """
    if callable(sampler) or isinstance(sampler, BeamSampler):
        return sampler
    if isinstance(sampler, str):
        sampler = {"name": sampler}
    if not isinstance(sampler, dict) or "name" not in sampler:
        raise UserError(
            'A sampler is a name, a dictionary such as {"name": "top_k", "k": 40}, or a function '
            f"of (logits, rng). Received: {sampler!r}."
        )
    options = dict(sampler)
    name = options.pop("name")
    if name not in SAMPLERS:
        raise UserError(f"Unknown sampler {name!r}.{suggest(str(name), SAMPLERS)}")
    known = list(inspect.signature(SAMPLERS[name]).parameters)
    for key in options:
        if key not in known:
            hint = suggest(key, known) if known else " It takes none."
            raise UserError(f"Unknown option {key!r} of sampler {name!r}.{hint}")
    return SAMPLERS[name](**options)


def make_sampler(
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Sampler:
    """The sampler that these numbers mean: with none of them, or `temperature=0`, greedy.

    Args:
        temperature: divides the logits; default 1 where another of these is given, else 0.
        top_k: keep the k most likely tokens.
        top_p: keep the most likely tokens that together reach this probability.
        min_p: keep the tokens at least this many times as likely as the likeliest.

    Raises:
        UserError: for impossible values, and for filters beside `temperature=0`, which would do
            nothing.
    """
    filtered = (top_k, top_p, min_p) != (None, None, None)
    if temperature is None:
        temperature = 1.0 if filtered else 0.0
    if temperature == 0:
        if filtered:
            raise UserError(
                "temperature=0 is greedy: top_k, top_p and min_p have no effect there. "
                "Set temperature above 0, or leave them out."
            )
        return GreedySampler()
    if min_p is not None:
        _check_min_p(min_p)
    if top_p is not None or (top_k is not None and min_p is not None):
        p = 1.0 if top_p is None else top_p
        return TopPSampler(p=p, k=top_k, temperature=temperature, min_p=min_p or 0.0)
    if top_k is not None:
        return TopKSampler(k=top_k, temperature=temperature)
    if min_p is not None:
        return MinPSampler(p=min_p, temperature=temperature)
    return RandomSampler(temperature=temperature)


def largest(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of the `k` largest of each row, in falling order."""
    if (others := values.shape[-1] - k) > 0:
        ids = np.argpartition(values, others, axis=-1)[..., others:]
    else:
        ids = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    order = np.argsort(-_pick_all(values, ids), axis=-1, kind="stable")
    ids = np.take_along_axis(ids, order, -1)
    return ids, _pick_all(values, ids)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of softmax(logits), float64 of the same shape; the last axis sums to 1."""
    shifted = logits - logits.max(-1, keepdims=True).astype(np.float64)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _check(logits: np.ndarray) -> np.ndarray:
    if not np.isfinite(logits.max(-1)).all():  # a NaN anywhere makes the maximum NaN
        raise UserError(
            "The logits hold NaN or infinity, so no token can be chosen: the model's weights have "
            "diverged or are damaged. Take an earlier checkpoint, or export the model again."
        )
    return logits


def _softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64)
    scaled = np.exp((scaled - scaled.max(-1, keepdims=True)) / temperature)
    return scaled / scaled.sum(-1, keepdims=True)


def _nucleus(probabilities: np.ndarray, p: float, min_p: float) -> np.ndarray:
    """Zeroes what comes after the first tokens that reach `p`, and what is less than `min_p` times
    as likely as the first; the rows are in falling order."""
    before = np.cumsum(probabilities, -1) - probabilities  # (batch, candidates)
    keep = (before < p) & (probabilities >= min_p * probabilities[:, :1])
    return np.where(keep, probabilities, 0.0)


def _draw(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A column per row, with chances in proportion to `probabilities`."""
    total = np.cumsum(probabilities, -1)
    threshold = rng.random((len(total), 1)) * total[:, -1:]
    return (total <= threshold).sum(-1).clip(max=total.shape[-1] - 1)


def _pick(ids: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.take_along_axis(ids, columns[:, None], -1)[:, 0]


def _pick_all(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, ids, -1)


def is_count(value: Any) -> bool:
    """Whether it is an integer of 1 or more."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1


def _check_k(k: Any) -> None:
    if not is_count(k):
        raise UserError(f"top_k must be a positive integer. Received: k={k!r}.")


def _check_min_p(p: float) -> None:
    if not 0.0 < p <= 1.0:
        raise UserError(
            "min_p must be in (0, 1]: tokens less likely than that share of the likeliest are left "
            f"out. Received: min_p={p}."
        )


def _check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < float("inf"):
        raise UserError(
            f"temperature must be above 0 (the greedy sampler is the limit at 0). Received: "
            f"temperature={temperature}."
        )
