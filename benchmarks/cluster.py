"""Several local workers against one process with the same cores, and their bytes on the wire.

    python benchmarks/cluster.py             # about ten minutes on two cores
    python benchmarks/cluster.py --quick     # a smoke test: small shape, few steps

Each job trains the same model on the same global batches: one process with all cores, and two and
four workers of MultiWorkerMirroredStrategy that divide them. Efficiency is the cluster's tokens/s
over the single process's, job after job in turn; what counts is the median of the rounds' ratios.
It shows what distribution costs, not what more machines win.

The workers talk over 127.0.0.1, so the loopback counters of /proc/net/dev hold every byte that they
send, with TCP's headers and acknowledgements and whatever else the machine says to itself in the
meantime. A ring all-reduce (Patarasuk & Yuan 2009) sends 2 (N - 1) / N times the gradients' bytes a
worker and step. Linux alone. Results go to benchmarks/results/cluster.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import spread, write_result
from tf_gptopt.training.launch import worker_environments

FULL = {"vocab": 8192, "width": 384, "layers": 6, "heads": 6, "time": 256, "batch": 8}
QUICK = {"vocab": 512, "width": 64, "layers": 2, "heads": 2, "time": 64, "batch": 8}
WARM_UP = 3  # steps that trace, compile and open connections
MARK = "MEASURED "


def measure(shape: dict[str, int], workers: int, steps: int) -> dict[str, Any]:
    """One job: tokens/s, and loopback bytes a step, as its chief sees them."""
    cores = len(os.sched_getaffinity(0))
    environments = worker_environments(workers, os.environ, max(1, cores // workers))
    command = [sys.executable, __file__, "--worker", json.dumps({**shape, "steps": steps})]
    outputs = [subprocess.PIPE] + [subprocess.DEVNULL] * (workers - 1)
    jobs = [
        subprocess.Popen(command, env=environment, stdout=output, stderr=output, text=True)
        for environment, output in zip(environments, outputs, strict=True)
    ]
    try:
        said, errors = jobs[0].communicate(timeout=1800)
        for job in jobs[1:]:
            job.wait(timeout=60)
    finally:
        for job in jobs:
            job.kill()
    lines = [line for line in said.splitlines() if line.startswith(MARK)]
    if not lines:
        raise RuntimeError(f"The job of {workers} failed:\n{errors[-3000:]}")
    return json.loads(lines[0].removeprefix(MARK))


def loopback_bytes() -> int:
    """Bytes that the loopback interface has sent since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise RuntimeError("/proc/net/dev has no line for the loopback interface, lo.")


def work(shape: dict[str, int]) -> None:
    """A worker's process; the chief prints what it measured."""
    from tf_gptopt._startup import load_tensorflow

    load_tensorflow()
    import tensorflow as tf

    from tf_gptopt._keras import keras
    from tf_gptopt.models.gpt import GPTModel
    from tf_gptopt.training.config import TrainConfig
    from tf_gptopt.training.strategy import choose_strategy
    from tf_gptopt.training.trainer import fit
    from tf_gptopt.training.workers import workers_of

    length, marks = shape["time"], []

    class Noise:
        sequence_length = length

        def batches(self, split: str, batch_size: int, seed: int = 0, start_step: int = 0) -> Any:
            def batch(step: tf.Tensor) -> Any:
                ids = tf.random.stateless_uniform(
                    [batch_size, length + 1], [seed, step], maxval=shape["vocab"], dtype=tf.int32
                )
                return ids[:, :-1], ids[:, 1:]

            return tf.data.Dataset.range(start_step, 2**40).map(batch).prefetch(2)

    class Marks(keras.callbacks.Callback):
        _supports_tf_logs = True

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch + 1 in (WARM_UP, WARM_UP + shape["steps"]):
                marks.append((time.perf_counter(), loopback_bytes()))

    strategy, _ = choose_strategy()
    with strategy.scope():
        model = GPTModel(
            vocab_size=shape["vocab"],
            embedding_dim=shape["width"],
            num_layers=shape["layers"],
            num_heads=shape["heads"],
            max_sequence_length=length,
        )
    total = WARM_UP + shape["steps"]
    config = TrainConfig(total, shape["batch"], precision="float32", log_every=total)
    fit(model, Noise(), config, None, [Marks()], lambda report: None)
    if workers_of(strategy).is_chief:
        (begun, before), (ended, after) = marks
        steps = shape["steps"]
        measured = {
            "tokens_per_second": steps * shape["batch"] * length / (ended - begun),
            "bytes_per_step": (after - before) / steps,
            "parameters": model.count_params(),
        }
        print(MARK + json.dumps(measured), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shape, few steps, no file")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    shape, rounds = (QUICK, 1) if options.quick else (FULL, options.rounds)
    jobs: dict[int, list[dict[str, Any]]] = {count: [] for count in (1, *options.workers)}
    for number in range(rounds):
        for count, results in jobs.items():
            results.append(measure(shape, count, options.steps))
            print(f"round {number + 1}, {count} worker(s): {results[-1]}", flush=True)
    alone = [result["tokens_per_second"] for result in jobs[1]]
    parameters = jobs[1][0]["parameters"]
    rows = []
    for count, results in jobs.items():
        rates = [result["tokens_per_second"] for result in results]
        ratios = [rate / one for rate, one in zip(rates, alone, strict=True)]
        ring = 2 * (count - 1) / count * 4 * parameters  # a worker sends this
        sent = statistics.median(result["bytes_per_step"] for result in results) / count
        rows.append(
            {
                "workers": count,
                "threads_each": max(1, len(os.sched_getaffinity(0)) // count),
                "tokens_per_second": spread(rates),
                "efficiency": round(statistics.median(ratios), 3),
                "bytes_per_step_and_worker": round(sent),
                "ring_bytes_per_step_and_worker": round(ring),
                "over_ring": round(sent / ring, 3) if ring else None,
            }
        )
        print(json.dumps(rows[-1]))
    if not options.quick:
        result = {"shape": shape, "parameters": parameters, "steps": options.steps, "rows": rows}
        print(write_result("cluster", result))


if __name__ == "__main__":
    main()
