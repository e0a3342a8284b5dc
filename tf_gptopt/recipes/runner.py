"""Runs stages: skips what is finished, resumes what was cut short, starts afresh what changed.

A stage is finished when its folder holds a metrics.json, written last and atomically. The file
carries the stage's key: a hash of its section, its seed and the keys of its inputs. A changed
recipe, corpus or earlier stage changes the key, and then the stage and those after it run again. It
also carries digests of the stage's files: one that is gone makes the stage run again, and one that
was damaged or changed is an error, wherever the folder is read.

In a cluster every worker runs the same command. The chief holds the lock, decides which stage is
finished, writes, and tells the others; they take part in the stages that train and wait out the
rest in silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tf_gptopt._clock import clock
from tf_gptopt._errors import UserError
from tf_gptopt._files import open_lock, read_json, sealed, write_bytes, write_json, write_text
from tf_gptopt._folder import changing
from tf_gptopt._startup import load_tensorflow
from tf_gptopt._version import __version__
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.data.corpus import corpus_files
from tf_gptopt.data.files import file_kind
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.finished import KEY, METRICS, digests, lost_file, read_metrics
from tf_gptopt.recipes.places import model_place
from tf_gptopt.recipes.recipe import Recipe, plain
from tf_gptopt.recipes.run_page import Sample, held_out_sample, run_page
from tf_gptopt.recipes.sections import CorpusSection, ExportSection
from tf_gptopt.recipes.shapes import check_recipe, check_stage
from tf_gptopt.recipes.speak import SAMPLING, say, stream_completion
from tf_gptopt.training.cluster import Alone, find_cluster, leads
from tf_gptopt.training.config import ON_THE_WAY

TRAINING = ("train", "distill", "prune", "qat", "draft")  # the stages that all workers do together
TITLES = {
    "distill": "teacher -> student",
    "prune": "fewer weights",
    "qat": "quantization-aware training",
    "quantize": "quantization after training",
}
Metrics = dict[str, Any]


def run_recipe(
    recipe: Recipe, out: str | Path, console: Console | None = None, *, replace: bool = False
) -> Any:
    """The whole road: text -> tokenizer, dataset, train, distill, prune, qat, quantize, export,
    draft, evaluate.

    Each stage takes the last model before it; those from distill to quantize may be left out.

    Args:
        recipe: see `load_recipe`.
        out: the run's folder; each stage writes a folder inside it. Run again after any
            interruption, it goes on from the last finished stage or checkpoint.
        console: where progress goes.
        replace: whether a run that was trained on other text may be there, and goes.

    Returns the `Report`, which is also in `out`/report.json and report.md.

    Raises:
        UserError: for a recipe that cannot be followed to its end, as far as that can be seen, and
            for a folder that holds a run of other text; nothing is written then.
    """
    console = console or Console(quiet=not leads())
    out = Path(out)
    began = time.monotonic()
    check_recipe(recipe)
    with locked(out):
        if not replace:
            require_same_text(out, recipe.corpus)
        console.heading("run", f"{recipe.name}, in {out}")
        if leads():
            write_json(out / "recipe.json", recipe.to_dict())
        corpus, seed = recipe.corpus, recipe.seed
        export, looks_at_text = export_of(recipe)
        text = {"corpus": corpus}
        tokens = {"dataset_folder": out / "dataset"}

        def stage(name: str, inputs: Mapping[str, Any], title: str) -> None:
            section = export if name == "export" else getattr(recipe, name)
            run_stage(find_stage(name), section, inputs, out / name, seed, console, title)

        stage("tokenizer", text, "byte-level BPE on the corpus")
        stage("dataset", {**text, "tokenizer_folder": out / "tokenizer"}, "encode, split, pack")
        load_tensorflow()
        from tf_gptopt.evaluation.compare import Candidate
        from tf_gptopt.evaluation.report import Report, rich_table

        stage("train", tokens, "a teacher, from scratch")
        candidates, last, dense = [Candidate("train", out / "train")], "train", "train"
        for name in TITLES:
            if getattr(recipe, name) is None:
                continue
            source = "teacher_folder" if name == "distill" else "model_folder"
            stage(name, {source: out / last, **tokens}, TITLES[name])
            candidates.append(Candidate(name, out / name, dense))
            last = name
            if name == "distill":  # what the next ones are to say as well
                dense = name
        reads = {"model_folder": out / last, "text_folder": out / "dataset"}
        reads |= tokens if looks_at_text else {}
        stage("export", reads, "TFLite")
        candidates.append(Candidate("export", out / "export" / "model.tflite", dense))
        measured = {"candidates": candidates, **tokens}
        if recipe.draft is not None:
            stage("draft", {"teacher_folder": out / last, **tokens}, "a student that guesses ahead")
            measured["draft_file"] = out / "export" / "draft.tflite"
            if leads():
                write_bytes(measured["draft_file"], (out / "draft" / "draft.tflite").read_bytes())
        stage("evaluate", measured, "on the same held-out text")
        if not leads():
            return Report.from_dict(read_json(out / "evaluate" / "report.json"))
        with changing(out) as new:
            for name in ("report.json", "report.md"):
                write_bytes(new / name, (out / "evaluate" / name).read_bytes())
        report = Report.from_dict(read_json(out / "report.json"))
        console.note(rich_table(report))
        console.note(report.why)
        if report.speculative:
            console.note(report.speculative.in_words())
        file = out / "export" / "model.tflite"
        console.note(f"{clock(time.monotonic() - began)} in all; everything is in {out}")
        if report.recommended == "export":
            console.note(f"[bold green]the file to ship: {file}[/]")
        prompt = recipe.evaluate.prompt
        sample = Sample(prompt) if prompt else held_out_sample(out / "dataset")
        sample = show_completion(file, sample, recipe.seed, console)
        write_text(out / "report.md", run_page(out, sample))
    return report


def require_same_text(out: Path, corpus: CorpusSection) -> None:
    """Raise a `UserError` if the folder holds a model that was trained on other text."""
    if not (out / "train" / METRICS).is_file():
        return  # nothing there that took long
    known = read_json(out / "recipe.json") if (out / "recipe.json").is_file() else {}
    for stage in ("tokenizer", "dataset"):
        if not (out / stage / METRICS).is_file():
            continue
        before = read_json(out / stage / METRICS)
        inputs: dict[str, Any] = {"corpus": corpus}
        if stage == "dataset":
            inputs["tokenizer_folder"] = out / "tokenizer"
        seed = before.get("seed", known.get("seed", 0))
        if stage_key(stage, before["section"], inputs, seed) == before["key"]:
            return
        paths = known.get("corpus", {}).get("paths", [])
        raise UserError(
            f"{out} holds a run that was trained on other text than this ("
            f"{', '.join(paths) or 'the standard library'}, as it was then). It stays as it is: "
            "name another folder with --out, or say --replace to train on this text in its place."
        )


def export_of(recipe: Recipe) -> tuple[ExportSection, bool]:
    """The export's section with its scheme, and whether it has to look at text for it."""
    stages = [recipe.quantize, recipe.qat]
    if recipe.prune is None or recipe.prune.one_shot:  # a training without a grid leaves it
        stages.append(recipe.distill)
    done = [stage.quantization for stage in stages if stage and stage.quantization]
    scheme = recipe.export.quantization or (done[0] if done else QuantConfig())
    section = dataclasses.replace(recipe.export, quantization=scheme)
    return section, scheme.needs_calibration and scheme not in done[:1]


def run_stage(
    function: Callable[..., Any],
    section: Any,
    inputs: Mapping[str, Any],
    out: Path,
    seed: int,
    console: Console,
    title: str = "",
) -> Metrics:
    """Run one stage unless its folder already holds its result.

    Args:
        function: see `find_stage`.
        section: its configuration.
        inputs: folders and corpora by parameter name.
        out: its folder.
        seed: the recipe's seed.
        console: where progress goes.
        title: what the heading says.

    Returns its metrics.
    """
    out = Path(out)
    name = function.__name__
    workers = this_team()
    if not workers.is_chief:
        console = Console(quiet=True)
        if workers.share(None) is None and name in TRAINING:  # not finished before
            with workers.together():
                function(section, **inputs, out=out, seed=seed, console=console)
        return workers.share(None)
    key = stage_key(name, section, inputs, seed)
    finished = finished_metrics(out, key, console)
    workers.share(finished)
    if finished is not None:
        console.heading(name, f"{title} [dim]· finished before[/]")
        return workers.share(finished)
    console.heading(name, title)
    check_stage(name, section, inputs)
    forget_other_key(out, key)
    began = time.monotonic()
    with workers.together():
        metrics = function(section, **inputs, out=out, seed=seed, console=console)
    metrics = {
        "stage": name,
        "key": key,
        "version": __version__,
        "section": plain(section),
        "seed": seed,
        "seconds": round(time.monotonic() - began, 2),
        **metrics,
        "files": digests(out),
    }
    write_json(out / METRICS, sealed(metrics))
    remove_checkpoints(out)
    return workers.share(metrics)


def this_team() -> Alone:
    """The workers of this run, joined; one process on its own needs no TensorFlow for that."""
    cluster = find_cluster()
    if cluster is None or len(cluster.workers) == 1:
        return Alone()
    load_tensorflow()
    from tf_gptopt.training.strategy import choose_strategy
    from tf_gptopt.training.workers import workers_of

    return workers_of(choose_strategy("auto")[0])


def find_stage(name: str) -> Callable[..., Metrics]:
    """The stage function of this name; TensorFlow loads only for those that need it."""
    if name in ("tokenizer", "dataset"):
        from tf_gptopt.recipes import text_stages as module
    else:
        load_tensorflow()
        if name in ("distill", "draft"):
            from tf_gptopt.recipes import distill_stage as module
        else:
            from tf_gptopt.recipes import model_stages as module
    return getattr(module, name)


def finished_metrics(out: Path, key: str, console: Console) -> Metrics | None:
    """The metrics of a finished stage, if they belong to this key and its files are there."""
    if not (out / METRICS).exists():
        return None
    metrics = read_metrics(out)
    if metrics.get("key") != key:
        return None
    if lost := lost_file(out, metrics):
        console.note(f"{out / lost} is gone: the stage runs again")
        return None
    return metrics


def forget_other_key(out: Path, key: str) -> None:
    """Before a stage starts: what an earlier recipe left in its folder must not look finished,
    nor must its checkpoints be taken up."""
    out.mkdir(parents=True, exist_ok=True)
    mark = out / KEY
    if not mark.exists() or read_json(mark) != key:
        (out / METRICS).unlink(missing_ok=True)
        remove_checkpoints(out)
        for folder in out.glob("round-*"):
            shutil.rmtree(folder)
        write_json(mark, key)


def remove_checkpoints(out: Path) -> None:
    """Training's checkpoints, which a finished stage needs no more."""
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def stage_key(name: str, section: Any, inputs: Mapping[str, Any], seed: int) -> str:
    """A hash of everything that the stage's result depends on."""
    values = plain(section)
    training = values.get("fit", {}) if isinstance(values, dict) else {}
    for field in ON_THE_WAY:
        training.pop(field, None)
    parts = [name, values, seed, {k: _input_key(v) for k, v in sorted(inputs.items())}]
    if teachers := getattr(section, "teachers", ()):
        parts.append([_input_key(model_place(folder)) for folder in teachers])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _input_key(value: Any) -> Any:
    if isinstance(value, list):  # of candidates
        return [[item.name, item.reference, _input_key(item.source)] for item in value]
    if isinstance(value, CorpusSection):
        files = corpus_files(list(value.paths) or None)
        key = [value.text_field, *(_digest(path) for path in files)]
        if value.valid:
            key.append([_digest(path) for path in corpus_files(list(value.valid))])
        return key
    folder = Path(value)
    if (folder / METRICS).exists() and (folder / KEY).exists():  # a stage's, and finished
        metrics = read_metrics(folder)
        if lost := lost_file(folder, metrics):
            raise UserError(
                f"{folder / lost} is missing: the stage that wrote {folder} had finished with it. "
                "Restore it, or run that stage again."
            )
        return metrics["key"]
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return [_digest(path) for path in files if path.is_file()]


def _digest(path: Path) -> list[str]:
    """What a file is to a stage: its kind and its content, not where it lies or how old it is."""
    try:
        with open(path, "rb") as file:
            return [file_kind(path), hashlib.file_digest(file, "sha256").hexdigest()]
    except PermissionError:  # a corpus goes on without it
        return [file_kind(path), "unreadable"]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run's folder alone; the lock goes with the process, however it ends. In a cluster
    the chief holds it for all."""
    if not leads():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open_lock(out / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"Another process is working in {out}. Wait for it, or name another --out."
            ) from None
        yield


def show_completion(path: Path, sample: Sample, seed: int, console: Console) -> Sample:
    """Let the finished file speak, token by token; returns the sample with what it said."""
    is_held_out = sample.following is not None
    what = "the beginning of a held-out text" if is_held_out else repr(sample.prompt)
    console.heading("generate", f"{path} completes {what}:")
    pieces = stream_completion(
        path,
        sample.prompt,
        max_new_tokens=80,
        seed=seed,
        overflow="slide",  # a prompt beyond a short context is no reason to fail at the very end
        **SAMPLING,
    )
    said: list[str] = []
    say(sample.prompt, (said.append(piece) or piece for piece in pieces))
    return dataclasses.replace(sample, said="".join(said))
