"""From files to documents: text, jsonl, folders, or the standard library's own source code.

A document is what the validation split keeps whole, so a long text file becomes many of them.
Needs no TensorFlow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tf_gptopt._errors import UserError

SEPARATOR = "<|endoftext|>"
SPLIT_ABOVE = 256 * 1024  # characters: a longer file is a book or a dump, not one document
SECTION = 8 * 1024  # characters: what a document cut out of a long file aims at

# Tests repeat one another, and generated tables (codecs, topics, build variables) teach nothing:
# near-copies on both sides of the split would make the validation loss look better than it is.
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # what the interpreter was built with

Paths = str | os.PathLike | Iterable[str | os.PathLike] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text that the validation split never cuts: where it came from, and what it says."""

    name: str
    text: str


class Corpus(list[Document]):
    """A list of documents without blank ones and copies, that knows what was left out.

    Attributes:
        skipped: files of the folders that are not UTF-8 text, in reading order.
        duplicates: how many exact copies of an earlier document were dropped.
    """

    def __init__(self, documents: Iterable[Document] = (), skipped: Iterable[str] = ()) -> None:
        seen: set[bytes] = set()
        self.skipped = list(skipped)
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
    - A `.jsonl` file holds one JSON object a line; its `text_field` is one document.
    - A folder is read recursively in sorted order. Hidden files, and files that are not UTF-8 text,
      are left out; `Corpus.skipped` names the latter.
    - None reads the `.py` files of the running Python's standard library, one document a file.

    Blank documents and exact copies are dropped (a copy could end up on both sides of the split).

    Returns:
        A list of documents in a deterministic order.

    Raises:
        UserError: for a missing path, a file that is not UTF-8 text (with the offset of the first
            bad byte), a line without the field, and a corpus without any text.
    """
    named = None if paths is None else _as_paths(paths)
    skipped: list[str] = []
    files: list[tuple[Path, str]] = []
    for file in corpus_files(named):
        try:
            files.append((file, _read_text(file)))
        except UserError:
            if file in (named or ()):
                raise
            skipped.append(str(file))
    if named is None:
        root = _library_root()
        texts = (Document(path.relative_to(root).as_posix(), text) for path, text in files)
        return Corpus(texts, skipped)
    documents = (
        document
        for path, raw in files
        for document in _documents_of(path, raw, text_field, only=len(files) == 1)
    )
    corpus = Corpus(documents, skipped)
    if not corpus:
        names = ", ".join(map(str, named))
        also = f" (files skipped, as they are not UTF-8 text: {len(skipped)})" if skipped else ""
        raise UserError(f"There is no text in {names}{also}. Give files that hold UTF-8 text.")
    return corpus


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
        UserError: for a path that does not exist, and where None finds no source code.
    """
    if paths is None:
        root = _library_root()
        files = _walk(root, lambda name: name in _SKIPPED or name.startswith(_SKIPPED_PREFIXES))
        found = [path for path in files if path.suffix == ".py"]
        if not found:
            raise UserError(
                f"This Python keeps no source code of its standard library in {root} (it is zipped "
                "or was removed). Name your own text: a file, a .jsonl file or a folder."
            )
        return found
    found = []
    for path in _as_paths(paths):
        if os.path.isdir(path):  # unlike Path.is_dir, False for a name that the system refuses
            found.extend(_walk(path))
        elif os.path.exists(path):
            found.append(path)
        else:
            raise UserError(f"{path} does not exist. Name a text file, a .jsonl file or a folder.")
    return list(dict.fromkeys(found))


def _library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _as_paths(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise UserError(
            "No paths to read were given. Name a text file, a .jsonl file or a folder, or pass "
            "None for the source code of the standard library."
        )
    return [Path(path).expanduser() for path in paths]


def _walk(root: Path, skip: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Regular files below `root`, in the same order on every machine; hidden names are left out."""

    def kept(names: list[str]) -> list[str]:
        return sorted(name for name in names if not name.startswith(".") and not skip(name))

    for folder, folders, files in os.walk(root):
        folders[:] = kept(folders)
        yield from (path for name in kept(files) if (path := Path(folder, name)).is_file())


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}). Check its permissions."
        ) from None
    bad = raw.find(b"\0")  # valid UTF-8, but no text has it
    reason = "a zero byte"
    if bad < 0:
        try:
            return raw.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            bad, reason = error.start, f"byte 0x{raw[error.start]:02x}"
    raise UserError(
        f"{path} is not UTF-8 text: {reason} at offset {bad}. Unpack or convert it first, for "
        f"example with `iconv -f LATIN1 -t UTF-8 {path.name}` (or `-f UTF-16`)."
    )


def _documents_of(path: Path, raw: str, text_field: str, only: bool) -> Iterator[Document]:
    texts = _jsonl_texts(path, raw, text_field) if path.suffix == ".jsonl" else [(str(path), raw)]
    for name, text in texts:
        parts = _SEPARATOR.split(text) if SEPARATOR in text else [text]
        if path.suffix != ".jsonl":
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
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(
                f"{where} is not JSON ({error}). A .jsonl file holds one JSON object a line; "
                "rename the file if it is plain text."
            ) from None
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
        yield f"{path}:{number}", text
