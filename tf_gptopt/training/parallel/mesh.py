"""A mesh: the devices of one process laid out as rows for the batch and columns for the weights.

    batch=2,model=3          column 0    column 1    column 2
        row 0                 GPU:0       GPU:1       GPU:2      first half of the batch
        row 1                 GPU:3       GPU:4       GPU:5      second half
                             a third of every matrix in each column

Rows are data parallel, columns tensor parallel (see `tensor.py`). Without GPUs the devices are
logical CPU devices, on which everything can be tried. The module loads without TensorFlow.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tf_gptopt._errors import UserError, suggest

AXES = ("batch", "model")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The size of each axis.

    ```python
    mesh = Mesh.parse("batch=2,model=2")
    ```

    Args:
        batch: rows; the batch is divided among them.
        model: columns; heads, neurons and vocabulary are divided among them.

    Raises:
        UserError: for a size that is no positive integer.
    """

    batch: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise UserError(
                    f"An axis of a mesh has a positive size. Received: {axis}={size!r}."
                )

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read `"batch=2,model=2"`; an axis that is left out has size 1.

        Raises:
            UserError: for an unknown or repeated axis and for a size that is none.
        """
        sizes: dict[str, int] = {}
        for item in str(text).split(","):
            axis, equals, size = (part.strip() for part in item.partition("="))
            if not equals or not size.isdecimal():
                raise UserError(
                    f"A mesh is written as axis=size, such as batch=2,model=2. Received: {text!r}."
                )
            if axis not in AXES:
                raise UserError(f"Unknown mesh axis {axis!r}.{suggest(axis, AXES)}")
            if axis in sizes:
                raise UserError(f"The mesh axis {axis} is given twice. Received: {text!r}.")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.batch * self.model

    def __str__(self) -> str:
        return f"batch={self.batch},model={self.model}"

    def devices(self) -> list[list[str]]:
        """Names of the devices, `devices[row][column]`: GPUs, or logical CPU devices.

        On a machine without GPUs the CPU is divided into as many logical devices as the mesh has,
        which TensorFlow allows only before it has computed anything.

        Raises:
            UserError: when there are fewer devices than the mesh has.
        """
        import tensorflow as tf

        kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
        if kind == "CPU":
            _divide_cpu(tf, self.size)
        names = [device.name for device in tf.config.list_logical_devices(kind)]
        if len(names) < self.size:
            raise UserError(_too_few(self, len(names), kind))
        columns = self.model
        return [names[row * columns : (row + 1) * columns] for row in range(self.batch)]


def _divide_cpu(tf: Any, count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    if count <= len(tf.config.get_logical_device_configuration(cpu) or [cpu]):
        return
    devices = [tf.config.LogicalDeviceConfiguration()] * count
    try:
        tf.config.set_logical_device_configuration(cpu, devices)
    except RuntimeError:  # TensorFlow runs already: `devices` counts what it has
        return


def _too_few(mesh: Mesh, found: int, kind: str) -> str:
    what = f"The mesh {mesh} needs {mesh.size} devices, and TensorFlow has {found} {kind} "
    what += "device. " if found == 1 else "devices. "
    if kind == "GPU":
        return what + (
            "Take a smaller mesh, or hide the GPUs (CUDA_VISIBLE_DEVICES=-1) to try it on logical "
            "CPU devices."
        )
    return what + (
        "A CPU can be divided only before TensorFlow first computes. Call "
        f"Mesh.parse({str(mesh)!r}).devices() at the very start of the program, or give "
        "tf.config.set_logical_device_configuration a list of "
        f"{mesh.size} tf.config.LogicalDeviceConfiguration()."
    )
