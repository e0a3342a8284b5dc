"""A file held against its Keras model before it gets its name.

Two questions, because two things can go wrong. Does the file compute what it holds? Keras reads the
same tokens with the file's own weights: what differs then is how the scheme rounds activations, and
nothing else may. How far that goes with this very model is known: `imitation.py` rounds alike. And
is it still the model that was handed in? That is what the scheme costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.imitation import Imitation
from tf_gptopt.tflite.reading import held_weights
from tf_gptopt.tflite.trial import Logits

if TYPE_CHECKING:
    from tf_gptopt.models.gpt import GPTModel

POSITIONS = 72  # tokens to read: beyond 64, the smallest cache, where the context allows it

# Computed distances were 0.94 to 1.18 of the imitation's, and Kullback-Leibler divergences at most
# 1.6 of it: in 15 schemes on 20 untrained models (4 shapes; initial weights, and normal ones of
# deviation 0.02 to 1.5) and on 4 trained ones of 0.5 to 2.6 M parameters, with real text and random
# tokens. The imitation itself was at 0.006 to 0.012 from Keras where activations are rounded row by
# row, 0.02 to 0.06 with fixed ranges, and up to 0.5 where attention is saturated and magnifies any
# rounding. 2 of 72 likeliest tokens changed more than they should, in saturated models 5.
_FACTOR = 2.0
_FLOAT = 0.002  # for the rounding of float32 sums: 4e-7 in most models, 6e-4 in saturated ones
_FLOAT_DIVERGENCE = 1e-4
_CHANGED = 0.1

# Token by token a file rounds as it does at once, but for ties that fall to the other side: 0.024
# at worst.
_ALLOWED_PIECES = 0.05

# A file at this distance from its model carries less signal than noise: one that answers any text
# with equal probabilities for all tokens is no farther away.
_RUINED = 1.0


# Read where nobody hands text over and there is a tokenizer. Random tokens are like no text, and a
# trained model has little to say about them.
_PROSE = """It was late in the year when they came down to the coast. "The ships have gone," she
said, and he did not answer; there was nothing that anybody could have done about it. In 1843 the
town had 4,120 people and two churches.

def read(path: str, limit: int = 100) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [line.strip() for line in file if line][:limit]

The results of the second part are shown in the table below, with those of the first for comparison.
"""


@dataclasses.dataclass(frozen=True)
class ExportCheck:
    """How a file compares with its Keras model. Distances are `logit_distance`s, divergences those
    of Kullback and Leibler, the mean over positions in nats.

    Args:
        positions: tokens that both read.
        text: what these were: `"given"`, `"prose"` in the tokens of the model, or `"random"`.
        computed: distance between the file and Keras with the file's own weights.
        expected: what it is when numpy rounds in the file's place.
        computed_divergence, expected_divergence: the same as divergences from Keras.
        computed_agreement, expected_agreement: the same as shares of positions at which both have
            the same likeliest token.
        pieces: distance between the file's logits when it reads piece by piece and token by token,
            over its cache, and when it reads all at once.
        distance: between the file and the model that was handed in.
        divergence: of the file from that model.
        agreement: share of positions at which these two have the same likeliest token.
    """

    positions: int
    text: str
    computed: float
    expected: float
    computed_divergence: float
    expected_divergence: float
    computed_agreement: float
    expected_agreement: float
    pieces: float
    distance: float
    divergence: float
    agreement: float

    @property
    def allowed(self) -> float:
        """What `computed` may be."""
        return max(_FLOAT, _FACTOR * self.expected)

    @property
    def allowed_pieces(self) -> float:
        """What `pieces` may be."""
        return min(self.allowed, _ALLOWED_PIECES)

    @property
    def allowed_divergence(self) -> float:
        """What `computed_divergence` may be."""
        return max(_FLOAT_DIVERGENCE, _FACTOR**2 * self.expected_divergence)

    @property
    def least_agreement(self) -> float:
        """What `computed_agreement` must be."""
        return self.expected_agreement - _CHANGED

    def to_dict(self) -> dict[str, Any]:
        """For JSON: three digits of each, which do not depend on the number of threads."""
        values = {**dataclasses.asdict(self), "allowed": self.allowed}
        return {n: v if isinstance(v, str) else float(f"{v:.3g}") for n, v in values.items()}


def sample_ids(
    config: GPTConfig, text: Any = None, tokenizer: Any = None
) -> tuple[np.ndarray, str]:
    """The tokens to read, `(time,)` int32, and what they are (`ExportCheck.text`).

    Args:
        config: of the model.
        text: whose first tokens to take, as `calibration_ids` takes it.
        tokenizer: of the model, for prose where there is no text.
    """
    count = min(POSITIONS, config.max_sequence_length)
    if text is not None:
        from tf_gptopt.compression.calibration_text import calibration_ids

        ids = calibration_ids(text, POSITIONS)
        return ids[ids >= 0][:count], "given"  # negative ones are padding
    if tokenizer is not None:
        ids = np.asarray(tokenizer.encode(_PROSE)).reshape(-1)
        # a tokenizer for something else knows next to nothing of it
        if len(np.unique(ids)) > 8 and ids.min() >= 0 and ids.max() < config.vocab_size:
            return np.resize(ids, count).astype(np.int32), "prose"
    return np.random.default_rng(0).integers(0, config.vocab_size, count, np.int32), "random"


def check_logits(
    stored: Mapping[str, Any],
    found: Logits,
    ids: np.ndarray,
    text: str,
    model: GPTModel,
    weights: Mapping[str, np.ndarray],
    quant: QuantConfig,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> ExportCheck:
    """Compare what a file computed with what Keras does.

    Args:
        stored: what the file holds (`reading.read_weights`).
        found: what the file made of `ids`, `(time,)`.
        text: what these are.
        model: the plain model that it was made from. It takes other weights for a moment, because
            to build a second model would take longer than all else here.
        weights: those of `model`.
        quant: the file's scheme.
        ranges: of static activations.
    """
    from tf_gptopt.models.checkpoints import assign_weights

    held = held_weights(stored, {name: array.shape for name, array in weights.items()})
    model = _in_float32(model, weights)
    wanted = _logits(model, ids)
    try:
        assign_weights(model, held)
        exact = _logits(model, ids)
    finally:
        assign_weights(model, weights)
    activation = model.get_layer("block_0_gelu")
    imitation = Imitation(
        model.config, held, quant, ranges or {}, lambda x: activation(x, training=False).numpy()
    )
    rounded, file = imitation.logits(ids), found.at_once
    return ExportCheck(
        positions=len(ids),
        text=text,
        computed=logit_distance(file, exact),
        expected=logit_distance(rounded, exact),
        computed_divergence=divergence(file, exact),
        expected_divergence=divergence(rounded, exact),
        computed_agreement=_agreement(file, exact),
        expected_agreement=_agreement(rounded, exact),
        pieces=logit_distance(found.pieces, file[found.rows]),
        distance=logit_distance(file, wanted),
        divergence=divergence(file, wanted),
        agreement=_agreement(file, wanted),
    )


def require_good(check: ExportCheck, scheme: str) -> None:
    """Refuse a file that failed.

    Raises:
        UserError: with the figures, when the file computes something else than it holds, reads
            otherwise piece by piece, or says nothing of what its model does.
    """
    figures = (
        f"on {check.positions} tokens ({check.text}) its logits are {check.computed:.2g} away from "
        f"those of Keras with its weights (allowed for {scheme!r} and this model: "
        f"{check.allowed:.2g}), divergence {check.computed_divergence:.2g} (allowed: "
        f"{check.allowed_divergence:.2g}), likeliest tokens alike {check.computed_agreement:.0%} "
        f"(at least: {check.least_agreement:.0%}), {check.pieces:.2g} from its own when it reads "
        f"in pieces (allowed: {check.allowed_pieces:.2g}), {check.distance:.2g} from the model's "
        f"(allowed: less than {_RUINED:g}), with which it agrees on {check.agreement:.0%} of the "
        "likeliest tokens"
    )
    if not (  # NaN is refused too
        check.computed <= check.allowed
        and check.computed_divergence <= check.allowed_divergence
        and check.computed_agreement >= check.least_agreement
        and check.pieces <= check.allowed_pieces
    ):
        raise UserError(
            f"The file was refused, because it does not compute what it holds: {figures}. Nothing "
            "was written. Try `pip install -U ai-edge-litert`, or another scheme."
        )
    if not check.distance < _RUINED:
        raise UserError(
            f"The file was refused, because nothing of the model is left in it: {figures}. Nothing "
            "was written. Take more bits, a finer granularity or another range for the weights."
        )


def logit_distance(logits: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference, in units of that of `reference`.

    Each row of both, `(time, vocab_size)`, is taken less its mean, which no probability sees: so 0
    is equal, and equal logits for all tokens are at 1. A `reference` of these itself is measured in
    ten thousandths of its size: below them is the rounding of float32 sums.
    """
    size = float(np.abs(reference).max())
    logits, reference = (x - x.mean(-1, keepdims=True) for x in (logits, reference))
    return _rms(logits - reference) / max(_rms(reference), 1e-4 * size, 1e-30)


def divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """Kullback-Leibler divergence of the probabilities from those of `reference`, both `(time,
    vocab_size)`: the mean over positions, in nats."""
    ours, theirs = _log_softmax(logits), _log_softmax(reference)
    return float(np.mean((np.exp(theirs) * (theirs - ours)).sum(-1)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _agreement(logits: np.ndarray, reference: np.ndarray) -> float:
    return float(np.mean(logits.argmax(-1) == reference.argmax(-1)))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x), dtype=np.float64)))


def _logits(model: GPTModel, ids: np.ndarray) -> np.ndarray:
    return model(ids[None], training=False)[0].numpy()


def _in_float32(model: GPTModel, weights: Mapping[str, np.ndarray]) -> GPTModel:
    """`model`, or under another dtype policy a copy: files compute in float32."""
    policy = model.dtype_policy
    if policy.compute_dtype == policy.variable_dtype == "float32":
        return model
    from tf_gptopt.compression.quantization.copying import plain_copy
    from tf_gptopt.models.checkpoints import assign_weights

    model = plain_copy(model, "float32")
    assign_weights(model, weights)
    return model
