"""The processes that train one model together, once they have joined: how they agree and fail.

Whatever must be the same on all workers and does not follow from the configuration is decided by
the chief and told to the others (`share`), or summed over all (`total`), each by one all-reduce of
a few integers. Both have to be called by every worker in the same order, as all collectives.

A worker that dies is noticed by TensorFlow's heartbeats within some ten seconds, a socket that
breaks at once; `together` says then which one it was. One that lives and is stuck goes on beating:
the others' `Watchdog` aborts the collective that they wait in.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt.training.cluster import Alone, seconds_of
from tf_gptopt.training.last_words import heard, tell

STALL = "TF_GPTOPT_STALL_SECONDS"

# What a collective raises when a worker has gone, or when the watchdog has aborted it, says this
_ABORTED = re.compile("Collective ops is aborted|RPC|Connection re|Socket closed")
_NAMED = re.compile(r"(?:remote target |reported from |^)/job:\w+\S*/task:(\d+)", re.M)


def workers_of(strategy: tf.distribute.Strategy) -> Alone:
    """The workers behind a strategy; `Alone` for all but several of MultiWorkerMirroredStrategy."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return Alone()
    jobs = strategy.cluster_resolver.cluster_spec().as_dict()
    many = sum(len(jobs.get(job, [])) for job in ("chief", "worker")) > 1
    return _workers(strategy) if many else Alone()


@functools.cache
def _workers(strategy: tf.distribute.Strategy) -> Workers:
    return Workers(strategy)


class Workers(Alone):
    """Several workers, seen from one of them.

    Args:
        strategy: a MultiWorkerMirroredStrategy of two workers or more.

    Attributes:
        index: of this process; 0 is the chief.
        count: of all.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        resolver = strategy.cluster_resolver
        jobs = resolver.cluster_spec().as_dict()
        chiefs = jobs.get("chief", [])
        self.addresses = [*chiefs, *jobs.get("worker", [])]
        self.count = len(self.addresses)
        self.index = resolver.task_id + (resolver.task_type == "worker") * len(chiefs)
        self.is_chief = self.index == 0
        self.watchdog: Watchdog | None = None
        replicas = strategy.num_replicas_in_sync // self.count  # of one worker

        def one_replica(numbers: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            first = context.replica_id_in_sync_group % replicas == 0
            mine = tf.where(first, numbers, tf.zeros_like(numbers))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, mine)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)])
        def total(numbers: tf.Tensor) -> tf.Tensor:
            summed = strategy.run(one_replica, (numbers,))
            return strategy.experimental_local_results(summed)[0]

        self._total = total

    def progress(self) -> None:
        if self.watchdog:
            self.watchdog.progress()

    def share(self, value: Any) -> Any:
        """The chief's value, plain for JSON, on every worker; the others' is not looked at."""
        return self._share(value, 0)

    def _share(self, value: Any, index: int) -> Any:
        """The value of worker `index`, on every worker."""
        is_mine = index == self.index
        text = json.dumps(value).encode() if is_mine else b""
        (size,) = self.total([len(text)])
        numbers = np.frombuffer(text, np.uint8) if is_mine else np.zeros(size, np.uint8)
        return json.loads(bytes(self.total(numbers)))

    def total(self, numbers: Sequence[int]) -> list[int]:
        """The sums over all workers, element by element; as many numbers on each."""
        with together(self):
            return self._total(tf.constant(np.asarray(numbers, np.int64))).numpy().tolist()

    def together(self) -> contextlib.AbstractContextManager[None]:
        return together(self)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        problem = ""
        try:
            yield
        except UserError as error:
            problem = str(error)
        found = self.total([index == self.index and bool(problem) for index in range(self.count)])
        if any(found):
            raise UserError(self._share(problem, found.index(1)))


@contextlib.contextmanager
def together(workers: Alone, seconds: float | None = None) -> Iterator[None]:
    """Turns what a collective raises when a worker has gone into a `UserError` that names it, and
    that repeats what it has said, if it said something (`last_words.py`).

    Args:
        workers: alone, nothing is turned.
        seconds: without `workers.progress()`, after which the collectives are aborted.
    """
    if workers.count == 1:
        yield
        return
    watching = contextlib.nullcontext() if seconds is None else _watching(workers, seconds)
    try:
        with watching:
            yield
    except UserError as error:  # of this worker alone, such as a full disk
        tell(str(error))
        raise
    except tf.errors.OpError as error:
        ours = isinstance(error, tf.errors.UnavailableError) or _ABORTED.search(error.message)
        if not ours:
            raise
        watchdog = workers.watchdog
        if watchdog and watchdog.barked:
            raise UserError(
                f"No step has ended for {watchdog.seconds:g} s: a worker is stuck, though it "
                f"lives. Look into the workers' logs (or raise {STALL}, if steps take that long) "
                "and start all workers again: they go on from the newest checkpoint."
            ) from None
        if told := heard():
            raise UserError(f"Worker {told[0]} has ended: {told[1]}") from None
        who = _missing(workers, str(error))
        raise UserError(
            f"{who} ended or cannot be reached any more. Its log says why. Start all workers "
            "again with the same command: they go on from the newest checkpoint."
        ) from error


@contextlib.contextmanager
def _watching(workers: Workers, seconds: float) -> Iterator[None]:
    with Watchdog(seconds) as workers.watchdog:
        yield


def _missing(workers: Workers, message: str) -> str:
    """The worker that has gone: the one that refuses connections, else the one TensorFlow names."""
    others = [i for i in range(workers.count) if i != workers.index]
    dead = [i for i in others if not _listens(workers.addresses[i])]
    if len(dead) != 1:
        dead = [int(i) for i in _NAMED.findall(message) if int(i) != workers.index][:1]
    return f"Worker {dead[0]} ({workers.addresses[dead[0]]})" if dead else "Another worker"


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError:
        return False
    return True


class Watchdog:
    """Aborts the collectives of this process when nothing has gone forward for a while.

    A worker that hangs in its own code keeps up its heartbeats, so TensorFlow lets the others wait
    for it without an end.

    ```python
    with Watchdog(seconds=600) as watchdog:
        for batch in batches:
            step(batch)
            watchdog.progress()
    ```

    Args:
        seconds: without `progress`. The first step traces and compiles, so leave room for that.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.barked = False
        self._last = time.monotonic()
        self._ended = threading.Event()

    def progress(self) -> None:
        """Something has gone forward."""
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self.progress()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()

    def _watch(self) -> None:
        from tensorflow.python.eager import context  # there is no public way to abort a collective

        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                self.barked = True
                aborted = tf.errors.ABORTED
                context.context().abort_collective_ops(aborted, "No progress: a worker is stuck")
                return


def stall_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """How long a step may take before the others give up: TF_GPTOPT_STALL_SECONDS, or 600."""
    return seconds_of(environment, STALL, 600.0)
