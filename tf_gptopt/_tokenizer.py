"""Text to token ids and back: one tokenizer for models, datasets and files. No TensorFlow."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models

from tf_gptopt._decoders import Changes, changes_of, is_byte_token
from tf_gptopt._errors import UserError
from tf_gptopt._files import write_bytes, write_json, write_text
from tf_gptopt._folder import changing
from tf_gptopt._ids import as_ids
from tf_gptopt._tokenizer_folder import (
    CONFIG_FILE,
    END_OF_TEXT,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    byte_level_bpe,
    has_tokenizer,
    read_tokenizer,
)

__all__ = [
    "CONFIG_FILE",
    "END_OF_TEXT",
    "TEMPLATE_FILE",
    "TOKENIZER_FILE",
    "TOKENIZER_FILES",
    "Tokenizer",
    "as_tokenizer",
    "has_tokenizer",
]

# what a saved tokenizer consists of: whoever saves one over another removes the other's
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    TEMPLATE_FILE,
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
_EOT_IDS = "end_of_text_ids"  # our key in tokenizer_config.json: a text may end in several ways


class Tokenizer:
    """Text to token ids and back. Made by `train_tokenizer`, `load` or `from_gpt2_files`.

    Attributes:
        eot_id: the id that ends a document, or None where the tokenizer has no such token.
        eot_ids: all ids that end a text, `eot_id` the first: a chat model has several.
        bos_ids: the ids that begin a text, as the tokenizer's post-processor says; mostly none.
            `generate` puts them before a text that does not begin with them, and a dataset before
            each document.
        vocab_size: one more than the largest id.
        ids_without_token: those below `vocab_size` that mean nothing; mostly none.
        fingerprint: sha256 (hex) of the tokenizer's JSON, however it is formatted: models and
            datasets keep it, since a wrong tokenizer of the same size is otherwise silent.
        settings: tokenizer_config.json as it was read; `save` writes it back.
        chat_template: the Jinja template of a chat model, or None.
    """

    def __init__(
        self,
        tokenizer_json: str,
        eot_token: str | None = END_OF_TEXT,
        *,
        eot_ids: Sequence[int] = (),
        settings: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """From the text of a Hugging Face `tokenizer.json`.

        Args:
            tokenizer_json: that text.
            eot_token: the token that ends a document.
            eot_ids: more ids that end a text; those outside the vocabulary do not count.
            settings: what tokenizer_config.json says.
            chat_template: the text of chat_template.jinja, where the settings hold none.

        Raises:
            UserError: when `tokenizers` cannot read it.
        """
        try:
            self._backend = Backend.from_str(tokenizer_json)
            content = json.loads(tokenizer_json)
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
        self._changes = changes_of(content.get("decoder"))
        self._template = chat_template
        self.settings = dict(settings or {})
        canonical = json.dumps(content, sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        ids = set(self._backend.get_vocab().values())
        self.vocab_size = 1 + max(ids, default=-1)
        self.ids_without_token = tuple(sorted(set(range(self.vocab_size)) - ids))
        found = None if eot_token is None else self._backend.token_to_id(eot_token)
        known = [i for i in (found, *eot_ids) if i in ids]
        self.eot_ids = tuple(dict.fromkeys(known))
        self.eot_id = self.eot_ids[0] if self.eot_ids else None
        self.eot_token = None if self.eot_id is None else self._backend.id_to_token(self.eot_id)
        self.bos_ids = _ids_before(self._backend)

    @property
    def chat_template(self) -> str | None:
        return self._template or self.settings.get("chat_template")

    @classmethod
    def load(cls, path: str | os.PathLike, eot_id: int | None = None) -> Tokenizer:
        """Read a tokenizer's folder, or a tokenizer.json with what lies beside it.

        A folder holds tokenizer.json, or vocab.json and merges.txt (a byte-level BPE), or vocab.txt
        (a WordPiece), and what transformers writes beside them.

        The end-of-text token is the `eos_token` of tokenizer_config.json or special_tokens_map.json
        beside it, else `<|endoftext|>`, else the token whose id is `eot_id`. The `eos_token_id` of
        generation_config.json, else of config.json, one or several, ends a text as well.

        Raises:
            UserError: when no tokenizer is there or it cannot be read.
        """
        path = Path(path)
        files = read_tokenizer(path)
        ours = files.settings.get(_EOT_IDS)
        more = ours if isinstance(ours, list) else files.eot_ids
        options = {
            "eot_ids": [i for i in (eot_id, *more) if isinstance(i, int)],
            "settings": files.settings,
            "chat_template": files.template,
        }
        try:
            tokenizer = cls(files.content, files.eot_token or END_OF_TEXT, **options)
            if files.eot_token in (None, tokenizer.eot_token):
                return tokenizer
            return cls(files.content, END_OF_TEXT, **options)
        except UserError as error:
            file = path / TOKENIZER_FILE if path.is_dir() else path
            raise UserError(f"{file}: {error}") from None

    @classmethod
    def from_gpt2_files(cls, vocab: str | os.PathLike, merges: str | os.PathLike) -> Tokenizer:
        """GPT-2's own BPE, from vocab.json (encoder.json) and merges.txt (vocab.bpe).

        The text is cut with GPT-2's regular expression, as OpenAI's and Hugging Face's code do.
        """
        return cls(byte_level_bpe(vocab, merges).to_str())

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json, for byte-level BPE vocab.json and
        merges.txt too; all of them at once. A loaded tokenizer.json is written as it was read, and
        so are the settings and the chat template. `clean_up_tokenization_spaces` alone is false
        whatever it was: transformers would take spaces out of decoded text, and we do not.

        keras-nlp reads vocab.json and merges.txt, with the same ids for any text:

        ```python
        keras_nlp.tokenizers.BytePairTokenizer(
            vocabulary="vocab.json", merges="merges.txt", unsplittable_tokens=["<|endoftext|>"]
        )
        ```

        Inside `tf.data` (and for GPT-2's own merges anywhere) keras-nlp cuts the text by a rule of
        its own: the same text, but other ids around indentation.
        """
        with changing(folder, TOKENIZER_FILES) as new:
            self._write(new)

    def _write(self, folder: Path) -> None:
        content = json.loads(self._json)
        if _is_byte_level_bpe(content):
            vocab = content["model"]["vocab"]
            vocab |= {token["content"]: token["id"] for token in content["added_tokens"]}
            merges = content["model"]["merges"]  # older files hold "a b" for ["a", "b"]
            lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
            write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
            write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines]) + "\n")
        if self._template is not None:
            write_text(folder / TEMPLATE_FILE, self._template)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.settings}
        named = config.get("eos_token")
        if (named.get("content") if isinstance(named, dict) else named) != self.eot_token:
            config["eos_token"] = self.eot_token
        config.setdefault("eos_token", None)
        config["clean_up_tokenization_spaces"] = False
        if len(self.eot_ids) > 1:
            config[_EOT_IDS] = list(self.eot_ids)
        write_json(folder / CONFIG_FILE, config)
        write_bytes(folder / TOKENIZER_FILE, self._json.encode())

    def encode(self, text: str, *, split_special_tokens: bool = False) -> np.ndarray:
        """Token ids of `text`, `(tokens,)` int32; none is added.

        Args:
            text: any text.
            split_special_tokens: whether the text is nothing but text. By default a special token
                that is written in it, such as `<|endoftext|>`, is that token: right for a prompt
                of your own, and not for what a stranger wrote. The name is that of transformers;
                as there, added tokens that are not special are recognised either way.
        """
        return self.encode_batch([text], split_special_tokens=split_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, split_special_tokens: bool = False
    ) -> list[np.ndarray]:
        """`encode` for many texts at once, on all cores."""
        backend = self._splitting if split_special_tokens else self._backend
        try:
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # its panics are no Exceptions
            raise UserError(
                f"The text cannot be tokenized ({error}). The tokenizer may lack characters of the "
                "text, or the text may hold half of a surrogate pair."
            ) from None
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_prompt(self, text: str, *, split_special_tokens: bool = False) -> np.ndarray:
        """`encode`, after `bos_ids` where the text does not begin with them."""
        ids = self.encode(text, split_special_tokens=split_special_tokens)
        bos = np.array(self.bos_ids, np.int32)
        return ids if np.array_equal(ids[: len(bos)], bos) else np.concatenate([bos, ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD, and an id
        without a token (a row by which a model's table is padded, for one) is no text.

        Raises:
            UserError: for ids that are no integers of 0 or more.
        """
        expected = "Token ids to decode are a list of integers of 0 or more."
        array = as_ids(list(ids) if isinstance(ids, Iterator) else ids, expected)
        if array.size and array.min() < 0:
            raise UserError(f"{expected} Received: {array.min()}.")
        return self._backend.decode(array[array < self.vocab_size].tolist(), False)

    @functools.cached_property
    def _splitting(self) -> Backend:
        """What takes special tokens for text; one of its own, since others may be encoding."""
        backend = Backend.from_str(self._json)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend

    def has_same_tokens(self, other: Tokenizer) -> bool:
        """Whether every id means the same in both."""
        return self._backend.get_vocab() == other._backend.get_vocab()

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


def as_tokenizer(tokenizer: Any) -> Any:
    """Somebody else's tokenizer as ours: one of transformers or `tokenizers`.

    What is neither is returned as it is: whatever has `encode(text)` and `decode(ids)` will do.
    """
    if isinstance(tokenizer, Backend):
        return Tokenizer(tokenizer.to_str())
    if hasattr(tokenizer, "eos_token_id") and callable(getattr(tokenizer, "save_pretrained", None)):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            try:
                return Tokenizer.load(folder)
            except UserError as error:
                kind = type(tokenizer).__name__
                raise UserError(f"The {kind} cannot be read from what it saves: {error}") from None
    return tokenizer


def _ids_before(backend: Backend) -> tuple[int, ...]:
    """What the post-processor puts before a text."""
    some = Backend(models.WordLevel({"text": 0}, "text")).encode("text")
    processed = backend.post_process(some)
    places = processed.sequence_ids
    return tuple(processed.ids[: places.index(0)]) if 0 in places else ()


def _is_byte_level_bpe(content: dict[str, Any]) -> bool:
    pre_tokenizer = json.dumps(content.get("pre_tokenizer"))
    return content["model"].get("type") == "BPE" and '"ByteLevel"' in pre_tokenizer
