"""`tf-gptopt recipes`: every recipe of the package in a line. Needs no TensorFlow."""

from __future__ import annotations

from importlib import resources

from rich.table import Table

from tf_gptopt.compression.quantization.config import RECIPES
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.recipe import packaged_recipes


def explain_recipes(console: Console) -> None:
    """Two tables: schemes of quantization, and recipes of whole runs."""
    schemes = {name: f"{line} ({config.name})" for name, (config, line) in RECIPES.items()}
    for title, lines in (
        ("--quantization NAME, or `quantization: NAME` in a recipe", schemes),
        ("tf-gptopt run NAME", describe_runs()),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, line in lines.items():
            table.add_row(name, line)
        console.note(table)


def describe_runs() -> dict[str, str]:
    """Every recipe of a run inside the package, and what it says of itself: its first line."""
    folder = resources.files("tf_gptopt.recipes")
    lines = {}
    for name in packaged_recipes():
        first, _, _ = folder.joinpath(f"{name}.yaml").read_text("utf-8").partition("\n")
        lines[name] = first.removeprefix("# ")
    return lines
