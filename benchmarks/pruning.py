"""What pruning costs: a training step with masks and scores, and Wanda and SparseGPT on GPT-2.

    python benchmarks/pruning.py                  # both parts, a quarter of an hour on two cores
    python benchmarks/pruning.py step             # one of them
    python benchmarks/pruning.py solve --case sparsegpt   # of the second, what has this in its name
    python benchmarks/pruning.py solve --long     # with 128 x 1,024 tokens of calibration as well
    python benchmarks/pruning.py --quick          # a smoke test: small shapes

- step: the model of benchmarks/train.py (13.9 million parameters, 8 sequences of 256 tokens). All
  models live in one process and take turns, a few steps each, so that other work on the machine
  hits them alike; what counts is the median of the rounds' ratios to a plain step. Masks are
  updated every other step here, to time steps with an update and without; the default is every
  tenth. A measurement is what Taylor and Wanda repeat every `refresh` steps, 100 by default.
- solve: `prune` of GPT-2's shape (124 million parameters, random weights: time does not depend on
  them) to half of its weights, each in a process of its own, with the peak of its resident memory.

Results go to benchmarks/results/pruning.json, part by part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import RESULTS, in_a_child, machine, spread
from tf_gptopt._files import read_json, write_json

BASE = {"vocab": 8192, "width": 384, "layers": 6, "heads": 6, "time": 256, "batch": 8}
GPT2 = {"vocab": 50257, "width": 768, "layers": 12, "heads": 12}
QUICK = {"vocab": 512, "width": 64, "layers": 2, "heads": 2, "time": 64, "batch": 4}
EXAMPLES = 128
KINDS: dict[str, dict[str, str]] = {
    "magnitude": {},
    "taylor": {"score": "taylor"},
    "wanda": {"score": "wanda", "scope": "output"},
    "2:4": {"pattern": "2:4"},
}
CASES = {
    f"{score} {pattern}, {EXAMPLES} x {length} tokens": {
        "score": score,
        "pattern": pattern,
        "scope": "output" if score == "wanda" else "layer",
        "length": length,
    }
    for score, pattern, length in [
        ("wanda", "unstructured", 128),
        ("wanda", "2:4", 128),
        ("sparsegpt", "unstructured", 128),
        ("sparsegpt", "2:4", 128),
        ("wanda", "unstructured", 1024),
        ("sparsegpt", "unstructured", 1024),
    ]
}


def gpt(shape: dict[str, int], time: int) -> Any:
    from tf_gptopt._keras import keras
    from tf_gptopt.models.gpt import GPTModel

    keras.utils.set_random_seed(0)
    sizes = (shape[key] for key in ("vocab", "width", "layers", "heads"))
    return GPTModel(*sizes, max_sequence_length=time)


def random_ids(shape: dict[str, int], *size: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, shape["vocab"], size, np.int32)


# A training step


def measure_steps(shape: dict[str, int], rounds: int, pairs: int) -> dict[str, Any]:
    """Seconds of each kind of step, and the medians of their ratios to a plain one."""
    import tensorflow as tf

    from tf_gptopt.compression.pruning.config import PruneConfig
    from tf_gptopt.compression.pruning.pruner import prune
    from tf_gptopt.compression.pruning.scores import MEASURED, Measurement
    from tf_gptopt.compression.pruning.wrapper import wrappers
    from tf_gptopt.training.loss import NextTokenLoss
    from tf_gptopt.training.optimizer import adamw
    from tf_gptopt.training.precision import use_precision

    precision, _ = use_precision()
    plain = gpt(shape, shape["time"])
    ids = random_ids(shape, shape["batch"], shape["time"] + 1)
    calibration = random_ids(shape, EXAMPLES, shape["time"])
    models, measuring = {"plain": plain}, {}
    for kind, options in KINDS.items():
        config = PruneConfig(end_step=10**6, frequency=2, **options)
        start = time.perf_counter()
        models[kind] = prune(plain, config, calibration)
        print(f"  {kind}: wrapped in {time.perf_counter() - start:.1f} s", flush=True)
        if config.score in MEASURED:
            measure = Measurement(models[kind], wrappers(models[kind]), calibration)
            measure()  # traces
            times = []
            for _ in range(2):
                start = time.perf_counter()
                measure()
                times.append(time.perf_counter() - start)
            measuring[kind] = round(min(times), 2)
            print(f"  {kind}: measures in {measuring[kind]} s", flush=True)

    steps = {}
    for kind, model in models.items():
        model.compile(adamw(10**6, 3e-4), NextTokenLoss())
        data = tf.data.Dataset.from_tensors((ids[:, :-1], ids[:, 1:])).repeat()
        steps[kind] = (model.make_train_function(), iter(data))
        for _ in range(2):  # trace and compile
            steps[kind][0](steps[kind][1])
        print(f"  {kind}: compiled", flush=True)

    def seconds(kind: str) -> float:
        function, data = steps[kind]
        start = time.perf_counter()
        float(function(data)["loss"])
        return time.perf_counter() - start

    plain_seconds: list[float] = []
    ratios: dict[str, dict[str, list[float]]] = {
        kind: {"without update": [], "with update": []} for kind in KINDS
    }
    for done in range(rounds):
        times = {kind: [seconds(kind) for _ in range(2 * pairs)] for kind in models}
        reference = statistics.median(times["plain"])
        plain_seconds.append(reference)
        for kind in KINDS:  # steps were even in number, so each round starts with an odd one
            for name, first in (("without update", 0), ("with update", 1)):
                ratios[kind][name].append(statistics.median(times[kind][first::2]) / reference)
        now = "   ".join(f"{k} {v['with update'][-1]:.3f}" for k, v in ratios.items())
        print(f"  round {done + 1} of {rounds}: {reference:.3f} s   {now}", flush=True)
    step = statistics.median(plain_seconds)
    outcome: dict[str, Any] = {"shape": shape, "precision": precision}
    outcome["plain_step_seconds"] = spread(plain_seconds, 3)
    outcome["ratio_to_plain_step"] = {
        kind: {name: spread(values, 3) for name, values in found.items()}
        for kind, found in ratios.items()
    }
    for kind, found in outcome["ratio_to_plain_step"].items():
        without, update = (found[name]["median"] for name in ("without update", "with update"))
        usual = 0.9 * without + 0.1 * update  # an update every tenth step
        found["at the default frequency"] = round(usual, 3)
        line = (
            f"  {kind:10} {without:.3f} without, {update:.3f} with an update, {usual:.3f} usually"
        )
        if kind in measuring:
            found["measurement_seconds"] = measuring[kind]
            found["with measurements"] = round(usual + measuring[kind] / 100 / step, 3)
            line += f"; {found['with measurements']:.3f} with a measurement every 100 steps"
        print(line, flush=True)
    return outcome


# Wanda and SparseGPT


def solve(shape: dict[str, int], case: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process: seconds, and megabytes before and at the peak."""
    from tf_gptopt.compression.pruning.config import PruneConfig
    from tf_gptopt.compression.pruning.pruner import prune, sparsity, strip_pruning

    length = case["length"]
    model = gpt(shape, length)
    ids = random_ids(shape, EXAMPLES, length)
    options = {key: case[key] for key in ("score", "pattern", "scope")}
    config = PruneConfig(schedule="constant", **options)
    before = resident_mb("VmRSS")
    start = shown = time.perf_counter()

    def on_progress(done: int, total: int, what: str) -> None:
        nonlocal shown
        now = time.perf_counter()
        if now - shown < 5 and done < total:
            return
        shown = now
        left = (now - start) * (total - done) / done
        rate = done / total * ids.size / (now - start)
        print(
            f"    {what}: {done / total:4.0%}, {rate:,.0f} tokens/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    pruned = prune(model, config, ids, on_progress=on_progress)
    seconds = time.perf_counter() - start
    zeros = sparsity(strip_pruning(pruned))
    return {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(ids.size / seconds),
        "peak_mb": round(resident_mb("VmHWM")),
        "before_mb": round(before),
        "sparsity": {name: zeros[name] for name in ("block_0_qkv", "block_0_out")},
    }


def resident_mb(field: str) -> float:
    """Of this process: "VmRSS" now, "VmHWM" at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def keep(part: str, outcome: dict[str, Any]) -> None:
    path = RESULTS / "pruning.json"
    results = read_json(path) if path.exists() else {}
    before = results.get(part, {}) if part == "solve" else {}  # a part of its cases may run alone
    write_json(path, {**results, part: {**before, **outcome}})
    print(f"  written to {path}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(solve(*json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["step", "solve"], metavar="PART")
    parser.add_argument("--case", default="", help="of solve: cases with this in their name")
    parser.add_argument("--long", action="store_true", help="1,024 tokens an example as well")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it works")
    parser.add_argument("--rounds", type=int, default=7, help="of step")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - {"step", "solve"}
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are step, solve")
    if "step" in arguments.parts:
        shape, rounds = (QUICK, 2) if arguments.quick else (BASE, arguments.rounds)
        print(f"step: {shape}", flush=True)
        outcome = measure_steps(shape, rounds, pairs=2)
        if not arguments.quick:
            keep("step", {"machine": machine(), **outcome})
    if "solve" in arguments.parts:
        shape = QUICK if arguments.quick else GPT2
        for name, case in CASES.items():
            if arguments.case not in name or (case["length"] > 128 and not arguments.long):
                continue
            print(f"solve: {name}", flush=True)
            outcome = in_a_child(__file__, shape, case)
            print(f"  {outcome}", flush=True)
            if not arguments.quick:
                keep("solve", {name: {"machine": machine(), **outcome}})


if __name__ == "__main__":
    main()
