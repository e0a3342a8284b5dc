"""Files inside a .tflite file: a ZIP archive behind the flatbuffer.

So a model, its tokenizer, its config and how it was made are one file. LiteRT reads the flatbuffer
and never looks behind it; `unzip -l model.tflite` and `zipfile.ZipFile` look from the end and find
the archive. TFLite's own metadata standard packs "associated files" in this way
(https://ai.google.dev/edge/litert/conversion/tensorflow/metadata). The checksum of `metadata.py`
covers the archive as well.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._tokenizer import CONFIG_FILE as SETTINGS_FILE
from tf_gptopt._tokenizer import (
    END_OF_TEXT,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    has_tokenizer,
)
from tf_gptopt._version import __version__

CONFIG_FILE = "config.json"
MADE_FILE = "made.json"
_TOKENIZER_FILES = (TOKENIZER_FILE, SETTINGS_FILE, TEMPLATE_FILE)
# what a tokenizer's folder may hold, for one that lies beside a file
_BESIDE = (
    *_TOKENIZER_FILES,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
)
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the first date of ZIP: equal content gives equal bytes
_END_BYTES = 22  # of an archive's last record, without a comment
_MOST_BYTES = 2**28  # of a packed file when unpacked: far above any tokenizer


def append_files(path: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Append `files` to the file at `path` as a ZIP archive, deflated, in their order."""
    with open(path, "r+b") as end:
        end.seek(0, os.SEEK_END)
        with zipfile.ZipFile(end, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, data in files.items():
                entry = zipfile.ZipInfo(name, _LONG_AGO)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16  # as unzip gives them to whoever unpacks them
                archive.writestr(entry, data)


def read_files(path: str | os.PathLike) -> dict[str, bytes]:
    """The files that a .tflite file carries, by name; none where there is no archive.

    Raises:
        UserError: when the archive is damaged.
    """
    try:
        if not _ends_with_archive(path):
            return {}
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > _MOST_BYTES:
                raise zipfile.BadZipFile("it is larger than any that tf_gptopt writes")
            return {entry.filename: archive.read(entry) for entry in entries}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # zlib, struct and decoding errors, and zipfile's own
        raise UserError(
            f"The archive inside {path} is damaged ({error}). Copy or export the file again."
        ) from None


def _ends_with_archive(path: str | os.PathLike) -> bool:
    """Whether an archive's end is that of the file; `zipfile.is_zipfile` also takes four bytes of
    weights for one, if they happen to be its mark."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES))
        end = file.read()
    return len(end) == _END_BYTES and end.startswith(b"PK\5\6") and end.endswith(b"\0\0")


def archive_start(path: str | os.PathLike) -> int:
    """Where the archive begins: the size of the .tflite file without it."""
    if not read_files(path):
        return Path(path).stat().st_size
    with zipfile.ZipFile(path) as archive:
        return min(entry.header_offset for entry in archive.infolist())


def read_tokenizer(path: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer that a .tflite file carries, or None.

    Raises:
        UserError: when it is damaged.
    """
    files = read_files(path)
    return load_tokenizer(files) if TOKENIZER_FILE in files else None


def kept_tokenizer(path: str | os.PathLike) -> dict[str, bytes]:
    """The files of the tokenizer inside a .tflite file, or else beside it; none where there is
    neither. Whoever keeps them needs the path no more.

    Raises:
        UserError: when they are damaged or cannot be read.
    """
    files = read_files(path)
    return files if TOKENIZER_FILE in files else tokenizer_beside(path)


def tokenizer_beside(path: str | os.PathLike) -> dict[str, bytes]:
    """The files of the tokenizer in the folder of a .tflite file; none where there is none.

    Raises:
        UserError: when they cannot be read.
    """
    folder = Path(path).parent
    if not has_tokenizer(folder):
        return {}
    beside = [folder / name for name in _BESIDE]
    try:
        return {file.name: file.read_bytes() for file in beside if file.is_file()}
    except OSError as error:
        raise UserError(f"The tokenizer beside {path} cannot be read ({error}).") from None


def load_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of these files; others may be among them."""
    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError:  # a system without a folder to write to
        if TOKENIZER_FILE not in files:
            raise
        settings = json.loads(files.get(SETTINGS_FILE, b"{}"))
        token = settings.get("eos_token") or END_OF_TEXT
        token = token["content"] if isinstance(token, dict) else token
        template = files[TEMPLATE_FILE].decode() if TEMPLATE_FILE in files else None
        content = files[TOKENIZER_FILE].decode()
        return Tokenizer(content, token, settings=settings, chat_template=template)
    with temporary as folder:
        for name in _BESIDE:
            if name in files:
                (Path(folder) / name).write_bytes(files[name])
        return Tokenizer.load(folder)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What `load_tokenizer` needs of what `tokenizer.save` writes; nothing if it cannot save."""
    if not hasattr(tokenizer, "save"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = {name: Path(folder) / name for name in _TOKENIZER_FILES}
        return {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def how_it_was_made(**values: Any) -> dict[str, Any]:
    """Versions of what takes part in an export, the date (UTC), and `values`.

    `SOURCE_DATE_EPOCH`, seconds since 1970, takes the place of the clock where it is set, as in all
    builds that can be repeated (https://reproducible-builds.org/specs/source-date-epoch).
    """
    versions = {"tf_gptopt": __version__}
    for package in ("tensorflow", "tf_keras", "ai-edge-litert"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # not needed to write a file
            continue
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.now(datetime.UTC)
    date = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC) if seconds else now
    return {"versions": versions, "date": date.isoformat(timespec="seconds"), **values}


def as_json(values: Any) -> bytes:
    """A file of the archive: indented, for people who unpack it."""
    return (json.dumps(values, indent=2) + "\n").encode()
