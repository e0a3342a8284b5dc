"""What a distillation step costs beside its parts, and what cached logits take on disk.

    python benchmarks/distillation.py                 # both shapes, half an hour on two cores
    python benchmarks/distillation.py base            # one of them
    python benchmarks/distillation.py --quick         # a smoke test: a small shape, few steps

Shapes (`SHAPES`): base, a teacher of 13.9 million parameters; gpt2, GPT-2's 124 million. The
student has half the teacher's blocks. For each of `cases()` three things take turns of a few steps
in one process, so that other work on the machine hits them alike: the student's training step on
labels alone, each teacher's forward pass, and the distillation step. What counts is the median over
the rounds of `distillation step / (training step + forward passes)`, in time and in processor time;
with cached logits there is no teacher, and the training step stands alone. Results go to
benchmarks/results/distillation.json, shape by shape.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks._common import RESULTS, machine, spread
from tf_gptopt._files import read_json, write_json

BASE = {"vocab": 8192, "width": 384, "layers": 6, "heads": 6, "time": 256, "batch": 8}
GPT2 = {"vocab": 50257, "width": 768, "layers": 12, "heads": 12, "time": 256, "batch": 4}
QUICK = {"vocab": 512, "width": 64, "layers": 2, "heads": 2, "time": 64, "batch": 4}
SHAPES = {"base": BASE, "gpt2": GPT2}
TOP_K = 32
WARM_UP = 2  # steps that trace and compile


def cases() -> dict[str, tuple[list[Any], int]]:
    """What is learnt, and from how many teachers; none: from cached logits."""
    from tf_gptopt.compression.distillation.losses import (
        AttentionMaps,
        HiddenStates,
        Relations,
        SoftLabels,
    )

    soft = SoftLabels(2.0)
    return {
        "soft labels": ([soft], 1),
        "reverse KL": ([SoftLabels(2.0, "reverse")], 1),
        "Jensen-Shannon": ([SoftLabels(2.0, "js")], 1),
        "soft labels + hidden states": ([soft, HiddenStates()], 1),
        "soft labels + attention maps": ([soft, AttentionMaps()], 1),
        "soft labels + relations": ([soft, Relations()], 1),
        "two teachers": ([soft], 2),
        f"cached, top {TOP_K}": ([soft], 0),
    }


def measure(shape: dict[str, int], rounds: int, steps: int) -> dict[str, Any]:
    """All cases of a shape."""
    import tensorflow as tf

    from tf_gptopt.compression.distillation.cache_writer import cache_logits
    from tf_gptopt.compression.distillation.distiller import Distiller
    from tf_gptopt.models.gpt import GPTModel
    from tf_gptopt.training.precision import use_precision

    precision, _ = use_precision()
    heads, context = shape["heads"], shape["time"]
    teachers = [
        GPTModel(shape["vocab"], shape["width"], depth, heads, max_sequence_length=context)
        for depth in (shape["layers"], shape["layers"])
    ]
    student = GPTModel(
        shape["vocab"], shape["width"], shape["layers"] // 2, heads, max_sequence_length=context
    )
    data = random_dataset(shape)
    ids, labels = next(iter(data.batches("train", shape["batch"])))
    plain = tf.data.Dataset.from_tensors((ids, labels)).repeat()
    tokens = shape["batch"] * context
    outcome: dict[str, Any] = {"shape": shape, "precision": precision, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        cached = cache_logits(
            teachers[0], data, Path(folder) / "logits", TOP_K, batch_size=shape["batch"]
        )
        seconds = time.perf_counter() - started
        windows = data.num_windows("train") + data.num_windows("valid")
        outcome["cache"] = {
            "k": TOP_K,
            "bytes_per_token": round(cached.bytes / (windows * context), 1),
            "mb_per_million_tokens": round(cached.bytes / (windows * context), 1),
            "tokens_per_second": round(windows * context / seconds),
        }
        print(f"  cache {outcome['cache']}")
        batch = next(iter(cached.batches("train", shape["batch"])))
        with_rows = tf.data.Dataset.from_tensors(batch).repeat()
        alone = training_step(student, plain)
        forwards = [forward(teacher, ids) for teacher in teachers]
        for name, (losses, count) in cases().items():
            teacher = teachers[:count] or cached
            distiller = Distiller(student, teacher, losses=losses)
            step = training_step(distiller, plain if count else with_rows)
            runs = {"distillation": step, "student": alone}
            runs |= {f"teacher {i}": forwards[i] for i in range(count)}
            wall, processor = take_turns(runs, rounds, steps)
            found = {
                "tokens_per_second": round(tokens / statistics.median(wall["distillation"]), 1),
                "ms": {run: spread([1000 * s for s in each]) for run, each in wall.items()},
                "ratio": spread(ratios(wall), 3),
                "processor_ratio": spread(ratios(processor), 3),
            }
            outcome["cases"][name] = found
            print(
                f"  {name:30} {found['ratio']['median']:.3f} x its parts "
                f"({found['ratio']['min']:.3f} - {found['ratio']['max']:.3f})  processor "
                f"{found['processor_ratio']['median']:.3f}  "
                f"{found['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )
            del distiller, step
    return outcome


def training_step(model: Any, data: Any) -> Callable[[], None]:
    """A step of `fit`, compiled."""
    from tf_gptopt.training.loss import NextTokenLoss
    from tf_gptopt.training.optimizer import adamw

    model.compile(adamw(steps=1_000_000, learning_rate=1e-4), NextTokenLoss())
    function, batches = model.make_train_function(force=True), iter(data)
    return lambda: float(function(batches)["loss"])


def forward(teacher: Any, ids: Any) -> Callable[[], None]:
    """A teacher's logits, as a distillation step computes them."""
    import tensorflow as tf

    function = tf.function(lambda: teacher(ids, training=True))
    return lambda: function()[0, 0, 0].numpy()


Times = dict[str, list[float]]


def take_turns(runs: dict[str, Callable[[], Any]], rounds: int, steps: int) -> tuple[Times, Times]:
    """Seconds of a step of each run, once a round, the median of `steps` steps; and the same in
    processor time of all threads."""
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    wall: Times = {name: [] for name in runs}
    processor: Times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            marks = [(time.perf_counter(), time.process_time())]
            for _ in range(steps):
                run()
                marks.append((time.perf_counter(), time.process_time()))
            for times, each in zip((wall, processor), zip(*marks, strict=True), strict=True):
                between = [b - a for a, b in itertools.pairwise(each)]
                times[name].append(statistics.median(between))
    return wall, processor


def ratios(times: Times) -> list[float]:
    """A distillation step against its parts, round by round."""
    whole, *parts = times.values()
    return [a / sum(rest) for a, *rest in zip(whole, *parts, strict=True)]


def random_dataset(shape: dict[str, int]) -> Any:
    """Random tokens, a few batches of them."""
    import numpy as np

    from tf_gptopt.data.dataset import TokenDataset
    from tf_gptopt.data.packing import DatasetInfo, SplitInfo

    rng, length = np.random.default_rng(0), shape["time"]
    sizes = {"train": 8 * shape["batch"] * length, "valid": shape["batch"] * length + 1}
    streams = {
        name: rng.integers(0, shape["vocab"], size).astype("uint16") for name, size in sizes.items()
    }
    splits = {name: SplitInfo(size, 1, size, name) for name, size in sizes.items()}
    info = DatasetInfo(
        **splits,
        dtype="uint16",
        vocab_size=shape["vocab"],
        eot_id=0,
        sequence_length=length,
        tokenizer_fingerprint="random",
        valid_fraction=0.1,
        seed=0,
    )
    return TokenDataset(info, streams, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=[*SHAPES], metavar="SHAPE")
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--rounds", type=int, help="default 7, quick 2")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    arguments = parser.parse_args()
    unknown = set(arguments.shapes) - set(SHAPES)
    if unknown:
        parser.error(f"no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    rounds = arguments.rounds or (2 if arguments.quick else 7)
    if arguments.quick:
        measure(QUICK, rounds, arguments.steps)
        return
    path = RESULTS / "distillation.json"
    for name in arguments.shapes:
        print(f"{name}: {SHAPES[name]}")
        outcome = measure(SHAPES[name], rounds, arguments.steps)
        results = read_json(path) if path.exists() else {}
        write_json(path, {**results, name: {"machine": machine(), **outcome}})
        print(f"  written to {path}")


if __name__ == "__main__":
    main()
