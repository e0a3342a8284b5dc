"""The command line: parse, call one function, print, return an exit code.

Nothing heavy is imported before its subcommand runs, so every `--help` answers at once.
Exit codes: 0 done, 1 a defect of ours (with its traceback), 2 a mistake in what was asked (one
line that says the remedy), 130 interrupted, 143 terminated; `launch` has the one of its worker that
failed first.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._options import Options
from tf_gptopt._startup import load_tensorflow
from tf_gptopt._version import __version__
from tf_gptopt.recipes.places import dataset_place, existing, model_place, speaking_place
from tf_gptopt.recipes.stage_command import (
    CORPUS,
    DATASET,
    MODEL,
    STAGES,
    VALID,
    stage_command,
)

COMMANDS = {
    "run": "the main job: text -> teacher -> student -> pruned -> int8 .tflite, measured",
    "generate": "complete a prompt with a .tflite file or any stage's folder",
    "tokenizer": "train a byte-level BPE tokenizer",
    "dataset": "encode, split and pack a corpus",
    "train": "train a GPT from scratch",
    "distill": "distill a model into a smaller one, at once or in rounds",
    "draft": "distill a small student that guesses a model's tokens: speculative decoding",
    "shrink": "remove heads, neurons, layers or channels for real",
    "prune": "zero the weights that matter least, at once or while training on",
    "qat": "quantization-aware training",
    "quantize": "quantization after training: rounding, GPTQ, SmoothQuant",
    "export": "write a .tflite file with a KV cache, int8 or another scheme",
    "evaluate": "compare models and files: quality, size, speed",
    "inspect": "what is in a .tflite file: functions, operations, bytes, second copies",
    "sensitivity": "which layers quantization or pruning hurts; a mixed scheme for a budget",
    "recipes": "the recipes of quantization, and of runs, each in a line",
    "plan": "what fits into the memory of which devices, and why",
    "launch": "run a command on several processes of this machine, as a cluster",
}

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    _open_streams()
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # what cannot be written shows here, and not as the process ends
        return code
    except UserError as error:
        from tf_gptopt.training.last_words import tell

        tell(str(error))
        return _fail(str(error))
    except KeyboardInterrupt:
        from tf_gptopt.training.cluster import leads

        if leads():
            print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _drop_output()
        return 0
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        if error.filename is None and error.errno not in DISK_FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        remedy = "Free some room" if error.errno in DISK_FULL else "Check the path and its rights"
        return _fail(f"{error.strerror}{where}. {remedy}, then run the same command again.")


def _open_streams() -> None:
    """Standard streams that take any text, also where they were closed (`>&-`): a file that gets
    the number of a closed one would receive what libraries print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 shows \u4e2d for 中
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """What is still to be written goes nowhere, so that ending the process is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(f"Unknown command {name!r}.{suggest(name, COMMANDS)}")
    options = Options(name, COMMANDS[name])
    if name in STAGES:
        return stage_command(options, rest)
    return globals()[f"_{name}"](options, rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: tf-gptopt COMMAND [OPTIONS]\n\n"
        "Raw text in, the smallest and fastest GPT that still says the same out.\n\n"
        f"{rows}\n\n"
        "`tf-gptopt COMMAND --help` lists a command's options; `tf-gptopt run` needs none."
    )


def _fail(message: str) -> int:
    print(f"tf-gptopt: error: {message}", file=sys.stderr)
    return 2


def _run(options: Options, argv: list[str]) -> int:
    from tf_gptopt.recipes.recipe import load_recipe, packaged_recipes, parse_override
    from tf_gptopt.recipes.run_folder import run_name

    names = ", ".join(packaged_recipes())
    options.add("recipe", nargs="?", help=f"a .yaml or .toml file, or one of: {names}")
    options.add("--data", nargs="+", default=[], help=CORPUS)
    options.add("--valid", nargs="+", default=[], help=VALID)
    options.add("--text-field", default=None, help="the field of JSON objects that holds the text")
    options.add(
        "--out", default=None,
        help="the run's folder (default: saved_models/ and a name after recipe and text)",
    )  # fmt: skip
    options.add(
        "--replace", action="store_true",
        help="train anew in a folder that holds a run of other text, which goes",
    )  # fmt: skip
    options.add(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="replace a value of the recipe, e.g. --set prune.pruning.sparsity=0.7",
    )  # fmt: skip
    given, _ = options.parse(argv)
    overrides = dict(parse_override(text) for text in given.overrides)
    if given.data:
        overrides["corpus.paths"] = given.data
    if given.valid:
        overrides["corpus.valid"] = given.valid
    if given.text_field:
        overrides["corpus.text_field"] = given.text_field
    recipe = load_recipe(given.recipe, overrides)
    named = recipe.corpus.paths if "corpus.paths" in overrides else ()
    is_default = given.recipe in (None, "default") and "name" not in overrides
    folder = run_name(recipe.name, named, is_default)
    out = Path(given.out) if given.out else Path("saved_models") / folder

    from tf_gptopt.recipes.runner import run_recipe

    run_recipe(recipe, out, replace=given.replace)
    return 0


def _generate(options: Options, argv: list[str]) -> int:
    from tf_gptopt.recipes.generate_command import generate_command

    return generate_command(options, argv)


def _evaluate(options: Options, argv: list[str]) -> int:
    options.add("models", nargs="*", default=[], metavar="MODEL", help="--model, without its name")
    options.add(
        "--model", nargs="+", default=[],
        help="folders (a run's stands for its file) and .tflite files; the first is the reference",
    )  # fmt: skip
    options.add("--dataset", required=True, help=DATASET)
    options.add("--out", default=None, help="a folder for report.json and report.md")
    options.add("--tokens", type=int, default=32768, help="held-out tokens to score")
    options.add("--threads", type=int, default=None, help="processor threads (default: all)")
    given, _ = options.parse(argv)
    models = [speaking_place(existing(model)) for model in (*given.models, *given.model)]
    if not models:
        raise UserError("Name models: tf-gptopt evaluate --model FOLDER FILE --dataset FOLDER.")
    dataset = dataset_place(given.dataset)
    load_tensorflow()
    from tf_gptopt.data.dataset import TokenDataset
    from tf_gptopt.evaluation.compare import evaluate
    from tf_gptopt.evaluation.report import rich_table, write_report
    from tf_gptopt.recipes.console import Console

    console = Console()
    report = evaluate(
        models,
        TokenDataset.load(dataset),
        tokens=given.tokens,
        threads=given.threads,
        on_progress=console.note,
    )
    console.note(rich_table(report))
    console.note(report.why)
    if given.out:
        write_report(report, given.out, "Evaluation")
    return 0


def _inspect(options: Options, argv: list[str]) -> int:
    from tf_gptopt.recipes.inspect_command import inspect_command

    return inspect_command(options, argv)


def _sensitivity(options: Options, argv: list[str]) -> int:
    from tf_gptopt.recipes.sensitivity_command import sensitivity_command

    return sensitivity_command(options, argv)


def _recipes(options: Options, argv: list[str]) -> int:
    options.parse(argv)
    from tf_gptopt.recipes.console import Console
    from tf_gptopt.recipes.explain import explain_recipes

    explain_recipes(Console())
    return 0


def _launch(options: Options, argv: list[str]) -> int:
    at = argv.index("--") if "--" in argv else len(argv)
    own, command = argv[:at], argv[at + 1 :]
    options.add("--workers", type=int, default=2, help="how many processes (default: 2)")
    options.add(
        "--threads", type=int, default=None,
        help="processor threads of each (default: the cores, divided)",
    )  # fmt: skip
    options.parser.epilog = "After `--`, any command: tf-gptopt launch --workers 2 -- train ..."
    given, _ = options.parse(own)
    if not command or command[0] not in COMMANDS or command[0] == "launch":
        known = [name for name in COMMANDS if name != "launch"]
        advice = suggest(command[0], known) if command else ""
        raise UserError(
            "Give the command for the workers after `--`: tf-gptopt launch --workers 2 -- train "
            f"--dataset data --out model.{advice}"
        )
    from tf_gptopt.training.launch import launch

    return launch(command, given.workers, given.threads)


def _plan(options: Options, argv: list[str]) -> int:
    from tf_gptopt.models.config import PRESETS, preset
    from tf_gptopt.training.memory import Step, parse_bytes
    from tf_gptopt.training.plan import folder_shape, plan

    options.add("--preset", default=None, help=f"a named shape: {', '.join(PRESETS)}")
    options.add("--model", default=None, help=MODEL)
    options.add("--devices", type=int, default=1, help="how many GPUs, TPU cores or hosts")
    options.add("--memory", required=True, help="of one device, as 16GB or 80GiB")
    options.add("--batch-size", type=int, default=8, help="sequences an update, all devices")
    options.add("--sequence-length", type=int, default=None, help="default: the model's context")
    options.add("--precision", default="float32", help="or mixed_bfloat16, mixed_float16")
    options.add("--recompute", action="store_true", help="recompute activations")
    options.add("--accumulate", type=int, default=1, help="microbatches an update")
    options.add("--json", action="store_true", help="print JSON instead of a table")
    given, _ = options.parse(argv)
    if (given.preset is None) == (given.model is None):
        raise UserError("Name one model: --preset gpt2, or --model FOLDER.")
    shape = preset(given.preset) if given.preset else folder_shape(model_place(given.model))
    step = Step(
        given.batch_size,
        given.sequence_length or shape.max_sequence_length,
        given.precision,
        given.recompute,
        given.accumulate,
    )
    found = plan(shape, step, given.devices, parse_bytes(given.memory))
    if given.json:
        import json

        print(json.dumps(found.to_dict(), indent=2))
        return 0
    from tf_gptopt.recipes.console import Console
    from tf_gptopt.training.plan_table import explain, rich_table

    console = Console()
    console.note(rich_table(found))
    for line in explain(found):
        console.note(line)
    return 0
