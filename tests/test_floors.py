"""The house's floors: lower never imports higher, rooms of one floor do not import each other.

It reads the source (AST) and imports nothing, so it takes no TensorFlow and misses no lazy import.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tf_gptopt"

FLOORS = [
    {"_errors", "_files", "_version"},  # the ground: any module with a leading underscore
    {"_keras"},
    {"models", "data"},
    {"training", "compression"},
    {"tflite"},
    {"evaluation"},
    {"recipes"},
    {"cli"},
    {"__main__"},
]
KERAS_DOOR = {"tf_keras", "tensorflow_model_optimization"}
HEAVY = {"tensorflow", "tf_keras", "tensorflow_model_optimization", "keras", "keras_nlp", "torch"}

# Beside every config.py: what an edge device or a config file needs.
TENSORFLOW_FREE = [
    "cli.py",
    "data/corpus.py",
    "data/files.py",
    "data/packing.py",
    "data/tokenizer.py",
    "data/unreadable.py",
    "compression/quantization/found_scheme.py",
    "compression/quantization/grids.py",
    "compression/quantization/mixed.py",
    "compression/quantization/rounding.py",
    "evaluation/sensitivity_table.py",
    "models/choosing.py",
    "models/config.py",
    "models/penalties.py",
    "models/sampling.py",
    "models/text_stream.py",
    "tflite/bundle.py",
    "tflite/delegation.py",
    "tflite/inspecting.py",
    "tflite/runtime.py",
    "tflite/trial.py",
    "training/cluster.py",
    "training/launch.py",
    "training/memory.py",
    "training/plan.py",
    "training/plan_table.py",
]


def floor_of(room: str) -> int:
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor
    if room.startswith("_") and room != "__init__":
        return 0
    raise AssertionError(f"tf_gptopt.{room} has no floor: name it in FLOORS")


def imports(path: Path, at_import_only: bool = False) -> Iterator[tuple[int, str]]:
    """`(line, module)` of each import; `from a import b` also says `a.b` where that is a module."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in _nodes(tree, at_import_only):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def _nodes(tree: ast.AST, at_import_only: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if at_import_only:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
        yield node
        yield from _nodes(node, at_import_only)


def violations(package: Path) -> list[str]:
    """Every import that breaks a rule, as `file:line: what`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        room = parts[0]
        if parts == ("__init__",):  # the lazy table of public names
            continue
        if parts[-1] == "__init__" and path.read_text("utf-8").strip():
            found.append(f"{path}: a room's __init__.py is empty")
        for line, module in imports(path):
            where = f"{path}:{line}: imports {module or 'nothing'}"
            if module.startswith("."):
                found.append(f"{where}: full module paths only")
            top, _, rest = module.partition(".")
            if top in KERAS_DOOR and room != "_keras":
                found.append(f"{where}: tf_keras and tfmot come through tf_gptopt._keras")
            if top != package.name:
                continue
            if not rest:
                found.append(f"{where}: name the module, not the package")
                continue
            other = rest.partition(".")[0]
            if other != room and floor_of(other) >= max(floor_of(room), 1):
                found.append(f"{where}: {room} (floor {floor_of(room)}) may not see {other}")
    return found


def heavy_imports(package: Path, module: str) -> list[str]:
    """Heavy libraries that importing a file loads, with the chain of modules that leads there."""
    found, seen, queue = [], set(), [(package / module, [module])]
    while queue:
        path, chain = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        for _, name in imports(path, at_import_only=True):
            top, _, rest = name.partition(".")
            if top in HEAVY:
                found.append(" -> ".join([*chain, name]))
            if top == package.name and rest:
                target = package.joinpath(*rest.split("."))
                target = target / "__init__.py" if target.is_dir() else target.with_suffix(".py")
                queue.append((target, [*chain, rest]))
    return found


def test_no_import_goes_up_or_sideways() -> None:
    assert violations(PACKAGE) == []


def test_every_room_is_on_a_floor() -> None:
    for path in PACKAGE.iterdir():
        if path.suffix == ".py" or (path.is_dir() and list(path.rglob("*.py"))):
            assert path.stem == "__init__" or floor_of(path.stem) >= 0


@pytest.mark.parametrize("module", TENSORFLOW_FREE)
def test_tensorflow_free_modules(module: str) -> None:
    assert heavy_imports(PACKAGE, module) == []


def test_config_modules_are_tensorflow_free() -> None:
    configs = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("config.py")]
    assert len(configs) >= 2
    assert {name: heavy for name in configs if (heavy := heavy_imports(PACKAGE, name))} == {}


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("models/gpt.py", "from tf_gptopt.training.trainer import fit", "models (floor 2)"),
        ("models/gpt.py", "from tf_gptopt.data.corpus import load_corpus", "may not see data"),
        ("_files.py", "import tf_gptopt._keras", "may not see _keras"),
        ("recipes/later.py", "def f():\n    from tf_gptopt.cli import main", "may not see cli"),
        ("tflite/later.py", "from tf_gptopt import GPTModel", "not the package"),
        ("data/later.py", "from .corpus import load_corpus", "full module paths"),
        ("training/later.py", "import tf_keras as keras", "through tf_gptopt._keras"),
        ("data/__init__.py", "x = 1", "is empty"),
    ],
)
def test_the_checker_sees_a_planted_import(
    tmp_path: Path, file: str, line: str, complaint: str
) -> None:
    package = tmp_path / "tf_gptopt"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    planted = package / file
    planted.write_text((planted.read_text() if planted.exists() else "") + f"\n{line}\n")
    assert any(file in text and complaint in text for text in violations(package))


def test_the_checker_sees_planted_tensorflow(tmp_path: Path) -> None:
    package = tmp_path / "tf_gptopt"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    errors = package / "_errors.py"
    errors.write_text(errors.read_text() + "\nimport tensorflow as tf\n")
    chains = heavy_imports(package, "models/config.py")
    assert chains == ["models/config.py -> _errors -> tensorflow"]
