"""Where to train: the `tf.distribute` strategy for what the environment and this machine offer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping

import tensorflow as tf

from tf_gptopt._errors import UserError, suggest
from tf_gptopt.training.cluster import Cluster, find_cluster
from tf_gptopt.training.last_words import open_line
from tf_gptopt.training.meeting import meet, wait_seconds

STRATEGIES = ("auto", "default", "mirrored", "multi_worker", "tpu")

_joined: tuple[tf.distribute.Strategy, str] | None = None  # a process joins a cluster once


def choose_strategy(name: str = "auto") -> tuple[tf.distribute.Strategy, str]:
    """A strategy, and why it was chosen.

    ```python
    strategy, why = choose_strategy()
    with strategy.scope():
        model = GPTModel(...)
    ```

    Call it before anything else touches TensorFlow: a multi-worker strategy has to be the first.
    Called again in a process of a cluster, it gives the strategy that was joined.

    Args:
        name: "auto" takes the first that applies of
            - "tpu": a TPU is attached, or TPU_NAME or Colab's COLAB_TPU_ADDR is set
              (`TPUStrategy`);
            - "multi_worker": TF_CONFIG, Slurm or Kubernetes names more than one worker, see
              `cluster.py` (`MultiWorkerMirroredStrategy`);
            - "mirrored": several GPUs are visible (`MirroredStrategy`);
            - "default": one device, plain Keras.

    Raises:
        UserError: for an unknown name, a malformed description of a cluster, a port that is in
            use, a worker that has not come after TF_GPTOPT_WAIT_SECONDS (60), and a strategy that
            this machine cannot have.
    """
    if name not in STRATEGIES:
        raise UserError(f"Unknown strategy {name!r}.{suggest(str(name), STRATEGIES)}")
    if name == "auto":
        name = applicable(os.environ, gpus=_count("GPU"), tpus=_count("TPU"))
    if name == "tpu":
        return _tpu(tpu_address(os.environ))
    if name == "multi_worker":
        return _multi_worker(find_cluster(os.environ))
    if name == "mirrored":
        devices = _count("GPU") or _count("CPU")
        kind = "GPU" if _count("GPU") else "CPU"
        strategy = tf.distribute.MirroredStrategy()
        return strategy, f"{devices} {kind} device{'s' * (devices > 1)}, one replica on each"
    return tf.distribute.get_strategy(), f"one device ({'GPU' if _count('GPU') else 'CPU'})"


def applicable(environment: Mapping[str, str], gpus: int = 0, tpus: int = 0) -> str:
    """The name of the strategy that "auto" takes in this environment, with these devices."""
    if tpus or tpu_address(environment):
        return "tpu"
    cluster = find_cluster(environment)
    if cluster and len(cluster.workers) > 1:
        return "multi_worker"
    return "mirrored" if gpus > 1 else "default"


def tpu_address(environment: Mapping[str, str]) -> str | None:
    """What to call the TPU: Cloud's TPU_NAME ("local" on a TPU VM), or Colab's address."""
    colab = environment.get("COLAB_TPU_ADDR")
    return environment.get("TPU_NAME") or (f"grpc://{colab}" if colab else None)


def _count(kind: str) -> int:
    return len(tf.config.list_physical_devices(kind))


def _tpu(address: str | None) -> tuple[tf.distribute.Strategy, str]:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(address or "local")
    except Exception as error:  # one absence comes as ValueError, OpError, an HTTP error, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"No TPU answers ({reason}). Set TPU_NAME (on a TPU VM: local), or choose another "
            "strategy."
        ) from None
    strategy = tf.distribute.TPUStrategy(resolver)
    return strategy, f"a TPU with {strategy.num_replicas_in_sync} cores"


def _multi_worker(cluster: Cluster | None) -> tuple[tf.distribute.Strategy, str]:
    global _joined
    if cluster is None:
        raise UserError(
            "The strategy multi_worker needs a cluster: `tf-gptopt launch --workers 2 -- ...` "
            "starts one on this machine, srun starts one under Slurm, and elsewhere the "
            "environment variable TF_CONFIG describes it, the same on every worker but for the "
            'index: {"cluster": {"worker": ["host1:1234", "host2:1234"]}, "task": {"type": '
            '"worker", "index": 0}}.'
        )
    if _joined is None:
        workers = f"{len(cluster.workers)} workers"
        _joined = _join(cluster), f"{cluster.source} names {workers}, this is {cluster.index}"
    return _joined


def _join(cluster: Cluster) -> tf.distribute.Strategy:
    gpus = _count("GPU")
    wait = wait_seconds()
    if len(cluster.workers) > 1:
        open_line(meet(cluster, wait))
    communication = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        # bytes a worker and step: 2 (N - 1) / N of the gradients', whatever N
        implementation=communication.AUTO if gpus else communication.RING
    )
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.workers)}),
        task_type="worker",
        task_id=cluster.index,
        rpc_layer="grpc",
        num_accelerators={"GPU": gpus} if gpus else {},
    )
    before = signal.getsignal(signal.SIGTERM)
    with _bounded(wait):
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
        except (RuntimeError, tf.errors.OpError) as error:
            raise UserError(
                f"Worker {cluster.index} could not join the cluster "
                f"({(str(error).splitlines() or [''])[0]}). Choose the strategy before anything "
                "else touches TensorFlow, and start all workers again."
            ) from None
    # TensorFlow has taken SIGTERM and does nothing with it; the trainer wants to hear it
    if threading.current_thread() is threading.main_thread() and before is not None:
        signal.signal(signal.SIGTERM, before)
    return strategy


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Kill this process when the block does not end: a worker that dies between meeting and joining
    leaves the others in TensorFlow's code, which lets no thread or signal handler of Python run. So
    a small process of its own watches, until its standard input is closed."""
    with subprocess.Popen([sys.executable, "-ISc", _WATCH, str(seconds)], stdin=subprocess.PIPE):
        yield


_WATCH = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[1]))[0]:
    print(
        f"tf-gptopt: error: After {float(sys.argv[1]):g} s not all workers have joined; one must "
        "have ended. Look into their logs and start all of them again.",
        file=sys.stderr,
    )
    os.kill(os.getppid(), signal.SIGKILL)
"""
