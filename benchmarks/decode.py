"""Decoding on the CPU: ours against llama.cpp and CTranslate2, the same random weights, in turn.

    pip install '.[bench]'
    python benchmarks/decode.py                     # GPT-2 124M, a context of 1,024, 2 threads
    python benchmarks/decode.py --threads 1
    python benchmarks/decode.py --preset gpt2-medium
    python benchmarks/decode.py --cache             # keeps the weights packed on disk (TFLiteGPT)
    python benchmarks/decode.py --loading           # that of an earlier result anew, with the cost
                                                    # of a token by the model's context

Each engine lives in a process of its own and they work in turn, so that other work on the machine
hits all; what counts is the median of the rounds' ratios. Tokens are chosen greedily, which is part
of the time. Before anything is timed, the logits for the same prompt are compared: the
engines run the same model. Beside them stand the file's size, the share of what the memory's
bandwidth allows, the time from nothing to a first token with the files in the system's memory, and
the memory that this takes.

Other work on the machine slows llama.cpp's threads, which wait actively for each other, more than
LiteRT's: only an idle machine gives numbers to compare. docs/performance.md says where a token's
time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import RESULTS, machine, on_this_processor, spread
from benchmarks.decode_engines import load_once, prepare, start
from tf_gptopt._files import read_json, write_json

ENGINES = {
    "int8": ("Ours", "int8.tflite"),
    "int8-float-cache": ("Ours", "int8-float-cache.tflite"),
    "int4": ("Ours", "int4.tflite"),
    "int4-float-cache": ("Ours", "int4-float-cache.tflite"),
    "llama.cpp Q8_0": ("LlamaCpp", "Q8_0.gguf"),
    "llama.cpp Q4_0": ("LlamaCpp", "Q4_0.gguf"),
    "ctranslate2 int8": ("CTranslate2", "ctranslate2"),
}
PAIRS = [
    ("int8", "llama.cpp Q8_0"),
    ("int8-float-cache", "llama.cpp Q8_0"),
    ("int4", "llama.cpp Q4_0"),
    ("int4-float-cache", "llama.cpp Q4_0"),
    ("int8", "ctranslate2 int8"),
    ("int8-float-cache", "ctranslate2 int8"),
]
PREFILLS, POSITIONS, DECODED = (32, 512), (64, 512, 1000), 20
SAME_MODEL = {"int8": 0.99, "int4": 0.5}  # correlation of logits: 4 bits of noise are not rounding


def compare(
    measures: dict[str, Any], rounds: int, vocab_size: int, threads: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """All engines through all cases: tokens per second of each, ratios of each pair; and of each
    case the memory's bandwidth in every round."""
    roofs: dict[str, list[float]] = {}
    rng = np.random.default_rng(0)
    rates: dict[str, dict[str, list[float]]] = {}
    logits: dict[str, np.ndarray] = {}
    for i in range(rounds + 1):
        for length in sorted({*PREFILLS, *POSITIONS}):
            prompt = rng.integers(0, vocab_size, length)
            if i and length in POSITIONS:
                roofs.setdefault(f"decode {length}", []).append(bandwidth(threads))
            for name in list(measures)[:: 1 if i % 2 else -1]:
                count = DECODED if length in POSITIONS else 0
                prefill, token, first = measures[name](prompt, count)
                if i == 0:  # warm-up, and the proof that all run the same model
                    if length == PREFILLS[0]:
                        logits[name] = first
                    continue
                if length in PREFILLS:
                    rates.setdefault(f"prefill {length}", {}).setdefault(name, []).append(
                        length / prefill
                    )
                if length in POSITIONS:
                    rates.setdefault(f"decode {length}", {}).setdefault(name, []).append(1 / token)
    for ours, theirs in PAIRS:
        if logits[theirs] is not None:
            found = float(np.corrcoef(logits[ours], logits[theirs])[0, 1])
            if found < SAME_MODEL[ours.partition("-")[0]]:
                raise RuntimeError(f"{ours} and {theirs} disagree: correlation {found:.3f}.")
    measured = {
        case: {
            "tokens_per_second": {name: spread(values) for name, values in engines.items()},
            "ratio": {
                f"{ours} / {theirs}": spread(
                    [a / b for a, b in zip(engines[ours], engines[theirs], strict=True)], 3
                )
                for ours, theirs in PAIRS
            },
        }
        for case, engines in rates.items()
    }
    return measured, roofs


def capacity_cost(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """What a token at position 64 costs in a model of 1,024 tokens, against one of 128.

    Where the system puts a process's pages makes a tenth of its speed, for as long as it lives: the
    same file differs from itself by as much. So every pair lives in processes of its own.
    """
    prompt, ratios = np.arange(64), []
    files = "int8.tflite", "int8-128.tflite"
    for i in range(2 * rounds):
        seconds = {}
        with contextlib.ExitStack() as stack:
            measures = {
                file: stack.enter_context(start("Ours", folder, file, threads, False))
                for file in files[:: 1 if i % 2 else -1]
            }
            for _ in range(2):  # the first warms up
                for file, measure in measures.items():
                    seconds[file] = measure(prompt, DECODED)[1]
        ratios.append(seconds[files[0]] / seconds[files[1]])
    return spread(ratios, 3)


def loading(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """From an import to the first token, and the memory after 32 more, each in a fresh process."""
    cases = {
        "int8": ("Ours", folder, "int8.tflite", threads, False),
        "int8, weight cache": ("Ours", folder, "int8.tflite", threads, True),
        "llama.cpp Q8_0": ("LlamaCpp", folder, "Q8_0.gguf", threads, False),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            # XNNPACK has the system forget a file that it has packed, for all processes
            warm(folder / case[2], *(folder / "weight_cache").glob("*"))
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[name].append(pool.apply(load_once, case))
    return {
        name: {what: spread([one[what] for one in all_[1:]]) for what in all_[0]}
        for name, all_ in found.items()
    }


def warm(*files: Path) -> None:
    """Read them, so that they are in the system's memory."""
    for file in files:
        file.read_bytes()


def bandwidth(threads: int, size: int = 2**28) -> float:
    """Gigabytes that this machine's threads read in a second, the best of five."""
    data = np.ones(size // 8, np.int64)
    parts = np.array_split(data, threads)
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=part.max) for part in parts]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, data.nbytes / (time.perf_counter() - began) / 1e9)
    return best


def share_of_roof(
    measured: dict[str, Any], sizes: dict[str, Any], config: Any, roofs: dict[str, list[float]]
) -> dict[str, Any]:
    """What a token has to read, weights and live cache, over its time: a share of the bandwidth,
    which the neighbours of a shared machine change from one second to the next. So it is measured
    in every round, beside the tokens. llama.cpp's cache is float16."""
    shares = {}
    for position in POSITIONS:
        case = f"decode {position}"
        for name, each in (("int8", 1), ("int8-float-cache", 4), ("llama.cpp Q8_0", 2)):
            cache = 2 * config.num_layers * config.embedding_dim * position * each
            rates = measured[case]["tokens_per_second"][name]["all"]
            shares[f"{name} {position}"] = spread(
                [
                    (sizes[name]["bytes"] + cache) * rate / roof / 1e9
                    for rate, roof in zip(rates, roofs[case], strict=True)
                ],
                3,
            )
    return shares


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2", help="gpt2 (124M) or gpt2-medium (355M)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cache", action="store_true", help="with TFLiteGPT's weight_cache")
    parser.add_argument(
        "--loading", action="store_true", help="loading and the context's cost alone"
    )
    parser.add_argument("--folder", type=Path, help="keep the models here (default: temporary)")
    options = parser.parse_args()

    load, threads = round(os.getloadavg()[0], 1), options.threads
    path = RESULTS / "decode.json"
    runs = read_json(path) if path.is_file() else {}
    name = f"{options.preset}, {threads} thread{'s' * (threads > 1)}"
    name = on_this_processor(name + ", weight cache" * options.cache)
    if options.loading and name not in runs:
        parser.error(f"there is no result of {name} yet: measure without --loading")
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder / options.preset
        folder.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # TensorFlow ends with it
            sizes, config = pool.apply(prepare, (folder, options.preset))
        if options.loading:
            runs[name]["loading"] = loading(folder, threads, min(options.rounds, 5))
            runs[name]["position_64_of_1024_over_128"] = capacity_cost(
                folder, threads, options.rounds
            )
            runs[name]["loading_machine"] = machine()
            write_json(path, runs)
            show(runs[name])
            return 0
        with contextlib.ExitStack() as running:
            measures = {
                name: running.enter_context(start(kind, folder, file, threads, options.cache))
                for name, (kind, file) in ENGINES.items()
            }
            measured, roofs = compare(measures, options.rounds, config.vocab_size, threads)
        result = {
            "machine": machine(),
            "settings": {
                "preset": options.preset,
                "threads": threads,
                "rounds": options.rounds,
                "weight_cache": options.cache,
                "load_before": load,
                "llama_cpp": "the better of with and without flash attention",
            },
            "sizes": sizes,
            "measured": measured,
            "read_bandwidth_gb_per_second": spread(list(itertools.chain(*roofs.values()))),
            "share_of_bandwidth": share_of_roof(measured, sizes, config, roofs),
            "position_64_of_1024_over_128": capacity_cost(folder, threads, options.rounds),
            "loading": loading(folder, threads, min(options.rounds, 5)),
        }
    write_json(path, {**runs, name: result})
    print(f"wrote {path}")
    show(result)
    return 0


def table(result: dict[str, Any]) -> list[str]:
    """Markdown: tokens per second, and behind them how often as fast as the peer that is."""
    rows = ["| tokens/s | " + " | ".join(ENGINES) + " |", "| --- |" + " ---: |" * len(ENGINES)]
    for case, row in result["measured"].items():
        cells = []
        for name in ENGINES:
            ratios = [row["ratio"][f"{a} / {b}"]["median"] for a, b in PAIRS if a == name]
            rate = f"{row['tokens_per_second'][name]['median']:,.0f}"
            cells.append(f"{rate} ({', '.join(f'{r:.2f}x' for r in ratios)})" if ratios else rate)
        rows.append(f"| {case} | {' | '.join(cells)} |")
    return rows


def show(result: dict[str, Any]) -> None:
    print(*table(result), sep="\n")
    print(f"sizes: {result['sizes']}")
    print(f"read_bandwidth_gb_per_second: {result['read_bandwidth_gb_per_second']['median']}")
    shares = {name: share["median"] for name, share in result["share_of_bandwidth"].items()}
    print(f"share_of_bandwidth: {shares}")
    cost = result["position_64_of_1024_over_128"]["median"]
    print(f"position 64 of 1,024 tokens against 128: {cost:.3f}")
    for name, row in result["loading"].items():
        print(f"{name}: " + ", ".join(f"{what} {v['median']}" for what, v in row.items()))


if __name__ == "__main__":
    raise SystemExit(main())
