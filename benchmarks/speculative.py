"""Speculative against plain decoding of one int8 file: tokens a second, and guesses accepted.

    python benchmarks/speculative.py --work FOLDER          # trains target and draft first
    python benchmarks/speculative.py --model FILE --draft FILE --dataset FOLDER
    python benchmarks/speculative.py --work FOLDER --quick  # a smoke test: a small shape, few steps

The target has the blocks of GPT-2 and 89 million parameters, enough that reading them from memory
is what a token costs. It learns the source code of Python's standard library for a few hundred
steps, and a student of two narrow blocks is distilled from it: three quarters of an hour on two
processors with bfloat16 units. An interrupted run goes on where it was.

Texts: held-out files of that corpus, and two that nobody could have foreseen: tokens drawn at
random, and sentences of English prose (`ENGLISH`). Drafters: the student, and prompt lookup. Plain
and speculative decoding complete the same prompts in turn, so that other work on the machine hits
both; what counts is the median over the prompts of the ratios of their speeds. Both greedy and
drawn at temperature 0.8, where the completion of a random prompt stays random for longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks._common import write_result

RECIPE = {
    "name": "speculative",
    "dataset": {"sequence_length": 512},
    "train": {
        "model": {"embedding_dim": 768, "num_layers": 12, "num_heads": 12},
        "fit": {"steps": 400, "batch_size": 4, "learning_rate": 6e-4},
    },
    "distill": None,
    "prune": None,
    "qat": None,
    "draft": {
        "student": {"layers": 2, "embedding_dim": 256, "num_heads": 4, "intermediate_dim": 1024},
        "fit": {"steps": 800, "batch_size": 4, "learning_rate": 1e-3},
    },
    "evaluate": {"tokens": 4096},
}
QUICK = {
    "dataset.sequence_length": 128,
    "train.model": {"embedding_dim": 64, "num_layers": 4, "num_heads": 4},
    "train.fit.steps": 20,
    "draft.student": {"layers": 1},
    "draft.fit.steps": 20,
}
DRAWN = {"temperature": 0.8, "seed": 0}
ENGLISH = (
    "It was a bright cold day in April, and the old man walked slowly along the shore, thinking of "
    "the letters that his daughter had written to him from the other side of the sea. The wind "
    "came from the north; gulls cried above the boats, and nobody in the village had slept well "
    "since the great storm had taken the church tower and half of the harbour wall with it. "
)


def prepare(work: Path, quick: bool) -> tuple[Path, Path, Path]:
    """Target, draft and dataset, as `tf-gptopt run` makes them."""
    import yaml

    from tf_gptopt.recipes.recipe import load_recipe
    from tf_gptopt.recipes.runner import run_recipe

    work.mkdir(parents=True, exist_ok=True)
    (work / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    run_recipe(load_recipe(work / "recipe.yaml", QUICK if quick else None), work / "run")
    export = work / "run" / "export"
    return export / "model.tflite", export / "draft.tflite", work / "run" / "dataset"


def texts(dataset: Path, vocab_size: int, context: int, count: int) -> dict[str, list[np.ndarray]]:
    """Prompts of each kind, an eighth of the context long."""
    from tf_gptopt._tokenizer import Tokenizer
    from tf_gptopt.data.dataset import TokenDataset
    from tf_gptopt.evaluation.compare import held_out_prompts

    size, rng = max(4, context // 8), np.random.default_rng(0)
    english = np.resize(Tokenizer.load(dataset).encode(ENGLISH), count * 7 + size)
    return {
        "held-out source code": held_out_prompts(TokenDataset.load(dataset), count),
        "random tokens": [rng.integers(0, vocab_size, size, np.int32) for _ in range(count)],
        "English": [english[i * 7 : i * 7 + size].astype(np.int32) for i in range(count)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="a folder to train in, or that holds the result")
    parser.add_argument("--model", type=Path, help="a trained .tflite file instead")
    parser.add_argument("--draft", type=Path, help="its draft")
    parser.add_argument("--dataset", type=Path, help="the dataset of both, with the tokenizer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=9, help="of each kind")
    parser.add_argument("--tokens", type=int, default=256, help="generated after each")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()

    load = round(os.getloadavg()[0], 1)
    if options.work:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # TensorFlow ends with it
            model, draft, dataset = pool.apply(prepare, (options.work, options.quick))
    elif options.model and options.draft and options.dataset:
        model, draft, dataset = options.model, options.draft, options.dataset
    else:
        parser.error("name --work, or --model, --draft and --dataset")

    from tf_gptopt.evaluation.speed import measure_draft
    from tf_gptopt.tflite.runtime import TFLiteGPT

    target = TFLiteGPT(model, threads=options.threads)
    student = TFLiteGPT(draft, threads=options.threads)
    config = target.config
    prompts = texts(dataset, config.vocab_size, config.max_sequence_length, options.prompts)
    measured: dict[str, Any] = {}
    drafters = {"student": student, "lookup": "lookup"}
    choices = {"greedy": {}, "temperature 0.8": DRAWN}
    for (text, ids), (name, drafter), (choice, sampling) in itertools.product(
        prompts.items(), drafters.items(), choices.items()
    ):
        found = measure_draft(target, drafter, ids, options.tokens, **sampling)
        row = {
            field: round(value, 3)
            for field, value in dataclasses.asdict(found).items()
            if isinstance(value, float)
        }
        measured[f"{text}, {name}, {choice}"] = row
        print(
            f"{text:22}{name:9}{choice:17}{row['ratio']:6.2f}x  {row['plain']:7,.0f} -> "
            f"{row['speculative']:7,.0f} tokens/s  accepted {row['acceptance_rate']:4.0%}  "
            f"{row['tokens_per_call']:.2f} tokens a call",
            flush=True,
        )
    result = {
        "settings": {
            "threads": options.threads,
            "prompts": options.prompts,
            "tokens": options.tokens,
            "quick": options.quick,
            "load_before": load,
        },
        "target": {"parameters": target.metadata["parameters"], "bytes": model.stat().st_size},
        "draft": {"parameters": student.metadata["parameters"], "bytes": draft.stat().st_size},
        "measured": measured,
    }
    print(f"wrote {write_result('speculative', result)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
