"""What it costs to change one layer: a table that files keep, people read and budgets use.

Needs no TensorFlow, and matplotlib for the plot alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._files import atomic_path, read_json, write_json
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.evaluation.report import human_bytes


@dataclasses.dataclass(frozen=True)
class SensitivityRow:
    """The model with this layer changed, and no other.

    Args:
        layer: its name, without wrappers.
        option: what became of its matrix: a value for `QuantConfig.layers` (`"int4:128"`), or
            `"prune50"`.
        weights: how many numbers its matrix has.
        bytes: what the matrix takes in a .tflite file; the zeros of a pruned one count.
        loss: mean cross-entropy of the held-out tokens, nats.
        kl: mean KL(float model || this one) of the next token, nats.
        agreement: share of the positions at which both find the same token most likely.
    """

    layer: str
    option: str
    weights: int
    bytes: int
    loss: float
    kl: float
    agreement: float


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What each layer's change costs; `measure_sensitivity` makes it.

    Args:
        rows: one for each layer and option, in the model's order.
        loss: of the float model, nats per token.
        tokens: held-out tokens that everything was measured on.
        quantization: the scheme whose range, rounding and granularity the options had.
    """

    rows: tuple[SensitivityRow, ...]
    loss: float
    tokens: int
    quantization: QuantConfig = QuantConfig()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "quantization": self.quantization.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """Build from `to_dict`'s values."""
        return cls(
            rows=tuple(SensitivityRow(**row) for row in values["rows"]),
            loss=values["loss"],
            tokens=values["tokens"],
            quantization=QuantConfig.from_dict(values["quantization"]),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write it as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Sensitivity:
        """Read what `save` wrote, or `measure_sensitivity(..., out=path)`.

        Raises:
            UserError: when the file holds no table, or one that is not finished.
        """
        values = read_json(path)
        if isinstance(values, dict) and "sums" in values and "rows" not in values:
            raise UserError(
                f"{path} is half measured. Run the same `tf-gptopt sensitivity` again: it goes on."
            )
        try:
            return cls.from_dict(values)
        except (KeyError, TypeError):
            raise UserError(
                f"{path} is no table of sensitivity. Make one with `tf-gptopt sensitivity`."
            ) from None

    def totals(self, weights: Mapping[str, str]) -> tuple[int, float]:
        """`(bytes, summed KL)` of a scheme: an option for each layer of the table. Layers that it
        leaves out, or to an option without a row ("float16"), count 2 bytes a weight and no KL."""
        rows = {(row.layer, row.option): row for row in self.rows}
        sizes = {row.layer: row.weights for row in self.rows}
        chosen = [(rows.get((layer, weights.get(layer, ""))), sizes[layer]) for layer in sizes]
        return (
            sum(row.bytes if row else 2 * size for row, size in chosen),
            sum(row.kl for row, _ in chosen if row),
        )


def rich_table(table: Sensitivity) -> Any:
    """The rows as a `rich.table.Table`, what costs most first."""
    from rich.table import Table

    drawn = Table(
        title=f"Only this layer changed, {table.tokens:,} held-out tokens, "
        f"float loss {table.loss:.4f}"
    )
    for column in ("layer", "as", "size", "KL", "loss", "agreement"):
        drawn.add_column(column, justify="left" if column in ("layer", "as") else "right")
    for row in sorted(table.rows, key=lambda row: -row.kl):
        drawn.add_row(
            row.layer,
            row.option,
            human_bytes(row.bytes),
            f"{row.kl:.6f}",
            f"{row.loss - table.loss:+.5f}",
            f"{row.agreement:.2%}",
        )
    return drawn


def plot(table: Sensitivity, path: str | os.PathLike) -> None:
    """Draw KL by layer, one colour for each option; `path` ends in .svg, .png or .pdf.

    Raises:
        UserError: without matplotlib, and for another kind of file.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"A plot is a .svg, .png or .pdf file. Received: {path}.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("A plot needs matplotlib: pip install 'tf-gptopt[plot]'.") from None

    layers = list(dict.fromkeys(row.layer for row in table.rows))
    figure = Figure(figsize=(max(6.0, 0.3 * len(layers) + 2), 4.5), layout="constrained")
    axes = figure.add_subplot()
    for option in dict.fromkeys(row.option for row in table.rows):
        rows = [row for row in table.rows if row.option == option]
        places = [layers.index(row.layer) for row in rows]
        axes.plot(places, [row.kl for row in rows], "o", markersize=4, label=option)
    axes.set_yscale("symlog", linthresh=1e-6)  # a KL of nothing may be 0, or rounding below it
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_ylabel("KL to the float model, nats")
    axes.set_title(f"Only this layer changed ({table.tokens:,} tokens)")
    axes.grid(True, alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])
