"""A command that runs one stage: folders in by name, its section as options, a folder out.

Nothing heavy is imported before the options are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._options import Options, spelt_out

CORPUS = "text files, .jsonl files or folders (default: Python's standard library)"
VALID = "text to validate on (default: a share of the documents is held out)"
DATASET = "a folder that `tf-gptopt dataset` wrote"
IF_LOOKED_AT = f"{DATASET}, for schemes that look at text"
MODEL = "a folder with a model: any stage's, or a Hugging Face GPT-2 checkpoint"

# Commands that run one stage: its section, and the help of what it reads
STAGES = {
    "tokenizer": ("TokenizerSection", {"corpus": CORPUS}),
    "dataset": (
        "DatasetSection",
        {"corpus": CORPUS, "tokenizer_folder": "a folder with tokenizer.json"},
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


def stage_command(options: Options, argv: list[str]) -> int:
    """A stage on its own: folders in by name, its section's fields as options, a folder out."""
    from tf_gptopt.recipes import sections

    name, helps = STAGES[options.name]
    section = getattr(sections, name)
    if takes_corpus := "corpus" in helps:
        options.add("--data", nargs="+", default=[], help=CORPUS)
        options.add("--text-field", default="text", help="the field of .jsonl lines with the text")
    if name == "DatasetSection":
        options.add("--valid", nargs="+", default=[], help=VALID)
    flags = {name: name.removesuffix("_folder") for name in helps if name != "corpus"}
    for name, flag in flags.items():
        options.add(f"--{flag}", required=helps[name] != IF_LOOKED_AT, help=helps[name])
    options.add("--out", required=True, help="the folder to write")
    options.add("--seed", type=int, default=0, help="fixes everything random")
    options.section(section)
    if hasattr(section, "fit"):
        options.parser.epilog = "--steps is short for --fit.steps, and so on."
    given, values = options.parse(spelt_out(schemes_read(argv), section), section)
    found: dict[str, Any] = {
        name: existing(given[flag]) for name, flag in flags.items() if given[flag] is not None
    }
    if takes_corpus:
        valid = tuple(given.valid) if "valid" in given else ()
        found["corpus"] = sections.CorpusSection(tuple(given.data), given.text_field, valid)
    from tf_gptopt.recipes.console import Console
    from tf_gptopt.recipes.runner import find_stage, locked, run_stage

    out = Path(given.out)
    with locked(out):
        function = find_stage(options.name)
        run_stage(function, values, found, out, given.seed, Console(), options.description)
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


def existing(path: str) -> Path:
    """The path, if there is something."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist. Check the path.")
    return Path(path)
