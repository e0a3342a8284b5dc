"""One table for all of it: what every stage weighs, how well it predicts, how fast it decodes."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from tf_gptopt._files import write_json, write_text
from tf_gptopt._folder import changing
from tf_gptopt.evaluation.size import Size
from tf_gptopt.evaluation.speed import DraftSpeed, Speed


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurements of one model.

    Args:
        name: what the table calls it.
        kind: `keras` (weights that train on) or `tflite` (a file that ships).
        size, speed: see `Size` and `Speed`. A Keras model is timed as a float32 .tflite file, so
            that all rows run in one runtime and the factors are those of the model alone.
        loss, perplexity: on the held-out tokens.
        agreement: top-1 agreement with the row called `reference`; None for the first model.
        reference: the float model that this one was made from.
    """

    name: str
    kind: str
    size: Size
    speed: Speed
    loss: float
    perplexity: float
    agreement: float | None
    reference: str | None


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows in the order of the stages; the first is what the others are held against.

    Args:
        rows: one per model.
        tokens: held-out tokens that each was scored on.
        recommended: the name of the file to ship, or None where no file is good enough.
        why: the reason, with the factors.
        speculative: what a draft makes of the last model's speed, where one was measured.
        bytes_per_token: of the held-out text, in UTF-8; what a model says of a byte can be compared
            over tokenizers.
    """

    rows: tuple[Row, ...]
    tokens: int
    recommended: str | None
    why: str
    speculative: DraftSpeed | None = None
    bytes_per_token: float | None = None

    def bits_per_byte(self, row: Row) -> float | None:
        """The loss of a row in bits per byte of text; None where the bytes are not known."""
        if not self.bytes_per_token:
            return None
        return row.loss / math.log(2) / self.bytes_per_token

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Build from `to_dict`'s values."""
        rows = tuple(
            Row(**{**row, "size": Size(**row["size"]), "speed": Speed(**row["speed"])})
            for row in values["rows"]
        )
        drafted = values.get("speculative")
        return cls(
            **{**values, "rows": rows, "speculative": DraftSpeed(**drafted) if drafted else None}
        )


def recommend(rows: Sequence[Row], tolerance: float) -> tuple[str | None, str]:
    """The smallest file (gzip) whose perplexity is within `tolerance` of the first row's."""
    first = rows[0]
    files = [row for row in rows if row.kind == "tflite"]
    if not files:
        return None, "No .tflite file was evaluated: export one."
    bound = first.perplexity * (1.0 + tolerance)
    good = [row for row in files if row.perplexity <= bound]
    if not good:
        best = min(files, key=lambda row: row.perplexity)
        return None, (
            f"No file stays within {tolerance:.0%} of {first.name}'s perplexity; the nearest is "
            f"{best.name} ({best.perplexity:.2f} against {first.perplexity:.2f}). Train longer, "
            "prune less or keep more layers."
        )
    row = min(good, key=lambda row: row.size.gzip_bytes)
    return row.name, (
        f"{row.name}: {first.size.bytes / row.size.bytes:.1f}x smaller than {first.name} "
        f"({first.size.gzip_bytes / row.size.gzip_bytes:.1f}x after gzip), decodes "
        f"{row.speed.decode / first.speed.decode:.1f}x as fast, perplexity {row.perplexity:.2f} "
        f"against {first.perplexity:.2f}."
    )


def rich_table(report: Report) -> Any:
    """The report as a `rich.table.Table` of at most 80 columns; `markdown` says all of it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    compared: dict[str, list[str]] = {}
    for row in report.rows:
        if row.reference is not None:
            compared.setdefault(row.reference, []).append(row.name)
    agrees = "; ".join(f"{', '.join(names)} with {other}" for other, names in compared.items())
    table = Table(
        title=f"Measured on {report.tokens:,} held-out tokens",
        caption=f"agrees: same likeliest token; {agrees}" if agrees else None,
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("model", *_NARROW):
        is_name = column == "model"
        table.add_column(
            column,
            justify="left" if is_name else "right",
            overflow="fold",
            max_width=11 if is_name else None,
            no_wrap=not is_name,
        )
    for row in report.rows:
        style = "bold green" if row.name == report.recommended else None
        table.add_row(*narrow_cells(row), style=style)
    return table


_NARROW = ("params", "non-zero", "file", "gzip", "perplexity", "agrees", "tokens/s")


def narrow_cells(row: Row) -> list[str]:
    """A row's texts for a terminal: its name, then those of `_NARROW`."""
    return [
        row.name,
        three_digits(row.size.parameters),
        three_digits(row.size.nonzero),
        f"{three_digits(row.size.bytes)}B",
        f"{three_digits(row.size.gzip_bytes)}B",
        f"{row.perplexity:,.2f}",
        "" if row.agreement is None else f"{row.agreement:.1%}",
        f"{row.speed.decode:,.0f}",
    ]


def markdown(report: Report, title: str) -> str:
    """The report as a Markdown page."""
    columns = [*COLUMNS, *(["bits/byte"] if report.bytes_per_token else [])]
    lines = [f"# {title}", "", "| " + " | ".join(columns) + " |"]
    lines.append("| --- " + "| ---: " * (len(columns) - 1) + "|")
    for row in report.rows:
        mark = "**" if row.name == report.recommended else ""
        name, *rest = cells(row)
        if report.bytes_per_token:
            rest.append(f"{report.bits_per_byte(row):.3f}")
        lines.append("| " + " | ".join([f"{mark}{name}{mark}", *rest]) + " |")
    speed = report.rows[0].speed
    lines += ["", f"Recommended: {report.why}", ""]
    if report.speculative:
        lines += [report.speculative.in_words(), ""]
    lines += [
        f"Scored on {report.tokens:,} held-out tokens. Agreement is teacher-forced top-1 agreement "
        "with the model in brackets. Keras models are timed as float32 .tflite files; decode "
        f"follows a prompt of {speed.prompt_tokens} tokens, "
        f"{speed.threads or 'all'} processor threads.",
        "",
    ]
    return "\n".join(lines)


COLUMNS = (
    "model",
    "parameters",
    "non-zero",
    "file",
    "gzip",
    "loss",
    "perplexity",
    "agreement",
    "decode tok/s",
    "prefill tok/s",
)


def cells(row: Row) -> list[str]:
    """A row's texts, in the order of `COLUMNS`."""
    agreement = "" if row.agreement is None else f"{row.agreement:.1%} ({row.reference})"
    return [
        row.name,
        f"{row.size.parameters:,}",
        f"{row.size.nonzero:,}",
        human_bytes(row.size.bytes),
        human_bytes(row.size.gzip_bytes),
        f"{row.loss:.4f}",
        f"{row.perplexity:.2f}",
        agreement,
        f"{row.speed.decode:,.0f}",
        f"{row.speed.prefill:,.0f}",
    ]


def write_report(report: Report, folder: str | os.PathLike, title: str) -> None:
    """Write report.json and report.md to `folder`, both at once."""
    with changing(folder) as new:
        write_json(new / "report.json", report.to_dict())
        write_text(new / "report.md", markdown(report, title))


def three_digits(count: float) -> str:
    """1,234,567 -> `1.23 M`, 999,999 -> `1.00 M`."""
    count, unit = count / 1e3, 0
    while count >= 999.5 and unit < 2:
        count, unit = count / 1e3, unit + 1
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {'kMG'[unit]}"


def human_bytes(count: int) -> str:
    """1,234,567 -> `1.23 MB` (decimal units)."""
    if count < 1_000_000:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.2f} MB"
