"""How much faster the file of a shrunk model decodes: GPT-2 with a third of its parameters gone.

    python benchmarks/shrinking.py           # some minutes on two cores
    python benchmarks/shrinking.py --quick   # a smoke test: a small shape, nothing written

124 million parameters (random weights: time does not depend on them), cut to two thirds in each way
of `WAYS`, and exported as int8. The files and the whole model's take turns: tokens after a prompt
of 64, greedy. What counts is the median of the rounds' ratios. Results go to
benchmarks/results/shrinking.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import spread, write_result
from benchmarks.pruning import GPT2, QUICK, gpt, random_ids

WAYS: dict[str, dict[str, float]] = {  # shares that stay
    "half of the blocks": {"layers": 1 / 2},
    "half of each block's heads and neurons": {"num_heads": 1 / 2, "intermediate_dim": 1 / 2},
    "a third of the width": {"embedding_dim": 2 / 3},
}
PROMPT, TOKENS = 64, 60


def measure(shape: dict[str, int], context: int, rounds: int) -> dict[str, Any]:
    """Of each way: parameters, bytes, tokens a second and their ratio to the whole model's."""
    from tf_gptopt.compression.structured.config import ShrinkConfig
    from tf_gptopt.compression.structured.shrinking import shrink
    from tf_gptopt.evaluation.speed import measure_speed
    from tf_gptopt.tflite.convert import export_tflite
    from tf_gptopt.tflite.runtime import TFLiteGPT

    model = gpt(shape, context)
    ids = random_ids(shape, 8, 64)
    sizes = model.config.to_dict()
    sizes["layers"] = sizes["num_layers"]
    sizes["intermediate_dim"] = 4 * shape["width"]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, shares in {"whole": {}, **WAYS}.items():
            target = {key: round(share * sizes[key]) for key, share in shares.items()}
            small = shrink(model, ShrinkConfig(**target), ids) if target else model
            info = export_tflite(small, Path(folder) / name / "model.tflite")
            files[name] = TFLiteGPT(info.path)
            results[name] = {**target, "parameters": info.parameters, "bytes": info.bytes}
            print(f"  {name}: {results[name]}", flush=True)
        rates: dict[str, list[float]] = {name: [] for name in files}
        for _ in range(rounds):
            for name, file in files.items():
                speed = measure_speed(file, PROMPT, TOKENS, repeats=3)
                rates[name].append(speed.decode)
            print("  " + "   ".join(f"{n} {r[-1]:.0f}" for n, r in rates.items()), flush=True)
    for name, found in rates.items():
        results[name]["tokens_per_second"] = spread(found)
        ratios = [ours / whole for ours, whole in zip(found, rates["whole"], strict=True)]
        results[name]["ratio"] = spread(ratios, 3)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.quick:
        print(measure(QUICK, 128, 2))
        return
    results = measure(GPT2, 1024, arguments.rounds)
    print(write_result("shrinking", {"shape": GPT2, "measured": results}))


if __name__ == "__main__":
    main()
