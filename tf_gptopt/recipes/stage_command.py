"""A command that runs one stage: folders in by name, its section as options, a folder out.

Nothing heavy is imported before the options are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tf_gptopt._options import Options, spelt_out
from tf_gptopt.recipes.places import dataset_place, model_place, tokenizer_place
from tf_gptopt.training.cluster import leads

CORPUS = "text or JSON files, packed or not, or folders (default: Python's standard library)"
VALID = "text to validate on (default: a share of the documents is held out)"
DATASET = "a folder that `tf-gptopt dataset` wrote, or a run's"
IF_LOOKED_AT = f"{DATASET}, for schemes that look at text"
MODEL = "a folder with a model: any stage's, a run's, or a Hugging Face GPT-2 checkpoint"

# Commands that run one stage: its section, and the help of what it reads
STAGES = {
    "tokenizer": ("TokenizerSection", {"corpus": CORPUS}),
    "dataset": (
        "DatasetSection",
        {"corpus": CORPUS, "tokenizer_folder": "a folder with tokenizer.json, or a run's"},
    ),
    "train": ("TrainSection", {"dataset_folder": DATASET}),
    "distill": ("DistillSection", {"teacher_folder": MODEL, "dataset_folder": DATASET}),
    "draft": ("DraftSection", {"teacher_folder": MODEL, "dataset_folder": DATASET}),
    "shrink": ("ShrinkSection", {"model_folder": MODEL, "dataset_folder": DATASET}),
    "prune": ("PruneSection", {"model_folder": MODEL, "dataset_folder": DATASET}),
    "qat": ("QatSection", {"model_folder": MODEL, "dataset_folder": DATASET}),
    "quantize": ("QuantizeSection", {"model_folder": MODEL, "dataset_folder": IF_LOOKED_AT}),
    "export": ("ExportSection", {"model_folder": MODEL, "dataset_folder": IF_LOOKED_AT}),
}

# What a stage reads: the option that names it, older names of that, and what of a run it is
READS = {
    "model_folder": (("--model",), model_place),
    "teacher_folder": (("--model", "--teacher"), model_place),
    "dataset_folder": (("--dataset",), dataset_place),
    "tokenizer_folder": (("--tokenizer",), tokenizer_place),
}


def stage_command(options: Options, argv: list[str]) -> int:
    """A stage on its own: folders in by name, its section's fields as options, a folder out."""
    from tf_gptopt.recipes import sections

    name, helps = STAGES[options.name]
    section = getattr(sections, name)
    if takes_corpus := "corpus" in helps:
        options.add("--data", nargs="+", default=[], help=CORPUS)
        options.add("--text-field", default="text", help="the field of JSON objects with the text")
    if name == "DatasetSection":
        options.add("--valid", nargs="+", default=[], help=VALID)
    reads = {name: READS[name] for name in helps if name != "corpus"}
    for name, (flags, _) in reads.items():
        options.add(*flags, required=helps[name] != IF_LOOKED_AT, help=helps[name])
    options.add("--out", required=True, help="the folder to write")
    options.add("--seed", type=int, default=0, help="fixes everything random")
    options.section(section)
    if hasattr(section, "fit"):
        options.parser.epilog = "--steps is short for --fit.steps, and so on."
    given, values = options.parse(spelt_out(schemes_read(argv), section), section)
    from tf_gptopt.recipes.console import Console
    from tf_gptopt.recipes.runner import find_stage, locked, run_stage

    out, console = Path(given.out), Console(quiet=not leads())
    found: dict[str, Any] = {}
    for name, (flags, place) in reads.items():
        named = given[flags[0].removeprefix("--")]
        if named is None:
            continue
        found[name] = place(named)
        if found[name] != Path(named):
            console.note(f"{flags[0]} {named} is a run: {found[name]}")
    if takes_corpus:
        valid = tuple(given.valid) if "valid" in given else ()
        found["corpus"] = sections.CorpusSection(tuple(given.data), given.text_field, valid)
    with locked(out):
        run_stage(
            find_stage(options.name), values, found, out, given.seed, console, options.description
        )
    return 0


def schemes_read(argv: list[str]) -> list[str]:
    """`--quantization int4-gptq`, a name or a file, in the words that stand for it; what follows,
    such as `--quantization.kv_cache int8`, changes that."""
    from tf_gptopt.recipes.recipe import read_scheme

    spelt = list(argv)
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        at = i if equals else i + 1
        value = value if equals else "".join(argv[at : at + 1])
        if flag == "--quantization" and not value.startswith(("{", "-")):
            text = json.dumps(read_scheme(value).to_dict())
            spelt[at] = f"{flag}={text}" if equals else text
    return spelt
