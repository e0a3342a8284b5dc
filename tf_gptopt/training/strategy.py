"""Where to train: the `tf.distribute` strategy for what this machine and TF_CONFIG offer."""

from __future__ import annotations

import json
import os

import tensorflow as tf

from tf_gptopt._errors import UserError, suggest

STRATEGIES = ("auto", "default", "mirrored", "multi_worker", "tpu")


def choose_strategy(name: str = "auto") -> tuple[tf.distribute.Strategy, str]:
    """A strategy, and why it was chosen.

    ```python
    strategy, why = choose_strategy()
    with strategy.scope():
        model = GPTModel(...)
    ```

    Call it before anything else touches TensorFlow: a multi-worker strategy has to be the first.

    Args:
        name: "auto" takes the first that applies of
            - "tpu": a TPU is attached, or TPU_NAME is set (`TPUStrategy`);
            - "multi_worker": TF_CONFIG names more than one worker
              (`MultiWorkerMirroredStrategy`);
            - "mirrored": several GPUs are visible (`MirroredStrategy`);
            - "default": one device, plain Keras.

    Raises:
        UserError: for an unknown name, a malformed TF_CONFIG, and a strategy that this machine
            cannot have.
    """
    if name not in STRATEGIES:
        raise UserError(f"Unknown strategy {name!r}.{suggest(str(name), STRATEGIES)}")
    if name == "auto":
        name = _applicable()
    if name == "tpu":
        return _tpu()
    if name == "multi_worker":
        workers = _workers_of_tf_config()
        if not workers:
            raise UserError(
                "The strategy multi_worker needs the environment variable TF_CONFIG, the same on "
                'every worker but for the index: {"cluster": {"worker": ["host1:1234", '
                '"host2:1234"]}, "task": {"type": "worker", "index": 0}}.'
            )
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        return strategy, f"TF_CONFIG names {workers} workers"
    if name == "mirrored":
        devices = _count("GPU") or _count("CPU")
        kind = "GPU" if _count("GPU") else "CPU"
        strategy = tf.distribute.MirroredStrategy()
        return strategy, f"{devices} {kind} device{'s' * (devices > 1)}, one replica on each"
    return tf.distribute.get_strategy(), f"one device ({'GPU' if _count('GPU') else 'CPU'})"


def _applicable() -> str:
    if tf.config.list_physical_devices("TPU") or os.environ.get("TPU_NAME"):
        return "tpu"
    if _workers_of_tf_config() > 1:
        return "multi_worker"
    return "mirrored" if _count("GPU") > 1 else "default"


def _count(kind: str) -> int:
    return len(tf.config.list_physical_devices(kind))


def _tpu() -> tuple[tf.distribute.Strategy, str]:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise UserError(
            f"No TPU answers ({str(error).splitlines()[0]}). Set TPU_NAME (on a TPU VM: local), or "
            "choose another strategy."
        ) from None
    strategy = tf.distribute.TPUStrategy(resolver)
    return strategy, f"a TPU with {strategy.num_replicas_in_sync} cores"


def _workers_of_tf_config() -> int:
    """Workers that TF_CONFIG names, this one included; 0 without TF_CONFIG."""
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return 0

    def wrong(what: str) -> UserError:
        return UserError(
            f"The environment variable TF_CONFIG {what}. Expected for example: "
            '{"cluster": {"worker": ["host1:1234", "host2:1234"]}, '
            '"task": {"type": "worker", "index": 0}}. Mend it, or unset it to train alone.'
        )

    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise wrong(f"is not JSON ({error})") from None
    cluster = config.get("cluster") if isinstance(config, dict) else None
    if not isinstance(cluster, dict) or not cluster:
        raise wrong("has no cluster")
    for kind, addresses in cluster.items():
        if kind not in ("chief", "worker", "evaluator"):
            raise wrong(f"has {kind!r} in its cluster, where chief and worker are supported")
        fine = isinstance(addresses, list) and addresses
        if not fine or not all(
            isinstance(address, str) and ":" in address for address in addresses
        ):
            raise wrong(f"needs a list of host:port for {kind!r}")
    task = config.get("task")
    if not isinstance(task, dict) or task.get("type") not in cluster:
        raise wrong(f"needs a task whose type is one of {sorted(cluster)}")
    index, most = task.get("index"), len(cluster[task["type"]])
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < most:
        raise wrong(f"needs a task index from 0 to {most - 1}, not {index!r}")
    return len(cluster.get("chief", ())) + len(cluster.get("worker", ()))
