"""A tokenizer as it lies in a checkpoint folder, whoever wrote it.

`tokenizer.json` is the format of the `tokenizers` library; which of its tokens ends a document is
in `tokenizer_config.json` (`eos_token`), as Hugging Face keeps it, and is `<|endoftext|>` where
nothing else is said. The files are kept byte for byte when a model is saved elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._files import write_bytes

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"

# everything that tools beside this one look for
_FILES = (TOKENIZER_FILE, SETTINGS_FILE, "special_tokens_map.json", "vocab.json", "merges.txt")


def copy_tokenizer(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy the tokenizer files of folder `source` to folder `target`, byte for byte."""
    for name in _FILES:
        if (Path(source) / name).is_file():
            write_bytes(Path(target) / name, (Path(source) / name).read_bytes())


class FolderTokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        files: names and bytes of the folder's tokenizer files; `tokenizer.json` is among them.
        eot_id: the token that ends a document, where tokenizer_config.json does not say.

    Raises:
        UserError: when `tokenizer.json` is damaged.
    """

    def __init__(self, files: dict[str, bytes], eot_id: int | None = None) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(files[TOKENIZER_FILE].decode("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"{TOKENIZER_FILE} is damaged or of an unknown kind ({error}). Restore the file."
            ) from None
        settings = _settings(files.get(SETTINGS_FILE))
        token = settings.get("eos_token")
        if isinstance(token, dict):  # some versions write the token with its options
            token = token.get("content")
        if token is None and eot_id is not None:
            token = self._tokenizer.id_to_token(eot_id)
            settings["eos_token"] = token  # so that a saved copy says it
            files = {**files, SETTINGS_FILE: json.dumps(settings, indent=2).encode("utf-8")}
        self._saved_files = files
        self.eot_id: int | None = self._tokenizer.token_to_id(token or END_OF_TEXT)

    @classmethod
    def load(cls, folder: str | os.PathLike, eot_id: int | None = None) -> FolderTokenizer:
        """Read the tokenizer files of `folder`."""
        folder = Path(folder)
        return cls(
            {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()},
            eot_id,
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Write the files as they were read."""
        for name, data in self._saved_files.items():
            write_bytes(Path(folder) / name, data)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added before or after."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:
            raise UserError(
                f"The tokenizer cannot encode {text[:40]!r} ({error}). "
                "Hand token ids to the model instead."
            ) from None

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        """The text of `ids`, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def _settings(data: bytes | None) -> dict[str, Any]:
    try:
        return dict(json.loads(data or b"{}"))
    except (ValueError, TypeError):
        raise UserError(f"{SETTINGS_FILE} is not a JSON object. Restore or delete it.") from None
