"""Peak memory of a training step: our loss against Keras's, and recomputed activations.

    python benchmarks/memory.py              # a minute

Each figure is from a process of its own: the peak that TensorFlow's allocator counts (the one of
GPUs, on a CPU: TF_CPU_ALLOCATOR_USE_BFC) over two steps, weights and moments included. Results go
to benchmarks/results/memory.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import write_result

WIDE = {"vocab": 50257, "width": 128, "layers": 1, "heads": 2, "time": 256}
DEEP = {"vocab": 4096, "width": 384, "layers": 12, "heads": 6, "time": 256}
LONG = {**DEEP, "time": 1024}
CASES: dict[str, dict[str, Any]] = {
    f"{name}, {batch} x {shape['time']} tokens": {**shape, "batch": batch, **options}
    for name, shape, batch, options in [
        ("vocabulary 50,257, Keras's loss", WIDE, 4, {"loss": "keras"}),
        ("vocabulary 50,257, NextTokenLoss", WIDE, 4, {}),
        ("vocabulary 50,257, Keras's loss", WIDE, 16, {"loss": "keras"}),
        ("vocabulary 50,257, NextTokenLoss", WIDE, 16, {}),
        ("12 blocks", DEEP, 8, {}),
        ("12 blocks, recomputed", DEEP, 8, {"recompute": True}),
        ("12 blocks", LONG, 2, {}),
        ("12 blocks, recomputed", LONG, 2, {"recompute": True}),
    ]
}


def measure(case: dict[str, Any]) -> float:
    """Megabytes at the peak, in this process."""
    import numpy as np
    import tensorflow as tf

    from tf_gptopt._keras import keras
    from tf_gptopt.models.gpt import GPTModel
    from tf_gptopt.training.loss import NextTokenLoss
    from tf_gptopt.training.optimizer import adamw

    vocab, width, layers, heads = (case[key] for key in ("vocab", "width", "layers", "heads"))
    model = GPTModel(vocab, width, layers, heads, max_sequence_length=case["time"])
    model.recompute = case.get("recompute", False)
    loss = NextTokenLoss()
    if case.get("loss") == "keras":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(adamw(steps=100), loss=loss)
    ids = np.random.default_rng(0).integers(0, vocab, (case["batch"], case["time"] + 1), np.int32)
    data = tf.data.Dataset.from_tensors((ids[:, :-1], ids[:, 1:])).repeat(2)
    model.fit(data, verbose=0)
    return tf.config.experimental.get_memory_info("CPU:0")["peak"] / 1e6


def main() -> None:
    if sys.argv[1:2] == ["--case"]:
        print("PEAK", measure(json.loads(sys.argv[2])))
        return
    peaks = {}
    for name, case in CASES.items():
        done = subprocess.run(
            [sys.executable, __file__, "--case", json.dumps(case)],
            env={**os.environ, "TF_CPU_ALLOCATOR_USE_BFC": "true", "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("PEAK")]
        if not lines:
            raise RuntimeError(f"{name}:\n{done.stderr[-3000:]}")
        peaks[name] = round(float(lines[0].split()[1]), 1)
        print(f"{name:55} {peaks[name]:8,.1f} MB", flush=True)
    print(f"written to {write_result('memory', {'peak_mb': peaks, 'cases': CASES})}")


if __name__ == "__main__":
    main()
