"""Byte-level BPE: training it, and files that Hugging Face and keras-nlp read. No TensorFlow.

Whoever reads the files gets the same ids, because no token reaches across the places where a text
may be cut into words. Other byte-level tokenizers cut it with a regular expression before they
merge, and a reader with another expression gets other ids: keras-nlp's `BytePairTokenizer`, for
one, does not cut at all outside `tf.data`. Merges learned here give the same ids either way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tf_gptopt._errors import UserError
from tf_gptopt._files import read_json, write_bytes, write_json, write_text

END_OF_TEXT = "<|endoftext|>"
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


class Tokenizer:
    """Text to token ids and back. Made by `train_tokenizer`, `load` or `from_gpt2_files`.

    Attributes:
        eot_id: the id that ends a document, or None where the tokenizer has no such token.
        vocab_size: one more than the largest id.
        fingerprint: sha256 (hex) of the tokenizer's JSON, however it is formatted: models and
            datasets keep it, since a wrong tokenizer of the same size is otherwise silent.
    """

    def __init__(self, tokenizer_json: str, eot_token: str | None = END_OF_TEXT) -> None:
        """From the text of a Hugging Face `tokenizer.json`.

        Raises:
            UserError: when `tokenizers` cannot read it.
        """
        try:
            self._backend = Backend.from_str(tokenizer_json)
            canonical = json.dumps(json.loads(tokenizer_json), sort_keys=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises bare Exceptions, and panics are not even
            raise UserError(
                f"This is not a tokenizer.json that the tokenizers library can read ({error}). "
                "Restore the file, or upgrade with `pip install -U tokenizers`."
            ) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._json = tokenizer_json
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self.vocab_size = 1 + max(self._backend.get_vocab().values(), default=-1)
        self.eot_id = None if eot_token is None else self._backend.token_to_id(eot_token)
        self.eot_token = None if self.eot_id is None else eot_token

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Read a folder's tokenizer.json (or its vocab.json and merges.txt), or the file itself.

        The end-of-text token is `<|endoftext|>` where the tokenizer has it, else the `eos_token` of
        tokenizer_config.json or special_tokens_map.json beside it.

        Raises:
            UserError: when no tokenizer is there or it cannot be read.
        """
        path = Path(path)
        folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
        if not file.is_file():
            for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
                if path.is_dir() and (path / vocab).is_file() and (path / merges).is_file():
                    return cls.from_gpt2_files(path / vocab, path / merges)
            raise UserError(
                f"There is no tokenizer in {path}: tokenizer.json, or vocab.json with merges.txt, "
                "was expected."
            )
        read_json(file)  # its errors name the file
        text = file.read_text("utf-8")
        try:
            tokenizer = cls(text)
            return tokenizer if tokenizer.eot_id is not None else cls(text, _eos_token(folder))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    @classmethod
    def from_gpt2_files(cls, vocab: str | os.PathLike, merges: str | os.PathLike) -> Tokenizer:
        """GPT-2's own BPE, from vocab.json (encoder.json) and merges.txt (vocab.bpe).

        The text is cut with GPT-2's regular expression, as OpenAI's and Hugging Face's code do.
        """
        table = read_json(vocab)
        pairs = []
        try:
            lines = Path(merges).read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{merges} cannot be read ({error}). Restore it.") from None
        for number, line in enumerate(lines, 1):
            line = line.rstrip("\r")
            if not line or (number == 1 and line.startswith("#version")):
                continue
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise UserError(f"{merges}, line {number}: two tokens were expected: {line!r}.")
            pairs.append(pair)
        strangers = {part for a, b in pairs for part in (a, b, a + b)}.difference(table)
        if strangers:
            raise UserError(
                f"{vocab} and {merges} do not belong together or are damaged: token "
                f"{min(strangers)!r} of the merges is not in the vocabulary. Take both from one "
                "tokenizer."
            )
        try:
            backend = Backend(models.BPE(vocab=table, merges=pairs))
        except (TypeError, OverflowError) as error:
            raise UserError(f"{vocab} must map tokens to ids ({error}). Restore it.") from None
        if END_OF_TEXT in table:
            backend.add_special_tokens([END_OF_TEXT])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        return cls(backend.to_str())

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json, for byte-level BPE vocab.json and
        merges.txt too; each atomically. A loaded tokenizer.json is written as it was read.

        keras-nlp reads the last two, with the same ids for any text:

        ```python
        keras_nlp.tokenizers.BytePairTokenizer(
            vocabulary="vocab.json", merges="merges.txt", unsplittable_tokens=["<|endoftext|>"]
        )
        ```

        Inside `tf.data` (and for GPT-2's own merges anywhere) keras-nlp cuts the text by a rule of
        its own: the same text, but other ids around indentation.
        """
        folder = Path(folder)
        content = json.loads(self._json)
        if _is_byte_level_bpe(content):
            vocab = content["model"]["vocab"]
            vocab |= {token["content"]: token["id"] for token in content["added_tokens"]}
            merges = content["model"]["merges"]  # older files hold "a b" for ["a", "b"]
            lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
            write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
            write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines]) + "\n")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eot_token}
        write_json(folder / "tokenizer_config.json", config)
        write_bytes(folder / "tokenizer.json", self._json.encode())

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, `(tokens,)` int32. Special tokens are recognised, none is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for many texts at once, on all cores."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:
            raise UserError(
                f"The text cannot be tokenized ({error}). The tokenizer may lack characters of the "
                "text, or the text may hold half of a surrogate pair."
            ) from None
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: for an id outside `[0, vocab_size)`.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(
                    f"Token id {i} is outside the vocabulary of {self.vocab_size} tokens. Use "
                    "the tokenizer that the model was trained with."
                )
        return self._backend.decode(ids, skip_special_tokens=False)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]})"


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
        UserError: for a vocab_size below 257 or texts without any text.
    """
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


def _is_byte_level_bpe(content: dict[str, Any]) -> bool:
    pre_tokenizer = json.dumps(content.get("pre_tokenizer"))
    return content["model"].get("type") == "BPE" and '"ByteLevel"' in pre_tokenizer


def _eos_token(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = read_json(folder / name).get("eos_token")
            if token is not None:
                return token["content"] if isinstance(token, dict) else token
    return None
