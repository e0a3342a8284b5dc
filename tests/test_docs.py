"""The prose is true: the map names every module, and the README's commands and snippets run."""

import json
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
    assert commands == [
        "pip install . && tf-gptopt run",
        "pip install '.[test]' && pytest -n 2 --dist loadfile",
    ]


def test_readme_makes_an_environment_that_pip_installs_into(tmp_path):
    """The line before the first command, as printed: elsewhere Debian's Python refuses."""
    line = blocks(README, "bash")[0].splitlines()[0]
    python = tmp_path / "bin"
    python.mkdir()
    (python / "python3").symlink_to(sys.executable)
    environment = {"HOME": str(tmp_path), "PATH": f"{python}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-euc", f"{line}\ncommand -v pip"],
        capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "tf-gptopt-env" / "bin" / "pip")


def test_nothing_is_installed_that_no_index_has():
    """No index has tf-gptopt, and an extra in brackets is one of setup.cfg's."""
    extras = set(re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text("utf-8"), re.M))
    pages = [README, *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.*")]
    found = {}
    for page in pages:
        for line in re.findall(r"pip install[^\n]*", page.read_text("utf-8")):
            for command in re.findall(r"pip install([^`&|]*)", line):
                words = command.replace("'", " ").split()
                assert not {"tf-gptopt", "tf_gptopt"} & set(words), (page.name, command)
                found |= dict.fromkeys(re.findall(r"\.\[([\w,]+)\]", command), page)
    assert {"test", "cuda", "tensorboard"} <= found.keys() <= extras


def test_readme_tree_is_real():
    (tree,) = [block for block in blocks(README, "text") if "tf_gptopt/" in block]
    for line in tree.splitlines():
        path = ROOT / line.split()[0]
        assert path.exists(), line


SNIPPETS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in [README, *sorted((ROOT / "docs").glob("*.md"))]
    for number, code in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run(code, tmp_path):
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


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def test_the_readme_table_is_the_measured_one():
    """Every cell of the main job's table, as the recorded run printed it."""
    from tf_gptopt.evaluation.report import Report, cells

    text = README.read_text("utf-8")
    recorded = results("main_job")
    report = Report.from_dict(recorded["report"])
    for row in report.rows:
        assert " | ".join(cells(row)[1:]) in text, row.name
    assert f"**{report.recommended}**" in text
    minutes, seconds = divmod(int(recorded["seconds"]), 60)
    assert f"{minutes}:{seconds:02d} minutes" in text


def test_the_readme_speeds_are_the_measured_ones():
    text = README.read_text("utf-8")
    quoted = next(iter(results("decode").values()))  # the first, of one processor; others follow
    assert (quoted["settings"]["preset"], quoted["settings"]["threads"]) == ("gpt2", 2)
    for case, row in quoted["measured"].items():
        cells = []
        for name, rate in row["tokens_per_second"].items():
            against = [v["median"] for k, v in row["ratio"].items() if k.startswith(f"{name} /")]
            ratios = f" ({', '.join(f'{ratio:.2f}x' for ratio in against)})" if against else ""
            cells.append(f"{rate['median']:,.0f}{ratios}")
        assert f"| {case} | {' | '.join(cells)} |" in text
    for outcome in results("train").values():
        speeds = {k: v["tokens_per_second"]["median"] for k, v in outcome["contestants"].items()}
        for rival, ratio in outcome["ratios"].items():
            row = f"| {speeds['ours']:,.0f} | {speeds[rival]:,.0f} | {ratio['median']:.2f}x |"
            assert row in text, rival
    for name in ("decode", "train", "main_job"):
        assert f"benchmarks/results/{name}.json" in text
        found = results(name)
        for result in [found] if name == "main_job" else found.values():
            assert result["machine"]["command"].startswith("python benchmarks/")


def test_the_docs_quote_what_drafts_won():
    text = (ROOT / "docs" / "edge.md").read_text("utf-8")
    found = results("speculative")
    for name, row in found["measured"].items():
        cells = f"{row['ratio']:.2f}x | {row['acceptance_rate']:.0%} | {row['tokens_per_call']:.2f}"
        assert f"| {name.replace(', ', ' | ')} | {cells} |" in text
    for model in ("target", "draft"):
        assert f"{found[model]['parameters'] / 1e6:.1f} M" in text


def test_the_docs_quote_what_was_measured():
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    for row in results("cluster")["rows"][1:]:
        sent = f"{row['bytes_per_step_and_worker'] / 1e6:.1f} MB | {row['over_ring']:.3f}"
        assert f"{row['efficiency']:.2f} | {sent}" in text
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    for name, peak in results("memory")["peak_mb"].items():
        assert f"| {name} | {peak:,.0f} MB |" in text
    text = (ROOT / "docs" / "parallelism.md").read_text("utf-8")
    for mesh, found in results("parallel")["meshes"].items():
        weights, moments = (max(found[key].values()) / 1e6 for key in ("weights", "optimizer"))
        assert f"| {mesh} | {weights:.1f} MB | {moments:.1f} MB |" in text

    text = (ROOT / "docs" / "pruning.md").read_text("utf-8")
    for kind, ratio in results("pruning")["step"]["ratio_to_plain_step"].items():
        steps = [ratio[key]["median"] for key in ("without update", "with update")]
        shown = [f"{value:.2f}x" for value in (*steps, ratio["at the default frequency"])]
        assert f"| {kind} | {' | '.join(shown)} |" in text
    for name, case in results("pruning")["solve"].items():
        assert f"| {name} | {case['seconds']:.0f} | {case['peak_mb']:,} MB |" in text
    for name, found in results("shrinking")["measured"].items():
        sizes = f"{found['parameters'] / 1e6:.1f} M | {found['bytes'] / 1e6:.1f}"
        speed, ratio = (found[key]["median"] for key in ("tokens_per_second", "ratio"))
        assert f"| {name} | {sizes} | {speed:.0f} | {ratio:.2f}x |" in text
    text = (ROOT / "docs" / "distillation.md").read_text("utf-8")
    base, large = results("distillation")["base"], results("distillation")["gpt2"]
    for name in base["cases"]:
        cases = [found["cases"][name] for found in (base, large)]
        cells = [f"{c['ratio']['median']:.2f}x | {c['tokens_per_second']:,.0f}" for c in cases]
        assert f"| {name} | {' | '.join(cells)} |" in text
    for found in (base, large):
        assert f"{found['cache']['tokens_per_second']:,} tokens/s" in text
    text = (ROOT / "docs" / "quantization.md").read_text("utf-8")
    for name, case in results("quantization").items():
        seconds = case.get("quantize_seconds")
        start = f"| {name} | {'-' if seconds is None else f'{seconds:.0f}'} |"
        end = f"{case['peak_mb']:,} MB | {case['file_mb']:.1f} |"
        assert f"{start} {case['export_seconds']:.0f} | {end}" in text
    gptq = results("gptq")
    for name in gptq["python"]:
        both = (gptq[corpus][name] for corpus in ("wikitext2", "python"))
        cells = [f"{f['output_error']:.2f} | {f['change']:+.2%} | {f['kl']:.4f}" for f in both]
        assert f"| {name} | {cells[0]} | {cells[1]} |" in text
    for task, rivals in ((n, o["ratios"]) for n, o in results("train").items() if "qat" in n):
        assert f"{1 / rivals['ours, not quantizing']['median']:.2f} times" in text, task


def test_the_tables_of_quality_are_the_measured_ones():
    sys.path.insert(0, str(ROOT))
    from benchmarks.quality_table import fill

    found = results("quality")
    for page in (README, *(ROOT / "docs").glob("*.md")):
        text = page.read_text("utf-8")
        assert fill(text, found) == text, page.name
        for picture in re.findall(r"!\[.*?\]\((.+?)\)", text):
            assert (page.parent / picture).is_file(), picture


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
