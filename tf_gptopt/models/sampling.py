"""From logits to the next token, and from tokens to text as it comes: numpy only, no TensorFlow.

A sampler is called with `logits` `(batch, vocab_size)` float32 and a `numpy.random.Generator`, and
returns `(batch,)` int64 token ids. The same objects serve Keras models and TFLite files.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError, suggest

Sampler = Callable[[np.ndarray, np.random.Generator], np.ndarray]


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
        ids, kept = _largest(_check(logits), self.k)
        return _pick(ids, _draw(_softmax(kept, self.temperature), rng))


@dataclasses.dataclass(frozen=True)
class TopPSampler:
    """A draw from the fewest most likely tokens whose probabilities reach `p` (nucleus sampling,
    Holtzman et al. 2020); of the `k` most likely alone, if `k` is given."""

    p: float = 0.9
    k: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.p <= 1.0:
            raise UserError(f"top_p must be in (0, 1]. Received: p={self.p}.")
        if self.k is not None:
            _check_k(self.k)
        _check_temperature(self.temperature)

    def __call__(self, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _check(logits)
        if self.k is not None:
            ids, logits = _largest(logits, self.k)
            ids, kept = _nucleus(ids, _softmax(logits, self.temperature), self.p)
        else:
            probabilities = _softmax(logits, self.temperature)
            # sorting 50,000 numbers costs as much as a small model; the nucleus is nearly always
            # among the first few hundred
            ids, head = _largest(probabilities, 512)
            if (head.sum(-1) < self.p).any():
                ids, head = _largest(probabilities, probabilities.shape[-1])
            ids, kept = _nucleus(ids, head, self.p)
        return _pick(ids, _draw(kept, rng))


SAMPLERS: dict[str, type] = {
    "greedy": GreedySampler,
    "random": RandomSampler,
    "top_k": TopKSampler,
    "top_p": TopPSampler,
}


def get_sampler(sampler: str | dict[str, Any] | Sampler) -> Sampler:
    """A sampler from its name (`"top_k"`), a dictionary (`{"name": "top_k", "k": 40}`), or itself.

    Raises:
        UserError: for an unknown name or option (with the nearest known one), or an impossible
            value.
    """
    if callable(sampler):
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
    temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
) -> Sampler:
    """The sampler that these numbers mean: with none of them, or `temperature=0`, greedy.

    Args:
        temperature: divides the logits; default 1 where `top_k` or `top_p` is given, else 0.
        top_k: keep the k most likely tokens.
        top_p: keep the most likely tokens that together reach this probability.

    Raises:
        UserError: for impossible values, and for `top_k` or `top_p` beside `temperature=0`, which
            would do nothing.
    """
    filtered = top_k is not None or top_p is not None
    if temperature is None:
        temperature = 1.0 if filtered else 0.0
    if temperature == 0:
        if filtered:
            raise UserError(
                "temperature=0 is greedy: top_k and top_p have no effect there. "
                "Set temperature above 0, or leave top_k and top_p out."
            )
        return GreedySampler()
    if top_p is not None:
        return TopPSampler(p=top_p, k=top_k, temperature=temperature)
    if top_k is not None:
        return TopKSampler(k=top_k, temperature=temperature)
    return RandomSampler(temperature=temperature)


class TextStream:
    """Turns tokens into pieces of text as they come, and watches for stop strings.

    A character can span tokens (byte-level BPE), and so can a stop string: a piece is held back
    until it can no longer change. The pieces joined are exactly `decode(all tokens)`, up to the
    first stop string, which is left out.

    ```python
    stream = TextStream(tokenizer.decode, stop=["\\n\\n"])
    for token in tokens:
        print(stream.push(token), end="")
        if stream.stopped:
            break
    print(stream.finish())
    ```
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: str | Sequence[str] | None = None
    ) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = as_stop_strings(stop)
        self._tokens: list[int] = []  # those whose characters are not complete yet
        self._given = 0  # characters of theirs that are out already
        self._held = ""  # complete text that may be the start of a stop string

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now (often one piece, sometimes none)."""
        self._tokens.append(int(token))
        text = self._decode(self._tokens)
        if text.endswith("\ufffd"):  # perhaps a character whose last bytes are still to come
            ready = text[self._given : -1]
            self._given = max(len(text) - 1, self._given)
        else:
            ready = text[self._given :]
            self._tokens, self._given = [], 0
        return self._release(ready)

    def finish(self) -> str:
        """What is still held back, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._decode(self._tokens)[self._given :] if self._tokens else ""
        self._tokens, self._given = [], 0
        piece = self._release(rest)
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def as_stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple; an empty one is an error, for it would stop everything."""
    strings: Iterable[str] = (stop,) if isinstance(stop, str) else (stop or ())
    strings = tuple(strings)
    if not all(isinstance(item, str) and item for item in strings):
        raise UserError(f"stop must be one or more non-empty strings. Received: {stop!r}.")
    return strings


def _overlap(text: str, stop: str) -> int:
    """How many last characters of `text` are the first ones of `stop` (fewer than all of it)."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


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


def _largest(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of the `k` largest of each row, in falling order."""
    if k < values.shape[-1]:
        ids = np.argpartition(-values, k - 1, axis=-1)[..., :k]
    else:
        ids = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    order = np.argsort(-_pick_all(values, ids), axis=-1, kind="stable")
    ids = np.take_along_axis(ids, order, -1)
    return ids, _pick_all(values, ids)


def _nucleus(ids: np.ndarray, probabilities: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
    """Zeroes what comes after the first tokens that reach `p`; the rows are in falling order."""
    before = np.cumsum(probabilities, -1) - probabilities  # (batch, candidates)
    return ids, np.where(before < p, probabilities, 0.0)


def _draw(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A column per row, with chances in proportion to `probabilities`."""
    total = np.cumsum(probabilities, -1)
    threshold = rng.random((len(total), 1)) * total[:, -1:]
    return (total <= threshold).sum(-1).clip(max=total.shape[-1] - 1)


def _pick(ids: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.take_along_axis(ids, columns[:, None], -1)[:, 0]


def _pick_all(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, ids, -1)


def _check_k(k: Any) -> None:
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise UserError(f"top_k must be a positive integer. Received: k={k!r}.")


def _check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < float("inf"):
        raise UserError(
            f"temperature must be above 0 (the greedy sampler is the limit at 0). Received: "
            f"temperature={temperature}."
        )
