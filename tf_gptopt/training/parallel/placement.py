"""Where the pieces of a model's weights lie, and who reads them in a step.

`grid` is `Mesh.devices()`: names of devices, `grid[row][column]`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import tensorflow as tf

from tf_gptopt.models.config import GPTConfig
from tf_gptopt.training.parallel.collectives import broadcast, on
from tf_gptopt.training.parallel.sharding import split_weight

TABLE, HEAD = "token_embedding/embeddings", "token_logits/kernel"

Grid = Sequence[Sequence[str]]
Pieces = dict[str, list[tf.Variable]]


def place(weights: Mapping[str, np.ndarray], config: GPTConfig, grid: Grid) -> Pieces:
    """Variables for the pieces of all weights, by name in the order of `weights`.

    Each lies on that device of its column (a whole weight: on any device) which has the fewest
    bytes so far, the largest weights first.
    """
    load: defaultdict[str, int] = defaultdict(int)
    placed: Pieces = {name: [] for name in weights}
    for name in sorted(weights, key=lambda name: -weights[name].size):
        parts = split_weight(name, weights[name], config, len(grid[0]))
        for column, part in enumerate(parts):
            home = min(_readers(grid, column, len(parts)), key=lambda reader: load[reader[1]])[1]
            load[home] += part.nbytes
            with tf.device(home):
                placed[name].append(tf.Variable(part, name=f"{name}/{column}"))
    return placed


def read(
    pieces: Mapping[str, Sequence[tf.Variable]], config: GPTConfig, grid: Grid, dtype: str
) -> list[dict[str, list[tf.Tensor]]]:
    """`[row][name][column]`: the tensor that a device computes with, cast to `dtype`.

    A tied table is there under two names, `TABLE` and `HEAD`, because each use reads a copy of its
    own; a table that is only the head stays float32, as logits are.
    """
    copies: list[dict] = [defaultdict(list) for _ in grid]
    for name, parts in pieces.items():
        names = [TABLE, HEAD] if name == TABLE and config.tie_embeddings else [name]
        cast = partial(tf.cast, dtype="float32" if name == HEAD else dtype)
        for column, piece in enumerate(parts):
            value = on(piece.device, cast, piece.read_value())
            uses = [(use, row) for use in names for row, _ in _readers(grid, column, len(parts))]
            values = broadcast(value, piece.device, len(uses))
            for (use, row), copy in zip(uses, values, strict=True):
                copies[row][use].append(copy)
    return copies


def _readers(grid: Grid, column: int, pieces: int) -> list[tuple[int, str]]:
    """`(row, device)` of all that compute with a piece: its column, or all with a whole weight."""
    return [
        (row, device)
        for row, devices in enumerate(grid)
        for device in (devices if pieces == 1 else devices[column : column + 1])
    ]


def bytes_per_device(variables: Iterable[tf.Variable]) -> dict[str, int]:
    """Bytes of `variables` by the device that they lie on.

    ```python
    bytes_per_device([*sharded.variables, *sharded.optimizer.variables])
    ```
    """
    found: defaultdict[str, int] = defaultdict(int)
    for variable in variables:
        device = tf.DeviceSpec.from_string(variable.device)
        size = variable.shape.num_elements() * variable.dtype.size
        found[f"{device.device_type}:{device.device_index}"] += size
    return dict(sorted(found.items()))
