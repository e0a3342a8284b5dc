"""Text to token ids and back: one tokenizer for models, datasets and files. No TensorFlow."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tf_gptopt._decoders import Changes, changes_of, is_byte_token
from tf_gptopt._errors import UserError
from tf_gptopt._files import read_json, write_bytes, write_json, write_text

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"


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
        self._changes = changes_of(json.loads(tokenizer_json).get("decoder"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self.vocab_size = 1 + max(self._backend.get_vocab().values(), default=-1)
        self.eot_id = None if eot_token is None else self._backend.token_to_id(eot_token)
        self.eot_token = None if self.eot_id is None else eot_token

    @classmethod
    def load(cls, path: str | os.PathLike, eot_id: int | None = None) -> Tokenizer:
        """Read a folder's tokenizer.json (or its vocab.json and merges.txt), or the file itself.

        The end-of-text token is the `eos_token` of tokenizer_config.json or special_tokens_map.json
        beside it, else `<|endoftext|>`, else the token whose id is `eot_id`.

        Raises:
            UserError: when no tokenizer is there or it cannot be read.
        """
        path = Path(path)
        folder, file = (path, path / TOKENIZER_FILE) if path.is_dir() else (path.parent, path)
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
            named = [_eos_token(folder), END_OF_TEXT]
            if eot_id is not None:
                named.append(tokenizer._backend.id_to_token(eot_id))
            for token in named:
                if token is not None and tokenizer._backend.token_to_id(token) is not None:
                    return cls(text, token)
            return tokenizer
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
        write_bytes(folder / TOKENIZER_FILE, self._json.encode())

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

    def may_change(self, token: int) -> bool:
        """Whether the text of tokens that end with this one may change when others follow.

        `models.text_stream.TextStream` holds such text back. Characters that are not complete do
        not count.
        """
        if self._changes is Changes.BYTES:
            return is_byte_token(self._backend.id_to_token(token))
        return self._changes is Changes.ALWAYS

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]})"


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
