"""A file held against its Keras model before it gets its name.

Two questions, because two things can go wrong. Does the file compute what it holds? Keras reads the
same tokens with the file's own weights: what differs then is how the scheme rounds activations, and
nothing else may. And is it still the model that was handed in? That is what the scheme costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import BITS, QuantConfig
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.reading import held_weights
from tf_gptopt.tflite.trial import Logits

if TYPE_CHECKING:
    from tf_gptopt.models.gpt import GPTModel

POSITIONS = 72  # tokens to read: beyond 64, the smallest cache, where the context allows it

# How far a file may be from Keras with the same weights, by what is rounded while it computes.
# Measured in 15 schemes on 25 untrained models (5 shapes; initial weights, and normal ones of
# deviation 0.02 to 1.5) and in 9 on a trained one of 2.6 M parameters. The distances were, with
# initial and trained weights and at worst, where attention is saturated and magnifies any rounding:
#   nothing                        4e-7    2.5e-4
#   the cache                      0.0011  0.09
#   activations, each by its row     0.008   0.26
#   activations, by fixed ranges   0.04    0.30
# Without the mask that hides later tokens it is 0.11 with initial weights, and 0.43 with others.
_ALLOWED = {"float": 0.002, "cache": 0.2, "dynamic": 0.4, "static": 0.5}

# Token by token a file rounds as it does at once, but for ties that fall to the other side: 0.024
# at worst.
_ALLOWED_PIECES = 0.05

# A file at this distance from its model carries less signal than noise: one that answers any text
# with equal probabilities for all tokens is no farther away.
_RUINED = 1.0


@dataclasses.dataclass(frozen=True)
class ExportCheck:
    """How a file compares with its Keras model. Distances are `logit_distance`s.

    Args:
        positions: tokens that both read.
        computed: distance between the file and Keras with the file's own weights.
        pieces: distance between the file's logits when it reads piece by piece and token by token,
            over its cache, and when it reads all at once.
        allowed: what `computed` may be in this scheme.
        distance: between the file and the model that was handed in.
        agreement: share of positions at which these two have the same likeliest token.
    """

    positions: int
    computed: float
    pieces: float
    allowed: float
    distance: float
    agreement: float

    def to_dict(self) -> dict[str, float]:
        """For JSON: three digits of each, which do not depend on the number of threads."""
        values = dataclasses.asdict(self)
        return {name: float(f"{value:.3g}") for name, value in values.items()}


def sample_ids(config: GPTConfig, calibration: Any = None) -> np.ndarray:
    """The tokens to read, `(time,)` int32: the first of the calibration text, or random ones."""
    count = min(POSITIONS, config.max_sequence_length)
    if calibration is None:
        return np.random.default_rng(0).integers(0, config.vocab_size, count, np.int32)
    from tf_gptopt.compression.calibration import calibration_ids

    return calibration_ids(calibration, POSITIONS).reshape(-1)[:count]


def check_logits(
    stored: Mapping[str, Any],
    found: Logits,
    ids: np.ndarray,
    model: GPTModel,
    weights: Mapping[str, np.ndarray],
    quant: QuantConfig,
) -> ExportCheck:
    """Compare what a file computed with what Keras does.

    Args:
        stored: what the file holds (`reading.read_weights`).
        found: what the file made of `ids`, `(time,)`.
        model: the plain model that it was made from. It takes other weights for a moment, because
            to build a second model would take longer than all else here.
        weights: those of `model`.
        quant: the file's scheme.
    """
    from tf_gptopt.models.checkpoints import assign_weights

    held = held_weights(stored, {name: array.shape for name, array in weights.items()})
    model = _in_float32(model, weights)
    wanted = _logits(model, ids)
    try:
        assign_weights(model, held)
        expected = _logits(model, ids)
    finally:
        assign_weights(model, weights)
    return ExportCheck(
        positions=len(ids),
        computed=logit_distance(found.at_once, expected),
        pieces=logit_distance(found.pieces, found.at_once[found.rows]),
        allowed=allowed_distance(quant),
        distance=logit_distance(found.at_once, wanted),
        agreement=float(np.mean(found.at_once.argmax(-1) == wanted.argmax(-1))),
    )


def require_good(check: ExportCheck, scheme: str) -> None:
    """Refuse a file that failed.

    Raises:
        UserError: with the figures, when the file computes something else than it holds, reads
            otherwise piece by piece, or says nothing of what its model does.
    """
    pieces = min(check.allowed, _ALLOWED_PIECES)
    figures = (
        f"on {check.positions} tokens its logits are {check.computed:.2g} away from those of Keras "
        f"with its weights (allowed for {scheme!r}: {check.allowed:g}), {check.pieces:.2g} from "
        f"its own when it reads in pieces (allowed: {pieces:g}), and {check.distance:.2g} from the "
        f"model's (allowed: less than {_RUINED:g}), with which it agrees on "
        f"{check.agreement:.0%} of the likeliest tokens"
    )
    if not (check.computed <= check.allowed and check.pieces <= pieces):  # NaN is refused too
        raise UserError(
            f"The file was refused, because it does not compute what it holds: {figures}. Nothing "
            "was written. Try `pip install -U ai-edge-litert`, or another scheme."
        )
    if not check.distance < _RUINED:
        raise UserError(
            f"The file was refused, because nothing of the model is left in it: {figures}. Nothing "
            "was written. Take more bits, a finer granularity or another range for the weights."
        )


def allowed_distance(quant: QuantConfig) -> float:
    """How far a file of this scheme may be from Keras with the same weights."""
    rounded = [quant.activations if quant.kinds & set(BITS) else "float"]
    rounded += ["cache"] * (quant.kv_cache == "int8")
    return max(_ALLOWED[kind] for kind in rounded)


def logit_distance(logits: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference, in units of that of `reference`.

    Each row of both, `(time, vocab_size)`, is taken less its mean, which no probability sees: so 0
    is equal, and equal logits for all tokens are at 1. A `reference` of these itself is measured in
    ten thousandths of its size: below them is the rounding of float32 sums.
    """
    size = float(np.abs(reference).max())
    logits, reference = (x - x.mean(-1, keepdims=True) for x in (logits, reference))
    return _rms(logits - reference) / max(_rms(reference), 1e-4 * size, 1e-30)


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
