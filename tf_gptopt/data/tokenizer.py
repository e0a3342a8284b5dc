"""Training a byte-level BPE whose files Hugging Face and keras-nlp read alike. No TensorFlow.

Whoever reads the files gets the same ids, because no token reaches across the places where a text
may be cut into words. Other byte-level tokenizers cut it with a regular expression before they
merge, and a reader with another expression gets other ids: keras-nlp's `BytePairTokenizer`, for
one, does not cut at all outside `tf.data`. Merges learned here give the same ids either way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tf_gptopt._errors import UserError
from tf_gptopt._tokenizer import END_OF_TEXT, Tokenizer

__all__ = ["Tokenizer", "train_tokenizer"]

SMALLEST_VOCAB = 257  # every byte and the end-of-text token

# What a token may be made of: white space with a line break, or one word, digit or run of signs
# with the space before it, or the rest of a row of spaces. Indentation and the word after it stay
# apart, as do a name and the dot before it: a prompt may well end between them.
_PIECES = (
    r"\s*[\r\n]\s*"
    r"| ?(?:[\p{L}\p{M}]+|\p{N}|[^\s\p{L}\p{M}\p{N}]+)"
    r"|\s+(?!\S)|\s+"
)
# No piece goes from a non-space to a space, so cutting there changes no id; it bounds the work
_BOUNDARIES = r"\s*\S+|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) from `texts`.

    Ids: 0 is `<|endoftext|>`, then the 256 bytes, then the merges in the order of their rank: first
    those that build frequent non-ASCII characters from their bytes, then sequences of characters.
    So a token holds whole characters, or a part of a single one. The same texts give the same
    tokenizer on every machine.

    Args:
        texts: what to learn from; all of it is held in memory.
        vocab_size: tokens wanted. A small corpus gives fewer: read `Tokenizer.vocab_size`.

    Raises:
        UserError: for a vocab_size below 257, one text instead of several, or texts without any
            text.
    """
    if isinstance(texts, (str, bytes)):  # whose characters would be taken for texts
        raise UserError(
            "train_tokenizer learns from several texts. Received one: put it into a list, "
            "train_tokenizer([text], vocab_size)."
        )
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"vocab_size must be at least {SMALLEST_VOCAB} (256 bytes and {END_OF_TEXT}). "
            f"Received: vocab_size={vocab_size}."
        )
    texts = [part for text in texts for part in text.split(END_OF_TEXT)]
    counts = _count_characters(texts)
    if not counts.any():
        raise UserError("There is no text to train a tokenizer on. Give it at least one document.")

    merges = _character_merges(counts, vocab_size)
    whole = {a + b for a, b in merges}
    # A rare character takes part in no merge; a digit, which stands alone, keeps its place
    seen = np.flatnonzero(counts).tolist()
    rare = {code: "0" for code in seen if code > 127 and _to_unicode(chr(code)) not in whole}
    texts = [text if text.isascii() else text.translate(rare) for text in texts]
    room = vocab_size - SMALLEST_VOCAB - len(merges)
    merges += _sequence_merges(texts, alphabet=len(seen) - len(rare) + 1, merges=room)

    tokens = [END_OF_TEXT, *_BYTES, *dict.fromkeys(a + b for a, b in merges)][:vocab_size]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=[m for m in merges if "".join(m) in vocab]))
    backend.add_special_tokens([END_OF_TEXT])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_BOUNDARIES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend.to_str())


def _count_characters(texts: Iterable[str]) -> np.ndarray:
    """How often each code point occurs, `(0x110000,)` int64."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        try:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        except UnicodeEncodeError as error:
            raise UserError(
                f"A text holds half of a surrogate pair ({text[error.start]!r} at {error.start}), "
                "which is not valid Unicode. Write the text again, or drop that character."
            ) from None
        if codes.size:
            found = np.bincount(codes)
            counts[: len(found)] += found
    return counts


def _character_merges(counts: np.ndarray, vocab_size: int) -> list[tuple[str, str]]:
    """Merges that build the frequent non-ASCII characters from their bytes, frequent ones first.

    A character earns its token when it is about as frequent as the last pair that training would
    merge; 1 / (8 x vocab_size) of all characters is near that, for code, English and Chinese alike.
    """
    least = max(2, counts.sum() / (8 * vocab_size))
    frequent = [code for code in np.flatnonzero(counts >= least).tolist() if code > 127]
    room = (vocab_size - SMALLEST_VOCAB) * 9 // 10  # some are left for sequences, whatever the text
    made: dict[str, tuple[str, str]] = {}
    for code in sorted(frequent, key=lambda code: (-counts[code], code)):
        token = _to_unicode(chr(code))  # 2 to 4 bytes: each longer prefix is a merge
        for end in range(2, len(token) + 1):
            made.setdefault(token[:end], (token[: end - 1], token[end - 1]))
        if len(made) > room:
            break
    return list(made.values())[:room]


def _sequence_merges(texts: list[str], alphabet: int, merges: int) -> list[tuple[str, str]]:
    """Ordinary BPE merges over characters, written in bytes; pairs seen once are not merged."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=alphabet + merges, min_frequency=2, show_progress=False
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    pairs = json.loads(backend.to_str())["model"]["merges"]
    return [(_to_unicode(a), _to_unicode(b)) for a, b in pairs]


def _printable_bytes() -> list[str]:
    """GPT-2's visible stand-in for each byte: itself where printable, else from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


_BYTES = _printable_bytes()


def _to_unicode(text: str) -> str:
    return "".join(_BYTES[byte] for byte in text.encode())
