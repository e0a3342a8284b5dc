"""`tf-gptopt sensitivity`: which layers quantization or pruning hurts, and a scheme for a budget.

Nothing heavy is imported before the options are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._options import Options
from tf_gptopt._startup import load_tensorflow
from tf_gptopt.recipes.places import dataset_place, model_place
from tf_gptopt.recipes.stage_command import DATASET, MODEL

BATCH_LOGITS = 2**25  # of one batch, whose logits are in memory three times


def sensitivity_command(options: Options, argv: list[str]) -> int:
    """Measure, print the table, draw the plot, pick a scheme."""
    options.add("folder", nargs="?", metavar="MODEL", help="--model, without its name")
    options.add("--model", default=None, help=MODEL)
    options.add("--dataset", default=None, help=DATASET)
    options.add("--data", nargs="+", default=[], help="text files instead of a dataset")
    options.add(
        "--options", nargs="+", default=["int8", "int4"],
        help="what to try on each layer: int8, int4, int4:128, int4:channel, prune50, ...",
    )  # fmt: skip
    options.add("--tokens", type=int, default=8192, help="held-out tokens to measure on")
    options.add(
        "--quantization", default="int4",
        help="whose range and rounding the options have: a name that `tf-gptopt recipes` lists, "
        "or a file",
    )  # fmt: skip
    options.add("--score", default="magnitude", help="what pruning goes by: magnitude, wanda, ...")
    options.add("--out", default=None, help="a .json file; the same command goes on from it")
    options.add("--plot", default=None, help="a .svg, .png or .pdf file")
    options.add(
        "--bytes", default=None, metavar="BYTES|SHARE",
        help="pick a mixed scheme of this many bytes, or of a share of uniform int4's (1.0)",
    )  # fmt: skip
    options.add("--loss", type=float, default=None, help="or one whose loss rises by so many nats")
    options.add("--scheme", default=None, help="a .yaml file for it, as --quantization reads one")
    given, _ = options.parse(argv)
    budget = _budget(given)
    if (given.folder is None) == (given.model is None):
        raise UserError("Name one model: tf-gptopt sensitivity --model FOLDER --dataset FOLDER.")
    if bool(given.data) == (given.dataset is not None):
        raise UserError("Name what to measure on: --dataset FOLDER, or text files with --data.")
    folder = model_place(given.model or given.folder)
    paths = [dataset_place(path) for path in given.data or [given.dataset]]
    from tf_gptopt.compression.pruning.config import CALIBRATED, PruneConfig
    from tf_gptopt.recipes.recipe import read_scheme

    config = read_scheme(given.quantization)
    pruning = PruneConfig(score=given.score, schedule="constant")
    looks = config.needs_calibration or pruning.score in CALIBRATED

    load_tensorflow()
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.evaluation.sensitivity import measure_sensitivity
    from tf_gptopt.evaluation.sensitivity_table import plot, rich_table
    from tf_gptopt.models.checkpoints import load_checkpoint
    from tf_gptopt.recipes.console import Console

    console, model = Console(), load_checkpoint(folder)
    batches, calibration = _read_tokens(model, paths, given.tokens, looks)
    table = measure_sensitivity(
        model,
        batches,
        given.options,
        calibration,
        console.progress,
        config=config,
        pruning=pruning,
        out=given.out,
    )
    console.note(rich_table(table))
    if given.plot:
        plot(table, given.plot)
    if budget:
        _tell(table, QuantConfig.from_sensitivity(table, **budget), given.scheme, console)
    return 0


def _budget(given: Any) -> dict[str, int | float]:
    if given.bytes is not None and given.loss is not None:
        raise UserError("Name one budget: --bytes or --loss.")
    if given.scheme and given.bytes is None and given.loss is None:
        raise UserError("A scheme needs a budget: --bytes 1.0, or --loss 0.01.")
    if given.loss is not None:
        return {"loss": given.loss}
    if given.bytes is None:
        return {}
    text = str(given.bytes)
    try:
        return {"bytes": int(text) if text.isdigit() else float(text)}
    except ValueError:
        raise UserError(
            f"--bytes takes a number of bytes, or a share such as 1.0. Received: {text!r}."
        ) from None


def _read_tokens(model: Any, paths: list[Path], tokens: int, looks: bool) -> tuple[list[Any], Any]:
    """Held-out batches of `(inputs, labels)`, and calibration ids where something `looks` at some:
    a dataset's two splits, or texts from their beginning, and what follows in them."""
    import numpy as np

    from tf_gptopt.compression.calibration_text import EXAMPLES, calibration_ids
    from tf_gptopt.data.corpus import load_corpus
    from tf_gptopt.recipes.stage_parts import matching_dataset

    length = model.config.max_sequence_length
    is_dataset = len(paths) == 1 and (paths[0] / "dataset.json").is_file()  # by either option
    if is_dataset:
        data = matching_dataset(model, paths[0])
        length = data.sequence_length
    size = max(1, min(8, BATCH_LOGITS // (length * model.config.vocab_size)))
    size = max(1, min(size, tokens // length))
    count = max(1, tokens // (length * size))
    if is_dataset:
        held_out = data.batches("valid", size, max_batches=count)
        ids = calibration_ids(data) if looks else None
        return list(held_out.as_numpy_iterator()), ids

    if model.tokenizer is None:
        raise UserError(
            "The model has no tokenizer beside it to read text with. Give a dataset folder."
        )
    end = [] if model.tokenizer.eot_id is None else [model.tokenizer.eot_id]
    texts = [document.text for document in load_corpus(paths)]
    encoded = model.tokenizer.encode_batch(texts)
    stream = np.concatenate([np.append(ids, end) for ids in encoded]).astype(np.int32)
    starts = np.arange(0, len(stream) - length, length)
    windows = stream[starts[:, None] + np.arange(length + 1)]
    held_out, rest = windows[: size * count], windows[size * count :]
    if not len(held_out) or (looks and not len(rest)):
        raise UserError(
            f"{paths[0]} is too short: {len(stream):,} tokens, of which {length:,} fill one window "
            f"{'and others calibrate' if looks else 'of the context'}. Give more text."
        )
    batches = [held_out[i : i + size] for i in range(0, len(held_out), size)]
    ids = calibration_ids(rest[:, :-1], EXAMPLES) if looks else None
    return [(rows[:, :-1], rows[:, 1:]) for rows in batches], ids


def _tell(table: Any, config: Any, path: str | None, console: Any) -> None:
    """Print the scheme as YAML, which fits under any section of a recipe; write it to `path`."""
    import yaml

    from tf_gptopt._files import write_text
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.evaluation.report import human_bytes

    default = QuantConfig().to_dict()
    fields = {key: value for key, value in config.to_dict().items() if value != default[key]}
    text = yaml.safe_dump({"quantization": fields}, sort_keys=False)
    size, kl = table.totals(config.layers)
    console.note(f"mixed: {human_bytes(size)} of matrices, summed KL {kl:.6f}")
    for option in dict.fromkeys(row.option for row in table.rows):
        rows = [row for row in table.rows if row.option == option]
        if len(rows) == len(config.layers):
            size, kl = table.totals(dict.fromkeys(config.layers, option))
            console.note(f"uniform {option}: {human_bytes(size)}, summed KL {kl:.6f}")
    console.rich.print(text, end="", highlight=False)
    if path:
        write_text(path, text)
