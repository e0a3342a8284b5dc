"""The prose is true: the map names every module, and the README's commands and snippets run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def blocks(path, language):
    """Fenced blocks of a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)


def test_the_map_is_the_tree():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    mapped = page.partition("<!-- map")[2].partition("```\n")[2].partition("```")[0]
    folder, named = ROOT / "tf_gptopt", set()
    for line in mapped.splitlines():
        if line.endswith("/"):  # a folder's path from the root of the project
            folder = ROOT / line.strip()
            assert folder.is_dir(), line
            continue
        name, _, purpose = line.strip().partition(" ")
        assert purpose.strip(), f"{name} needs a word on what it is"
        named.add(folder / name)
    suffixes = {".py", ".yaml", ".pyi"}
    tree = {path for path in (ROOT / "tf_gptopt").rglob("*") if path.suffix in suffixes}
    tree = {p for p in tree if p.name != "__init__.py" or p.parent == ROOT / "tf_gptopt"}
    assert {str(p.relative_to(ROOT)) for p in named} == {str(p.relative_to(ROOT)) for p in tree}


def test_readme_prints_the_two_commands():
    commands = re.findall(r"^pip install .+ && .+$", README.read_text("utf-8"), re.M)
    assert commands == ["pip install . && tf-gptopt run", "pip install '.[test]' && pytest"]


def test_readme_tree_is_real():
    (tree,) = [block for block in blocks(README, "text") if "tf_gptopt/" in block]
    for line in tree.splitlines():
        path = ROOT / line.split()[0]
        assert path.exists(), line


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_readme_snippets_run(number, tmp_path):
    code = blocks(README, "python")[number]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_readme_shell_commands_exist():
    """Every `tf-gptopt X` in the prose is a command, and every option of it is known."""
    from tf_gptopt.cli import COMMANDS

    pages = [README, *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.yaml")]
    used = {
        word
        for page in pages
        for word in re.findall(r"tf-gptopt ([a-z]+)", page.read_text("utf-8"))
    }
    assert used <= set(COMMANDS)
    assert {"run", "generate"} <= used


def test_numbers_in_the_readme_come_from_results():
    """Each table row that names a results file quotes figures which that file holds."""
    import json

    text = README.read_text("utf-8")
    sources = set(re.findall(r"benchmarks/results/([a-z_0-9]+\.json)", text))
    assert sources
    for name in sources:
        values = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        assert values["machine"]["command"].startswith("python benchmarks/"), name


def test_package_data_is_declared():
    listed = (ROOT / "setup.cfg").read_text("utf-8")
    for needed in ("py.typed", "*.pyi", "recipes/*.yaml"):
        assert needed in listed


def test_nothing_names_a_path_of_one_machine():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".cfg", ".ipynb"} and path.is_file():
            text = path.read_text("utf-8")
            assert not re.search(r"/(work|root|home|opt)/[a-z]", text), name
