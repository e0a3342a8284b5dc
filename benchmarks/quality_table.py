"""What benchmarks/quality.py says of its runs: a table, the bounds, plots."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

COLUMNS = (
    "parameters",
    "non-zero",
    "int8 MB",
    "gzip MB",
    "perplexity",
    "change",
    "top-1",
    "KL",
    "decode",
)


def print_table(corpus: str, outcome: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(corpus, *COLUMNS, "seconds", title=f"PyTorch: {outcome['pytorch']}")
    for name, row in outcome["rows"].items():
        table.add_row(name, *cells(row), f"{row['seconds']:,.0f}")
    console = Console(width=150)
    console.print(table)
    for bound in outcome["bounds"]:
        console.print(bound)


def cells(row: dict[str, Any]) -> list[str]:
    """A row as the documentation prints it."""
    return [
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['nonzero'] / 1e6:.2f} M",
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['gzip_bytes'] / 1e6:.2f}",
        f"{row['perplexity']:.2f}",
        f"{row['change']:+.1%}",
        f"{row['agreement']:.1%}",
        f"{row['kl']:.4f}",
        f"{row['decode_ratio']:.2f}x",
    ]


def plot(corpus: str, outcome: dict[str, Any], folder: Path) -> None:
    """`quality-CORPUS.svg`: perplexity against the size of the packed file. On the left a line for
    each way to remove weights, through its sparsities; on the right a point for each way to store
    them, and for `small`, which does both."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quality", "font.size": 9})
    import matplotlib.pyplot as plt

    parent = outcome["rows"]["parent"]["perplexity"]
    figure, panels = plt.subplots(1, 2, figsize=(13, 7), layout="constrained")
    stored, removed = {}, {}
    for name, row in outcome["rows"].items():
        if name == "early":  # not what anything starts from
            continue
        is_stored = row["group"] in ("parent", "quantized", "quantized, tuned", "small")
        label = name if is_stored else _line(name, row)
        points = (stored if is_stored else removed).setdefault(label, [])
        points.append((row["gzip_bytes"] / 1e6, row["perplexity"]))
    for axes, lines, ceiling in zip(panels, (removed, stored), (1.6, 1.3), strict=True):
        for number, (label, points) in enumerate(sorted(lines.items())):
            shown = [point for point in sorted(points) if point[1] <= ceiling * parent]
            if shown:
                style = "--" if "one-shot" in label else "-" if "tuned" in label else "none"
                marker, fill = "osD^vP"[number // 10 % 6], "none" if "ptq" in label else "full"
                axes.plot(
                    *zip(*shown, strict=True),
                    linestyle=style,
                    color=f"C{number % 10}",
                    marker=marker,
                    markersize=4,
                    fillstyle=fill,
                    label=label,
                )
        axes.axhline(parent, color="gray", linewidth=0.7)
        axes.set(xlabel=".tflite file after gzip, MB", ylabel="perplexity")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    panels[0].set_title(f"{corpus}: weights removed, int8")
    panels[1].set_title(f"{corpus}: weights stored in fewer bits")
    figure.savefig(folder / f"quality-{corpus}.svg", metadata={"Date": None})
    plt.close(figure)


def _line(name: str, row: dict[str, Any]) -> str:
    """The line that a run is a point of: its name without the sparsity."""
    if "score" not in row:
        first, _, last = name.rpartition("-")
        return {"half depth": first, "structured": f"shrunk by {last}"}.get(row["group"], name)
    kind = [row["score"], row["pattern"] * (row["pattern"] != "unstructured")]
    kind.append(row["scope"] * (row["scope"] != "layer"))
    kind += [pattern.rpartition("_")[2] for pattern in row.get("layers", ())]
    group = "tuned, taught" if row.get("taught") else row["group"]
    return f"{' '.join(filter(None, kind))}, {group}"


def fill(text: str, results: dict[str, Any]) -> str:
    """A page with its tables as they were measured. The line above a table says what it shows:
    `<!-- measured: PATTERN ... -->` runs by patterns of their names, a line for each corpus,
    `<!-- compared: PATTERN ... -->` the same in one line for all, `<!-- sparsities: GROUP -->`
    every score at every sparsity, `<!-- all: CORPUS -->`, `<!-- parents -->` and `<!-- bounds -->`.
    """

    def table(match: re.Match[str]) -> str:
        kind, _, words = match[2].partition(": ")
        lines = _KINDS[kind](results, words.split())
        return match[1] + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    marks = rf"(<!-- ((?:{'|'.join(_KINDS)})(?:: .*?)?) -->\n)((?:\|.*\n)*)"
    return re.sub(marks, table, text)


def _runs(results: dict[str, Any], patterns: list[str]) -> list[list[str]]:
    lines = [
        [corpus, name, *cells(row)]
        for corpus, outcome in results.items()
        for pattern in patterns
        for name, row in sorted(outcome["rows"].items())
        if fnmatchcase(name, pattern)
    ]
    return _table(["corpus", "run", *COLUMNS], lines)


def _compared(results: dict[str, Any], patterns: list[str]) -> list[list[str]]:
    """Sizes and speed are the first corpus's: the others' differ by a percent."""
    first = next(iter(results.values()))["rows"]
    names = [n for p in patterns for n in sorted(first) if fnmatchcase(n, p)]
    corpora = [c for c, outcome in results.items() if any(n in outcome["rows"] for n in names)]
    lines = []
    for name in names:
        rows = [results[corpus]["rows"].get(name) for corpus in corpora]
        changes = [f"{row['change']:+.1%}" if row else "" for row in rows]
        *sizes, decode = (cells(first[name])[i] for i in (0, 1, 2, 3, -1))
        lines.append([name, *sizes, *changes, decode])
    return _table(["run", *COLUMNS[:4], *corpora, "decode"], lines, text=1)


def _sparsities(results: dict[str, Any], groups: list[str]) -> list[list[str]]:
    """Perplexity's change, a line for each score, scope and pattern that was run at several."""
    lines: dict[tuple[str, str], dict[float, str]] = {}
    for corpus, outcome in results.items():
        for name, row in outcome["rows"].items():
            if row["group"] == groups[0] and "score" in row and not row.get("taught"):
                label = _line(name, row).removesuffix(f", {groups[0]}")
                cell = f"{row['change']:+.1%}" if row["change"] < 10 else "> +1,000%"
                lines.setdefault((label, corpus), {})[row["sparsity"]] = cell
    found = sorted({sparsity for line in lines.values() for sparsity in line})
    rows = [
        [*about, *(line.get(sparsity, "") for sparsity in found)]
        for about, line in sorted(lines.items())
        if len(line) > 1
    ]
    return _table(["score", "corpus", *(f"{sparsity:.0%}" for sparsity in found)], rows)


def _all(results: dict[str, Any], corpora: list[str]) -> list[list[str]]:
    rows = results.get(corpora[0], {"rows": {}})["rows"]
    return _table(["run", *COLUMNS], [[name, *cells(row)] for name, row in rows.items()])


def _parents(results: dict[str, Any], words: list[str]) -> list[list[str]]:
    lines = []
    for corpus, outcome in results.items():
        rows = outcome["rows"]
        if outcome["pytorch"]:
            losses = (rows.get("early", rows["parent"]), outcome["pytorch"], rows["parent"])
            tokens = f"{outcome['train_tokens']:,}"
            lines.append([corpus, tokens, *(f"{one['loss']:.4f}" for one in losses)])
    head = ["corpus", "tokens in it", "our loss", "PyTorch's there", "the parent's"]
    return _table(head, lines, text=1)


def _bounds(results: dict[str, Any], words: list[str]) -> list[list[str]]:
    lines = [
        [corpus, bound["what"], bound["bound"], _reached(**bound), _yes(bound["holds"])]
        for corpus, outcome in results.items()
        for bound in outcome["bounds"]
    ]
    return _table(["corpus", "technique", "to reach", "reached", "holds"], lines, text=5)


def _reached(reached: Any, bound: str, **_: Any) -> str:
    if isinstance(reached, list):
        return ", ".join(f"{one:,.1f}" for one in reached)
    return f"{reached:.2f}x" if bound.endswith("x") else f"{reached:+.2%}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _table(head: list[str], lines: list[list[str]], text: int = 2) -> list[list[str]]:
    """With a head, if there is anything below it; the first `text` columns hold words."""
    rule = ["---" if i < text else "---:" for i in range(len(head))]
    return [head, rule, *lines] if lines else []


_KINDS = {
    "measured": _runs,
    "compared": _compared,
    "sparsities": _sparsities,
    "all": _all,
    "parents": _parents,
    "bounds": _bounds,
}
