"""`tf-gptopt inspect`: what is in a .tflite file, as people read it. Needs no TensorFlow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from tf_gptopt._errors import UserError
from tf_gptopt._options import Options
from tf_gptopt.evaluation.report import human_bytes
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.places import speaking_place
from tf_gptopt.tflite.inspecting import Inspection, Signature, inspect_tflite

_NUMBERS = ("operations", "XNNPACK")


def inspect_command(options: Options, argv: list[str]) -> int:
    """Parse, look, print."""
    options.add("file", nargs="?", default=None, metavar="MODEL", help="--model, without its name")
    options.add("--model", default=None, help="a .tflite file, or a folder or run with one in it")
    options.add("--json", action="store_true", help="print JSON instead of tables")
    given, _ = options.parse(argv)
    if (given.file is None) == (given.model is None):
        raise UserError("Name one model: tf-gptopt inspect FILE.")
    path = speaking_place(given.file or given.model)
    found = inspect_tflite(path / "model.tflite" if path.is_dir() else path)
    if given.json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    console = Console()
    for table in rich_tables(found):
        console.note(table)
    return 0


def rich_tables(found: Inspection) -> list[Table]:
    """The file, its bytes, its functions."""
    about = Table(title=found.path, title_justify="left", show_header=False)
    for name, text in _facts(found):
        about.add_row(name, text)
    sizes = Table(title="Bytes by what they are for", title_justify="left")
    for column in ("kind", "bytes", "share"):
        sizes.add_column(column, justify="left" if column == "kind" else "right")
    for kind, size in sorted(found.sizes.items(), key=lambda item: -item[1]):
        sizes.add_row(kind, f"{size:,}", f"{size / found.bytes:.1%}")
    functions = Table(title="Signatures", title_justify="left")
    for column in ("signatures", "tokens", "capacity", "operations", "XNNPACK", "left to LiteRT"):
        functions.add_column(column, justify="right" if column in _NUMBERS else "left")
    for group in _groups(found.signatures):
        functions.add_row(*_cells(group))
    return [about, sizes, functions]


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    ratio = found.bytes_per_parameter
    each = f", {ratio:.4f} bytes a parameter" if ratio else ""
    yield "size", f"{human_bytes(found.bytes)}{each}"
    yield "written by", "tf_gptopt" if found.is_ours else "somebody else: no KV cache of ours"
    yield "checksum", found.checksum or "none"
    if found.scheme:
        yield "quantization", found.scheme
    counted = f"{found.numbers:,} numbers in constants, {found.nonzero:,} not zero"
    yield "parameters", f"{found.parameters:,} ({counted})" if found.parameters else counted
    if found.tokenizer:
        where, mark = found.tokenizer["where"] or "not there", found.tokenizer["fingerprint"]
        yield "tokenizer", f"{where}; {found.tokenizer['vocab_size']:,} tokens, {str(mark)[:12]}"
    if found.files:
        yield "archive", ", ".join(f"{name} {human_bytes(n)}" for name, n in found.files.items())
    if found.made:
        versions = ", ".join(f"{name} {text}" for name, text in found.made["versions"].items())
        yield "made", f"{found.made['date']} with {versions}"
        if check := found.made.get("check"):
            yield (
                "checked",
                f"{check['distance']:g} from its model (1: nothing of it left), agreement "
                f"{check['agreement']:.1%}, on {check['positions']:.0f} tokens"
                + (f" ({check['text']})" if "text" in check else ""),
            )
    for what, size in found.twice or [("nothing", 0)]:
        yield "stored twice", f"{what} ({human_bytes(size)})" if size else what
    if found.xnnpack:
        yield "XNNPACK", f"not known what it takes: {found.xnnpack}"


def _groups(signatures: tuple[Signature, ...]) -> list[list[Signature]]:
    """Signatures that differ in tokens and capacity alone; the others each for itself."""
    groups: dict[Any, list[Signature]] = {}
    for signature in signatures:
        kind = signature.name.partition("_")[0] if signature.tokens else signature.name
        left = None if signature.left is None else tuple(sorted(signature.left.items()))
        groups.setdefault((kind, bool(signature.capacity), left), []).append(signature)
    return list(groups.values())


def _cells(group: list[Signature]) -> list[str]:
    first, count = group[0], len(group)
    name = (first.name or "(no name)") + (f" and {count - 1} more" if count > 1 else "")
    left = first.left
    return [
        name,
        _values([s.tokens for s in group]),
        _values([s.capacity for s in group]),
        _range([sum(s.operations.values()) for s in group]),
        "?" if left is None else _range([s.taken for s in group]),
        "?" if left is None else ", ".join(f"{n} {kind}" for kind, n in left.items()) or "nothing",
    ]


def _values(numbers: list[int | None]) -> str:
    return ", ".join(map(str, sorted({n for n in numbers if n}))) or "-"


def _range(numbers: list[Any]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} - {high:,}"
