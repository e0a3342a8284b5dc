"""Memory and speed of tensor parallelism by mesh, each mesh in a process of its own.

    python benchmarks/parallel.py            # a 13.9 M model on up to 4 devices; some minutes
    python benchmarks/parallel.py --quick    # a smoke test: small shape, few steps

Bytes are those of the variables on each device, exactly: weights, and the optimizer's moments. A
gradient is as large as its weight and lies beside it. On GPUs the allocator's peak is read too.
Logical CPU devices share one allocator and the same cores, so there the peak is that of the process
and tokens/s show what dividing costs, not what it brings. Results go to
benchmarks/results/parallel.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import spread, write_result

FULL = {"vocab": 8192, "width": 384, "layers": 6, "heads": 6, "time": 256, "batch": 8, "steps": 8}
QUICK = {"vocab": 512, "width": 64, "layers": 2, "heads": 4, "time": 64, "batch": 4, "steps": 3}
MESHES = (
    "batch=1,model=1",
    "batch=1,model=2",
    "batch=2,model=1",
    "batch=1,model=4",
    "batch=2,model=2",
    "batch=4,model=1",
)


def measure(mesh: str, shape: dict[str, int]) -> dict[str, Any]:
    """Train on one mesh, in this process."""
    from tf_gptopt._startup import load_tensorflow
    from tf_gptopt.training.parallel.mesh import Mesh

    load_tensorflow()
    devices = [device for row in Mesh.parse(mesh).devices() for device in row]
    import tensorflow as tf

    from tf_gptopt.models.gpt import GPTModel
    from tf_gptopt.training.loss import NextTokenLoss
    from tf_gptopt.training.optimizer import adamw
    from tf_gptopt.training.parallel.placement import bytes_per_device
    from tf_gptopt.training.parallel.tensor import shard

    with tf.device("CPU:0"):
        plain = GPTModel(
            shape["vocab"],
            shape["width"],
            shape["layers"],
            shape["heads"],
            max_sequence_length=shape["time"],
        )
    model = shard(plain, mesh)
    model.compile(adamw(steps=1000), loss=NextTokenLoss())
    model.optimizer.build(model.trainable_variables)
    weights = bytes_per_device(model.trainable_variables)
    size = [shape["batch"], shape["time"] + 1]
    ids = tf.random.stateless_uniform(size, [0, 0], maxval=shape["vocab"], dtype=tf.int32)
    x, y = ids[:, :-1], ids[:, 1:]
    train = model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors((x, y)).repeat())
    seconds = []
    for _ in range(shape["steps"] + 1):
        start = time.perf_counter()
        loss = float(train(batches)["loss"])
        seconds.append(time.perf_counter() - start)
    compiled = seconds.pop(0)
    found = {
        "weights": weights,
        "optimizer": bytes_per_device(v for v in model.optimizer.variables if v.shape.rank),
        "tokens_per_second": spread([shape["batch"] * shape["time"] / s for s in seconds], 0),
        "first_step_seconds": round(compiled, 1),
        "loss": loss,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if "GPU" in devices[0]:
        get = tf.config.experimental.get_memory_info
        found["allocator_peak_bytes"] = {
            device: get(device.removeprefix("/device:"))["peak"] for device in devices
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shape, to see that it works")
    parser.add_argument("--meshes", nargs="+", default=MESHES, help="such as batch=2,model=2")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own measures
    options = parser.parse_args()
    shape = QUICK if options.quick else FULL
    if options.one:
        print(json.dumps(measure(options.one, shape)))
        return
    found = {}
    print(f"{'mesh':<18}{'weights':>12}{'moments':>12}{'tokens/s':>10}   largest device, MB")
    for mesh in options.meshes:
        command = [sys.executable, __file__, "--one", mesh, *["--quick"] * options.quick]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[mesh] = one = json.loads(done.stdout.splitlines()[-1])
        weights, moments = (max(one[key].values()) / 1e6 for key in ("weights", "optimizer"))
        speed = one["tokens_per_second"]["median"]
        print(f"{mesh:<18}{weights:>12.2f}{moments:>12.2f}{speed:>10,.0f}", flush=True)
    if not options.quick:
        print(f"written to {write_result('parallel', {'shape': shape, 'meshes': found})}")


if __name__ == "__main__":
    main()
