"""Which files a corpus is made of, and what they hold: found, unpacked, decoded. No TensorFlow.

Nothing is left out without a word: what a folder holds and is not read has its reason in `skipped`.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from tf_gptopt._errors import UserError
from tf_gptopt.data.unreadable import advice

Paths = str | os.PathLike | Iterable[str | os.PathLike] | None
Skipped = dict[str, str]  # path -> why it is not read

NOT_TEXT = "not UTF-8 text"
_JSON_LINES = (".jsonl", ".ndjson", ".jl", ".jsonlines")

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
# Files that together tell what this program writes, which is no text to train on
_OWN = (
    ({"dataset.json", "train.bin"}, "a dataset that is packed into tokens (--dataset takes it)"),
    ({"config.json", "model.safetensors"}, "a model (--model takes it)"),
    ({"config.json", "model.tflite"}, "a model (--model takes it)"),
    ({"recipe.json", "tokenizer"}, "a run (--model and --dataset take it)"),
    ({"key.json", "metrics.json"}, "a stage of a run"),
)


class NotReadError(UserError):
    """A file that holds nothing to read; a folder goes on without it.

    Attributes:
        why: the reason in a few words, which many files may share.
    """

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def find_files(paths: Paths = None) -> tuple[list[Path], Skipped]:
    """The files that `paths` name, in reading order, and what their folders hold and is not read.

    Raises:
        UserError: for a path that does not exist or is no file, and where None finds no source
            code.
    """
    skipped: Skipped = {}
    if paths is None:
        root = library_root()
        files = _walk(root, skipped, lambda n: n in _SKIPPED or n.startswith(_SKIPPED_PREFIXES))
        found = [path for path in files if path.suffix == ".py"]
        if not found:
            raise UserError(
                f"This Python keeps no source code of its standard library in {root} (it is zipped "
                "or was removed). Name your own text: a file, a .jsonl file or a folder."
            )
        return found, {}
    found = []
    for path in as_paths(paths):
        if os.path.isdir(path):  # unlike Path.is_dir, False for a name that the system refuses
            found.extend(_walk(path, skipped))
        elif os.path.isfile(path):
            found.append(path)
        elif os.path.exists(path):
            raise UserError(
                f"{path} is a pipe or a device, and text is read more than once. Save it to a file "
                "first, and name that."
            )
        else:
            raise UserError(f"{path} does not exist. Name a text file, a .jsonl file or a folder.")
    return list(dict.fromkeys(found)), skipped


def library_root() -> Path:
    """Where this Python keeps its own source code."""
    return Path(sysconfig.get_path("stdlib"))


def as_paths(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """One path or several, as a list."""
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise UserError(
            "No paths to read were given. Name a text file, a .jsonl file or a folder, or pass "
            "None for the source code of the standard library."
        )
    return [Path(path).expanduser() for path in paths]


def format_of(path: Path) -> str:
    """How a file's text is read, by its name: as `".jsonl"`, as `".json"`, or plainly, `""`."""
    ending = Path(path.name.removesuffix(_packing(path))).suffix.lower()
    if ending in _JSON_LINES:
        return ".jsonl"
    return ending if ending == ".json" else ""


def file_kind(path: Path) -> str:
    """What a file is read as: its format, or its own ending for plain text, followed by `".gz"` and
    the like for one that is unpacked first."""
    packing = _packing(path)
    ending = Path(path.name.removesuffix(packing)).suffix
    return (format_of(path) or ending) + packing.lower()


def read_text(path: Path) -> str:
    """A file's text, unpacked, without a byte order mark.

    Raises:
        NotReadError: for a file that cannot be read or unpacked, and for one that is not UTF-8
            text.
        UserError: for one that takes another package to unpack.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise NotReadError(
            f"{path} cannot be read ({error.strerror}). Check its permissions.",
            f"cannot be read: {error.strerror}",
        ) from None
    raw = _unpacked(path, raw)
    bad = raw.find(b"\0")  # valid UTF-8, but no text has it
    reason = "a zero byte"
    if bad < 0:
        try:
            return raw.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            bad, reason = error.start, f"byte 0x{raw[error.start]:02x}"
    raise NotReadError(
        f"{path} is {NOT_TEXT}: {reason} at offset {bad}. {advice(path.name, raw)}", NOT_TEXT
    )


def _walk(
    root: Path, skipped: Skipped, leave: Callable[[str], bool] = lambda name: False
) -> list[Path]:
    """Regular files below `root`, in the same order on every machine, links followed; hidden names
    are left out, and a folder is read once by whatever ways it is reached."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        if Path(error.filename) == root and root.exists():
            raise UserError(f"{root} cannot be read ({error.strerror}). Check its permissions.")
        skipped[str(error.filename)] = f"cannot be read: {error.strerror}"

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        about = os.stat(folder)
        first = (about.st_dev, about.st_ino) not in seen
        seen.add((about.st_dev, about.st_ino))
        own = next((what for names, what in _OWN if names <= {*folders, *files}), None)
        if own and Path(folder) == root:
            raise UserError(f"{root} holds {own}. --data takes text: files, .jsonl or folders.")
        if own:
            skipped[folder] = f"holds {own}"
        if own or not first:
            folders[:] = []
            continue
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not leave(n))
        for name in sorted(n for n in files if not n.startswith(".") and not leave(n)):
            path = Path(folder, name)
            if reason := _no_file(path):
                skipped[str(path)] = reason
            else:
                found.append(path)
    return found


def _no_file(path: Path) -> str | None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "a link to nothing" if path.is_symlink() else f"cannot be read: {error.strerror}"
    return None if stat.S_ISREG(mode) else "a pipe or a device"


def _packing(path: Path) -> str:
    return path.suffix if path.suffix.lower() in _UNPACK else ""


def _unpacked(path: Path, raw: bytes) -> bytes:
    packing = _packing(path).lower()
    if not packing:
        return raw
    try:
        return _UNPACK[packing](raw)
    except ImportError:
        raise UserError(
            f"{path} is packed with zstd, which takes one more package: pip install zstandard"
        ) from None
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise NotReadError(
            f"{path} is damaged, or no {packing} file ({error}). Copy or download it again.",
            "damaged",
        ) from None


def _unzstd(raw: bytes) -> bytes:
    import zstandard

    parts = []
    while raw:  # frame after frame
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(raw))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        if not frame.eof:
            raise EOFError("it ends in the middle of a frame")
        raw = frame.unused_data
    return b"".join(parts)


_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".tgz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _unzstd,
}
