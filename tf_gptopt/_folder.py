"""Several files of a folder that change as one: whichever moment a save is killed at, a reader
finds the files of before or the new ones, and never some of each.

The new files are written and synced in a hidden folder, `.saving-...`, beside the old ones. One
rename, to `.saved`, decides: from then on the new files count, and are moved to their names. What a
killed save has left to move, `settled` moves, which every reader and writer of such a folder calls
first. Files of the folder that are not of the save stay as they are.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tf_gptopt._errors import UserError
from tf_gptopt._files import file_mode, held, is_held, sweep, sync

SAVED = ".saved"
_SAVING = ".saving-"
_REMOVED = ".removed.json"  # names that the new version is without


@contextlib.contextmanager
def changing(folder: str | os.PathLike, owned: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write new files into; they appear in `folder`, all at once, when the block ends
    without an error. Until then `folder` is as it was.

    Args:
        folder: made when absent.
        owned: names that belong to this kind of save: those that it does not write are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_SAVING}*"):  # of saves that were killed
        if not is_held(left):
            shutil.rmtree(left, ignore_errors=True)
    saving = Path(tempfile.mkdtemp(prefix=_SAVING, dir=folder))
    try:
        with held(saving):
            yield saving
            _complete(saving, folder, owned)
            _decide(saving, folder)
        settled(folder)
    finally:
        shutil.rmtree(saving, ignore_errors=True)


def settled(folder: str | os.PathLike) -> Path:
    """`folder`, after the end of a save that was killed while its files moved to their names.

    Raises:
        UserError: when there is such a save, and the folder cannot be written.
    """
    folder = Path(folder)
    saved = folder / SAVED
    if not saved.is_dir():
        return folder
    try:
        _move(saved, folder)
    except OSError as error:
        raise UserError(
            f"A save to {folder} was cut short after its last byte, and its files cannot be moved "
            f"from {saved} to their names ({error.strerror or error}). Make the folder writable, "
            "or move them there by hand."
        ) from None
    return folder


def _complete(saving: Path, folder: Path, owned: Iterable[str]) -> None:
    """All that the disk has to know before the new files count."""
    removed = [name for name in owned if not (saving / name).exists()]
    if removed:
        (saving / _REMOVED).write_text(json.dumps(removed), "utf-8")
    for path in saving.rglob("*"):
        final = folder / path.relative_to(saving)
        if final.exists() and final.is_dir() != path.is_dir():  # it could not be moved there
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
        sync(path)
    saving.chmod(file_mode(0o777))
    sync(saving)


def _decide(saving: Path, folder: Path) -> None:
    while True:
        settled(folder)
        try:
            os.rename(saving, folder / SAVED)
            break
        except OSError as error:  # another save to the folder came first, by a moment
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    sync(folder)


def _move(saved: Path, folder: Path) -> None:
    """Every step may have been done before, or be done by another process at the same time."""
    gone = contextlib.suppress(FileNotFoundError)
    with gone:
        for name in json.loads((saved / _REMOVED).read_text("utf-8")):
            (folder / name).unlink(missing_ok=True)
    for path in sorted(saved.rglob("*")):
        final = folder / path.relative_to(saved)
        with gone:
            if path.is_dir():
                final.mkdir(exist_ok=True)
            elif path.name != _REMOVED:
                os.replace(path, final)
                sweep(final)
    sync(folder)  # the names, before the only other place that has them goes
    shutil.rmtree(saved, ignore_errors=True)
