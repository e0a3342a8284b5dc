"""What each technique costs in quality, and what it saves, at the same training budget.

    python benchmarks/quality.py --texts FOLDER     # both corpora: some hours on two cores
    python benchmarks/quality.py --texts FOLDER wikitext2 --only "*-50%*"
    python benchmarks/quality.py checkpoint --texts FOLDER    # of a trained GPT-2: minutes
    python benchmarks/quality.py python-again --only "*-fc-*"    # on another processor
    python benchmarks/quality.py --minutes 30       # as far as that goes; again goes on
    python benchmarks/quality.py --quick            # a smoke test: a tiny model, few steps

FOLDER has WikiText-2's train.txt and valid.txt (for `checkpoint`, a Hugging Face GPT-2); the other
corpus is the standard library's source code. A parent of 5.8 million parameters is trained on each,
beside the same model in PyTorch on the same tokens, so that nobody compresses a strawman; then
every technique of `quality_runs.py` starts from it. Everything is kept in --work: interrupted
anywhere, the same command goes on, and a finished run is not run again. Rows of an earlier --work
stay, if both began with the same parent: on another processor the same training ends with another
one, and `python-again` is a name for those. Needs the extra `bench`. Results, as far as they have
come, are in benchmarks/results/quality.json; the plots go to docs/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import RESULTS, machine
from benchmarks.quality_bounds import bounds
from benchmarks.quality_checkpoint import CheckpointLab
from benchmarks.quality_lab import QUICK, Lab, Scale
from benchmarks.quality_runs import Run, runs
from benchmarks.quality_speed import time_decoding
from benchmarks.quality_table import fill, plot, print_table
from tf_gptopt._files import read_json, write_json

CORPORA = ("wikitext2", "python", "python-again", "checkpoint")
_SAME_PARENT = 2e-3  # nats: what another processor's rounding may change
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", nargs="*", help=f"of {', '.join(CORPORA)}")
    parser.add_argument("--texts", type=Path, help="WikiText-2's folder, or the checkpoint's")
    parser.add_argument("--work", type=Path, default=ROOT / "saved_models" / "quality")
    parser.add_argument("--only", default="*", help="a pattern of the runs' names")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many")
    parser.add_argument("--quick", action="store_true", help="small, to see that it works")
    given = parser.parse_args()
    if unknown := set(given.corpora) - set(CORPORA):
        parser.error(f"unknown corpus: {', '.join(unknown)}")
    corpora = given.corpora or (["wikitext2", "python"] if given.texts else ["python"])
    if {"wikitext2", "checkpoint"} & set(corpora) and not given.texts:
        parser.error("wikitext2 and checkpoint need --texts")
    scale = QUICK if given.quick else Scale()
    until = time.monotonic() + 60 * given.minutes
    path = (given.work if given.quick else RESULTS) / "quality.json"
    for corpus in corpora:
        kind = CheckpointLab if corpus == "checkpoint" else Lab
        lab = kind(corpus, given.work / corpus, given.texts, say, scale)
        recorded = read_json(path) if path.is_file() else {}
        outcome = with_recorded(collect(lab, given.only, until), recorded.get(corpus, {}))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**recorded, corpus: outcome})
        print_table(corpus, outcome)
        if not given.quick and corpus != "python-again":  # a few rows
            plot(corpus, outcome, DOCS)
    if not given.quick:
        names = ("quality", "pruning", "distillation", "quantization")
        pages = [DOCS / f"{name}.md" for name in names]
        for page in (ROOT / "README.md", *pages):
            page.write_text(fill(page.read_text("utf-8"), read_json(path)), "utf-8")


def collect(lab: Lab, only: str, until: float) -> dict[str, Any]:
    """The rows of a corpus: those finished before, and what else is wanted and time allows."""
    rows: dict[str, Any] = {}
    for run in runs():
        if lab.groups and run.group not in lab.groups:
            continue
        result = lab.finished(run.name, run.settings)
        if result is None and fnmatchcase(run.name, only) and time.monotonic() < until:
            result = lab.run(run.name, run.settings, functools.partial(measured, lab, run))
        if result is not None:
            rows[run.name] = {"group": run.group, **run.settings, **result}
    pytorch = lab.compare() if time.monotonic() < until else lab.finished("pytorch", {})
    time_decoding(lab, rows)
    return {
        "machine": machine(),
        "constants": dataclasses.asdict(lab.scale),
        **lab.sizes(),
        "pytorch": pytorch,
        "rows": rows,
        "bounds": bounds(rows),
    }


def with_recorded(outcome: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """`outcome`, with the rows that an earlier --work had and this one has not: they stand beside
    each other where both started from the same parent."""
    theirs, ours = (found.get("rows", {}).get("parent") for found in (recorded, outcome))
    same = ("constants", "train_tokens", "valid_tokens")
    if any(recorded.get(name) != outcome.get(name) for name in same):
        return outcome
    if theirs and ours and abs(theirs["loss"] - ours["loss"]) > _SAME_PARENT:
        sys.exit(
            f"The recorded rows began with another parent (loss {theirs['loss']}, here "
            f"{ours['loss']}): nothing was written, and --work keeps what was run. Rename its "
            "folder to python-again and run that, or remove the corpus from the results."
        )
    found = {**recorded["rows"], **outcome["rows"]}
    rows = {run.name: found[run.name] for run in runs() if run.name in found}
    pytorch = outcome["pytorch"] or recorded["pytorch"]
    return {**outcome, "pytorch": pytorch, "rows": rows, "bounds": bounds(rows)}


def measured(lab: Lab, run: Run, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    made = run.make(lab, folder, **run.settings)
    seconds = time.monotonic() - began
    model, config = made if isinstance(made, tuple) else (made, None)
    return {**lab.measure(model, folder, config), "seconds": round(seconds, 1)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
