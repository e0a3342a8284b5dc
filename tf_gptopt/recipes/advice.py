"""Whether text, vocabulary and length of a training go together: facts, and advice where they do
not. Needs no TensorFlow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tf_gptopt.data.corpus import Document
from tf_gptopt.data.packing import DatasetInfo
from tf_gptopt.data.tokenizer import SMALLEST_VOCAB, Tokenizer
from tf_gptopt.training.config import TrainConfig

_SAMPLE = 1 << 20  # tokens, and characters, that shares are measured on
_FRAGMENTS = 0.1  # of the tokens: from there on a model learns to spell instead of to write
_FREQUENT = 0.995  # of all characters beyond ASCII are frequent ones
_FEW_HELD_OUT = 5_000  # tokens: with some 2.5 nats from one to the next, a loss of +-0.035
# Repeating text is as good as new for four passes, and near worthless after some sixteen
# (Muennighoff et al. 2023, arXiv:2305.16264)
_GOOD_PASSES, _MANY_PASSES = 4, 16
_ENOUGH = 20  # tokens a parameter, beyond which a larger model gains more (Hoffmann et al. 2022)


def fragment_share(tokens: np.ndarray, encoder: Tokenizer) -> float:
    """Which share of `tokens` are bytes of characters that the vocabulary does not hold whole."""
    ids, counts = np.unique(tokens[:_SAMPLE], return_counts=True)
    parts = ["\ufffd" in encoder.decode([int(i)]) for i in ids]
    return float(counts[parts].sum() / max(1, counts.sum()))


def on_vocabulary(documents: Sequence[Document], share: float, vocab_size: int) -> list[str]:
    """Advice on a vocabulary of which `share` of the tokens are fragments of characters."""
    if share < _FRAGMENTS:
        return []
    counts: Counter[str] = Counter()
    seen = 0
    for document in documents:
        counts.update(character for character in document.text if character > "\x7f")
        seen += len(document.text)
        if seen > _SAMPLE:
            break
    shares = np.cumsum([count for _, count in counts.most_common()]) / max(1, counts.total())
    frequent = int(np.searchsorted(shares, _FREQUENT)) + 1
    room = 1 << (SMALLEST_VOCAB + 5 * frequent // 4 - 1).bit_length()  # prefixes take some too
    return [
        f"{share:.0%} of the tokens are fragments of characters: the text has {len(counts):,} of "
        f"them beyond ASCII, and the vocabulary {vocab_size:,} entries. Take "
        f"tokenizer.vocab_size={max(room, 2 * vocab_size)}."
    ]


def on_held_out(info: DatasetInfo) -> list[str]:
    """Advice on a validation split."""
    if info.valid_tokens >= _FEW_HELD_OUT:
        return []
    return [
        f"{info.valid_tokens:,} held-out tokens make a rough loss: differences below some "
        f"{2.5 / info.valid_tokens**0.5:.2f} are chance. Give more text, or a larger "
        "dataset.valid_fraction."
    ]


def on_length(
    fit: TrainConfig, length: int, text_tokens: int, parameters: int
) -> tuple[float, list[str]]:
    """How many passes over the text a training makes, and what to say of that.

    Args:
        fit: the training.
        length: tokens of a sequence.
        text_tokens: of the training split.
        parameters: of the model.
    """
    update = fit.batch_size * length
    seen = fit.steps * update
    passes = seen / text_tokens
    said = [
        f"{seen:,} tokens to train on: {passes:,.2g} passes over the text, "
        f"{seen / parameters:,.2g} tokens a parameter"
    ]
    if passes > _MANY_PASSES:
        steps = max(1, _GOOD_PASSES * text_tokens // update)
        said.append(
            f"That is long for so little text, which will be learnt by heart: give more text, a "
            f"smaller model, or some {steps:,} steps ({_GOOD_PASSES} passes)."
        )
    elif seen < parameters and passes < _GOOD_PASSES:
        most = min(_ENOUGH * parameters, _GOOD_PASSES * text_tokens)
        said.append(
            "That is short for this model: more steps would help, up to some "
            f"{max(fit.steps, most // update):,}."
        )
    return passes, said
