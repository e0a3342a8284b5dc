"""`ShrinkConfig`: how small a model gets, and what may go for it. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tf_gptopt._errors import UserError, known_arguments, suggest
from tf_gptopt.models.config import GPTConfig, PerBlock

AXES = ("heads", "neurons", "layers", "width")
IMPORTANCES = ("activation", "taylor")
_SHAPE = ("layers", "num_heads", "intermediate_dim", "embedding_dim")


@known_arguments
@dataclasses.dataclass(frozen=True)
class ShrinkConfig:
    """What `shrink` leaves of a model: a budget, or a shape.

    A budget is met from below by cutting along `axes` wherever it hurts least. A shape is taken as
    it is, and filled with the best blocks, heads, neurons and channels that there are.

    ```python
    ShrinkConfig(parameters=0.67)                       # a third of all weights goes
    ShrinkConfig(flops=0.5, axes=("layers",))           # whole blocks alone
    ShrinkConfig(layers=6)
    ShrinkConfig(embedding_dim=320, num_heads=5, intermediate_dim=1024)
    ```

    Args:
        parameters: how many weights may stay: a fraction of the model's own (a float between 0 and
            1) or their number (an integer). A tied token table counts once.
        flops: the same for the floating-point operations of one token at the end of a full context.
        layers: how many blocks stay, or which: their indices, ascending.
        num_heads: attention heads of each block that stays, one number or one per block.
        intermediate_dim: its MLP neurons, likewise.
        embedding_dim: width of the residual stream.
        axes: what a budget may be cut from: `"heads"`, `"neurons"`, `"layers"` and `"width"`.
        importance: what ranks units of one kind: `"activation"` or `"taylor"`; see `importance.py`.
        neuron_multiple: a budget leaves every block a multiple of this many neurons; matrix
            kernels work on 8 or 16 at a time.
        width_multiple: the same for the width.

    Raises:
        UserError: when this is not one budget and not one shape, or a number is out of its range.
    """

    parameters: int | float | None = None
    flops: int | float | None = None
    layers: int | tuple[int, ...] | None = None
    num_heads: PerBlock | None = None
    intermediate_dim: PerBlock | None = None
    embedding_dim: int | None = None
    axes: tuple[str, ...] = AXES
    importance: str = "activation"
    neuron_multiple: int = 16
    width_multiple: int = 16

    def __post_init__(self) -> None:
        for name in ("layers", "num_heads", "intermediate_dim", "axes"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        self._check_kind()
        for name in ("parameters", "flops"):
            _check_amount(name, getattr(self, name))
        _check_layers(self.layers)
        for name in ("num_heads", "intermediate_dim", "embedding_dim"):
            _check_sizes(name, getattr(self, name), per_block=name != "embedding_dim")
        for name in ("neuron_multiple", "width_multiple"):
            if not _is_count(getattr(self, name)):
                raise UserError(
                    f"{name} must be a positive integer. Received: {getattr(self, name)!r}."
                )
        if not isinstance(self.axes, tuple) or not self.axes:
            raise UserError(f"axes must list some of {AXES}. Received: axes={self.axes!r}.")
        for axis in self.axes:
            if axis not in AXES:
                raise UserError(f"Unknown axis {axis!r}.{suggest(str(axis), AXES)}")
        if self.importance not in IMPORTANCES:
            hint = suggest(str(self.importance), IMPORTANCES)
            raise UserError(f"Unknown importance {self.importance!r}.{hint}")

    def _check_kind(self) -> None:
        budgets = [name for name in ("parameters", "flops") if getattr(self, name) is not None]
        shape = [name for name in _SHAPE if getattr(self, name) is not None]
        if len(budgets) + bool(shape) != 1:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in (*budgets, *shape))
            raise UserError(
                "Shrinking needs one target: parameters=, flops=, or a shape (layers=, num_heads=, "
                f"intermediate_dim=, embedding_dim=). Received: {given or 'none'}."
            )

    @property
    def budget(self) -> str | None:
        """`"parameters"` or `"flops"`; None for a shape."""
        return next((n for n in ("parameters", "flops") if getattr(self, n) is not None), None)

    @property
    def needs_calibration(self) -> bool:
        """Whether something has to be ranked: a number of blocks alone may be spaced evenly, and
        blocks named one by one leave no choice."""
        others = (self.num_heads, self.intermediate_dim, self.embedding_dim)
        return self.budget is not None or any(value is not None for value in others)

    def check_fits(self, shape: GPTConfig) -> None:
        """Raise a `UserError` unless a model of this shape has the parts that are to stay."""
        if isinstance(self.layers, int) and self.layers > shape.num_layers:
            raise UserError(
                f"The model has {shape.num_layers} blocks, so layers must be 1 to "
                f"{shape.num_layers}, or a list of indices. Received: layers={self.layers}."
            )
        if isinstance(self.layers, tuple) and self.layers[-1] >= shape.num_layers:
            raise UserError(
                f"layers must list ascending indices between 0 and {shape.num_layers - 1}, each "
                f"once. Received: layers={list(self.layers)}."
            )
        if (self.embedding_dim or 0) > shape.embedding_dim:
            raise UserError(
                f"The model is {shape.embedding_dim} wide; shrinking makes no new channels. "
                f"Received: embedding_dim={self.embedding_dim}."
            )
        count = len(self.layers) if isinstance(self.layers, tuple) else self.layers
        count = shape.num_layers if count is None else count
        for name, there in (
            ("num_heads", shape.block_heads),
            ("intermediate_dim", shape.block_intermediate_dims),
        ):
            wanted = getattr(self, name)
            if isinstance(wanted, tuple) and len(wanted) != count:
                raise UserError(
                    f"{name} must be one number or one per block that stays ({count}). "
                    f"Received: {name}={wanted}."
                )
            most = max(wanted) if isinstance(wanted, tuple) else wanted or 0
            if most > max(there):
                raise UserError(
                    f"Block 0 has {there[0]} of {name}; shrinking makes no new ones. "
                    f"Received: {name}={wanted}."
                )

    def left_of(self, shape: GPTConfig) -> GPTConfig | None:
        """The shape that is left of `shape`, None where it depends on the weights (a budget, or a
        choice among blocks that differ).

        Raises:
            UserError: as `check_fits`.
        """
        self.check_fits(shape)
        uniform = isinstance(shape.num_heads, int) and isinstance(shape.intermediate_dim, int)
        if self.budget is not None or not uniform:
            return None
        count = len(self.layers) if isinstance(self.layers, tuple) else self.layers
        return dataclasses.replace(
            shape,
            num_layers=shape.num_layers if count is None else count,
            num_heads=self.num_heads or shape.num_heads,
            intermediate_dim=self.intermediate_dim or shape.intermediate_dim,
            embedding_dim=self.embedding_dim or shape.embedding_dim,
        )


def _plain(value: Any) -> Any:
    """Tuples for lists, Python's numbers for numpy's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_amount(name: str, value: Any) -> None:
    fraction = isinstance(value, float) and 0.0 < value < 1.0
    if value is not None and not fraction and not _is_count(value):
        raise UserError(
            f"{name} must be a fraction between 0 and 1 or a positive integer. "
            f"Received: {name}={value!r}."
        )


def _check_layers(layers: Any) -> None:
    if layers is None or _is_count(layers):
        return
    indices = isinstance(layers, tuple) and layers and all(type(i) is int for i in layers)
    if not indices or layers[0] < 0 or list(layers) != sorted(set(layers)):
        shown = list(layers) if isinstance(layers, tuple) else layers
        raise UserError(
            "layers must be a positive number of blocks, or list the indices of some, ascending "
            f"and each once. Received: layers={shown!r}."
        )


def _check_sizes(name: str, value: Any, per_block: bool) -> None:
    many = per_block and isinstance(value, tuple) and value
    if value is not None and not all(_is_count(n) for n in (value if many else (value,))):
        what = "a positive integer, or one per block" if per_block else "a positive integer"
        raise UserError(f"{name} must be {what}. Received: {name}={value!r}.")
