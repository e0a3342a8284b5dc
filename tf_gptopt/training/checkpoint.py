"""Checkpoints of a run: everything that the next step depends on, whole or absent on disk.

A checkpoint is a folder `step-00000120` that holds a `tf.train.Checkpoint`: weights and all other
variables of the model (pruning masks and steps, quantization ranges, the random states of dropout),
the optimizer's moments and iterations, and the `RunState`. It is written under another name, synced
to the disk and renamed. The newest two stay; the older one serves when the newest turns out to be
damaged, which the checksums in the files tell.

In a cluster the chief writes, and chooses the checkpoint that all workers take up: one of them
might see a folder that another does not see yet, or a damage that another is spared.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError, reason_of
from tf_gptopt._files import SEAL, check_seal, read_json, sealed, sync, write_json
from tf_gptopt.training.cluster import Alone
from tf_gptopt.training.settings import differences, flat

_KEEP = 2
_RUN_FILE = "run.json"


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: made if it is absent; in a cluster, the same one on all workers.
        run: what must be the same for a run to go on from here, as plain values for JSON.
        workers: that restore and save together; each of them has to call both.
        parts: the trackable objects to save, by name.

    Raises:
        UserError: when the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        run: dict[str, Any],
        workers: Alone | None = None,
        **parts: Any,
    ) -> None:
        self.folder = Path(folder)
        self._run = run
        self._workers = workers or Alone()
        self._checkpoint = tf.train.Checkpoint(**parts)
        if not self._workers.is_chief:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(
                f"The checkpoint folder {folder} cannot be written ({error.strerror}). Choose "
                "another one or mend its permissions."
            ) from None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def restore(self) -> int | None:
        """Put the newest whole checkpoint into the parts and return its step; None without one.

        Raises:
            UserError: when the checkpoints are of another run, or all of them are damaged.
        """
        problem, step = "", None
        if self._workers.is_chief:
            try:
                step = self._newest()
            except UserError as error:
                problem = str(error)
        problem, step = self._workers.share((problem, step))
        if problem:
            raise UserError(problem)
        if step is not None:
            self._read(step)
        return step

    def save(self, step: int) -> None:
        """Write a checkpoint and remove what is older than the newest two.

        Raises:
            UserError: when it cannot be written; those on disk stay.
        """
        chief = self._workers.is_chief
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder if chief else None))
        try:
            self._checkpoint.write(str(temporary / "checkpoint"))
            if not chief:
                return  # each worker takes part in the reading, one writes
            for path in [*temporary.iterdir(), temporary]:
                sync(path)  # TensorFlow leaves its files to the page cache
            final = self._path(step)
            shutil.rmtree(final, ignore_errors=True)
            temporary.chmod(0o755)
            os.replace(temporary, final)
            sync(self.folder)
        except (OSError, tf.errors.OpError) as error:
            raise UserError(
                f"The checkpoint of step {step} could not be written to {self.folder} "
                f"({reason_of(error)}). Free some space there; the same call then goes "
                "on from the newest checkpoint."
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self.steps()[:-_KEEP]:
            shutil.rmtree(self._path(old), ignore_errors=True)
        for rest in self.folder.glob(".writing-*"):  # of a process that was killed
            shutil.rmtree(rest, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _newest(self) -> int | None:
        """The step of the newest whole checkpoint of this run; damaged ones step aside."""
        steps = self.steps()
        if not steps:
            if any(self.folder.glob("damaged-*")):
                raise self._all_damaged()
            write_json(self.folder / _RUN_FILE, sealed(self._run))
            return None
        self._check_run()
        for step in reversed(steps):
            if _is_whole(str(self._path(step) / "checkpoint")):
                return step
            with contextlib.suppress(OSError):  # out of the way of the next one
                os.replace(self._path(step), self.folder / f"damaged-{step:08d}")
        raise self._all_damaged()

    def _all_damaged(self) -> UserError:
        return UserError(
            f"The checkpoints in {self.folder} are damaged. Restore the folder from a copy, or "
            "delete it to start over."
        )

    def _read(self, step: int) -> None:
        try:
            status = self._checkpoint.read(str(self._path(step) / "checkpoint"))
            status.assert_existing_objects_matched()
        except (AssertionError, ValueError):
            raise UserError(
                f"The checkpoint {self._path(step)} belongs to another model or optimizer. "
                "Build the model as it was, or delete the folder to start over."
            ) from None
        except tf.errors.OpError as error:
            raise UserError(
                f"Worker {self._workers.index} cannot read {self._path(step)}, which worker 0 has "
                f"found whole ({reason_of(error)}). The folder has to lie on a file "
                "system that all workers see."
            ) from None

    def _check_run(self) -> None:
        path = self.folder / _RUN_FILE
        before = read_json(path)
        if not isinstance(before, dict):
            raise UserError(f"{path} must hold a JSON object. Restore the folder from a copy.")
        check_seal(path, before)
        before.pop(SEAL, None)
        different = differences(flat(self._run), flat(before))
        if different:
            changes = ", ".join(
                f"{name} was {theirs!r} and is {ours!r}"
                for name, (ours, theirs) in different.items()
            )
            raise UserError(
                f"The checkpoints in {self.folder} are of another run: {changes}. Give the values "
                "that it was started with, or delete the folder to start over."
            )


def _is_whole(prefix: str) -> bool:
    """Whether every byte is there and right: reading a tensor checks its checksum."""
    try:
        reader = tf.train.load_checkpoint(prefix)
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
    except Exception:  # TensorFlow dresses one damage as OpError, IndexError, ValueError, ...
        return False
    return True
