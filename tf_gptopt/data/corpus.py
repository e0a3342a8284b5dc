"""From files to documents: text, jsonl, folders, or the standard library's own source code.

A document is what the validation split keeps whole, so a long text file becomes many of them.
Needs no TensorFlow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt.data.files import (
    NotReadError,
    Paths,
    as_paths,
    find_files,
    format_of,
    library_root,
    read_text,
)

SEPARATOR = "<|endoftext|>"
SPLIT_ABOVE = 256 * 1024  # characters: a longer file is a book or a dump, not one document
SECTION = 8 * 1024  # characters: what a document cut out of a long file aims at
_SHOWN = 3  # names of files that were left out for one reason


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text that the validation split never cuts: where it came from, and what it says."""

    name: str
    text: str


class Corpus(list[Document]):
    """A list of documents without blank ones and copies, that knows what was left out.

    Attributes:
        skipped: what the folders hold and was not read, each with the reason, in reading order.
        duplicates: how many exact copies of an earlier document were dropped.
    """

    def __init__(
        self, documents: Iterable[Document] = (), skipped: Mapping[str, str] | None = None
    ) -> None:
        seen: set[bytes] = set()
        self.skipped = dict(skipped or {})
        self.duplicates = 0
        for document in documents:
            if not document.text or document.text.isspace():
                continue
            digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
            if digest in seen:
                self.duplicates += 1
                continue
            seen.add(digest)
            self.append(document)


def load_corpus(paths: Paths = None, text_field: str = "text") -> Corpus:
    """Read documents from files and folders, or the standard library's source code by default.

    - A text file (any name, any language, UTF-8) is one document; it becomes several at each
      `<|endoftext|>`, and, where it is the only file or longer than 256 k characters, at blank
      lines, so that each document holds about 8 k characters. No character is lost.
    - A `.jsonl` (or `.ndjson`, `.jl`) file holds one JSON object a line; its `text_field` is one
      document. A `.json` file holds a list of such objects, one of them, or one a line.
    - `.gz`, `.bz2`, `.xz` and `.zst` (with the package zstandard) are unpacked, and read as what
      their name without that ending says.
    - A folder is read recursively in sorted order, linked folders too. Hidden names are left out;
      so are, with their reasons in `Corpus.skipped`, files that are not UTF-8 text or cannot be
      read, `.json` files without the field, and folders of datasets, models and runs.
    - None reads the `.py` files of the running Python's standard library, one document a file.

    Blank documents and exact copies are dropped (a copy could end up on both sides of the split).

    Returns:
        A list of documents in a deterministic order.

    Raises:
        UserError: for a missing path, a named file that is not UTF-8 text (with the offset of the
            first bad byte and what it seems to be), a line without the field, the folder of a
            dataset or a run, and a corpus without any text.
    """
    found, skipped = find_files(paths)
    named = () if paths is None else as_paths(paths)
    files: list[tuple[Path, str]] = []
    for file in found:
        try:
            files.append((file, read_text(file)))
        except NotReadError as error:
            if file in named:
                raise
            skipped[str(file)] = error.why
    if paths is None:
        root = library_root()
        texts = (Document(path.relative_to(root).as_posix(), text) for path, text in files)
        return Corpus(texts, skipped)
    documents = []
    for path, raw in files:
        try:
            documents += list(_documents_of(path, raw, text_field, only=len(files) == 1))
        except UserError:
            if format_of(path) == ".jsonl" or path in named:
                raise
            skipped[str(path)] = f"JSON without text in {text_field!r}"
    corpus = Corpus(documents, skipped)
    if not corpus:
        names = ", ".join(map(str, named))
        raise UserError(
            f"There is no text in {names}{left_out(corpus)}. Give files that hold UTF-8 text."
        )
    return corpus


def left_out(corpus: Corpus) -> str:
    """What a corpus does without and why, to follow a sentence; empty where that is nothing."""
    parts = []
    if corpus.duplicates:
        parts.append(f"{corpus.duplicates:,} exact copies left out")
    reasons: dict[str, list[str]] = {}
    for name, why in corpus.skipped.items():
        reasons.setdefault(why, []).append(Path(name).name)
    for why, names in reasons.items():
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        parts.append(f"skipped, {why}: {len(names):,} ({shown})")
    return "".join(f"; {part}" for part in parts)


def split_text(text: str, section: int = SECTION) -> Iterator[str]:
    """Cut a long text into documents of `section` to 2 x `section` characters.

    A cut falls after a blank line where there is one, else after a line, a space, or anywhere. The
    pieces joined give `text` again, character for character.
    """
    start = 0
    while len(text) - start > 2 * section:
        low, high = start + section, start + 2 * section
        for boundary in (_BLANK_LINE, _LINE_END, _SPACE):
            found = boundary.search(text, low, high)
            if found:
                break
        end = found.end() if found else high
        yield text[start:end]
        start = end
    yield text[start:]


_BLANK_LINE = re.compile(r"\n(?:[^\S\n]*\n)+")
_LINE_END = re.compile(r"\n")
_SPACE = re.compile(r"\s")
# Separators usually stand on a line of their own, whose line ends are not part of the text
_SEPARATOR = re.compile(r"\r?\n?" + re.escape(SEPARATOR) + r"\r?\n?")


def corpus_files(paths: Paths = None) -> list[Path]:
    """The files that `load_corpus` reads for `paths`, in its order.

    Raises:
        UserError: for a path that does not exist or is no file, and where None finds no source
            code.
    """
    return find_files(paths)[0]


def _documents_of(path: Path, raw: str, text_field: str, only: bool) -> Iterator[Document]:
    texts: Iterable[tuple[str, str]] = [(str(path), raw)]
    if kind := format_of(path):
        read = _jsonl_texts if kind == ".jsonl" else _json_texts
        texts = read(path, raw, text_field)
    for name, text in texts:
        parts = _SEPARATOR.split(text) if SEPARATOR in text else [text]
        if not kind:
            # A lone short file still needs documents enough to hold some of them out
            alone = only and len(parts) == 1
            section = min(SECTION, max(512, len(text) // 20)) if alone else SECTION
            parts = [
                piece
                for part in parts
                for piece in (
                    split_text(part, section) if alone or len(part) > SPLIT_ABOVE else [part]
                )
            ]
        for i, part in enumerate(parts):
            yield Document(f"{name}#{i}" if len(parts) > 1 else name, part)


def _jsonl_texts(path: Path, raw: str, text_field: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(raw.split("\n"), 1):  # splitlines would cut at U+2028 as well
        if not line or line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is not JSON ({error}). A .jsonl file holds one JSON object a line; "
                "rename the file if it is plain text."
            ) from None
        yield f"{path}:{number}", _text_of(row, text_field, where)


def _json_texts(path: Path, raw: str, text_field: str) -> Iterator[tuple[str, str]]:
    try:
        rows = json.loads(raw)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # one object a line, under the ending of one object
            yield from _jsonl_texts(path, raw, text_field)
            return
        raise UserError(
            f"{path} is not JSON ({error}). Rename the file if it is plain text."
        ) from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield f"{path}:{number}", _text_of(row, text_field, f"{path}, entry {number}")


def _text_of(row: Any, text_field: str, where: str) -> str:
    """The text of one JSON object."""
    if not isinstance(row, dict):
        raise UserError(f"{where} holds a {type(row).__name__}; a JSON object was expected.")
    if text_field not in row:
        fields = ", ".join(map(repr, row)) or "none"
        raise UserError(
            f"{where} has no field {text_field!r}. Its fields: {fields}. Say which of them "
            "holds the text (text_field)."
        )
    text = row[text_field]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: field {text_field!r} holds a {type(text).__name__}; text was expected."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: field {text_field!r} holds half of a surrogate pair (\\ud800 to "
            "\\udfff), which is not text. Write the file again with valid Unicode."
        ) from None
    return text
