"""Which processes train together: found in the environment, met before TensorFlow joins them.

A cluster is a list of addresses, one a worker, the same on every worker, and this process's index
in it. Three schedulers leave it in the environment:

- `TF_CONFIG`, as TensorFlow, Vertex AI, Kubeflow and `tf-gptopt launch` write it;
- Slurm, in a step of more than one task (`srun`);
- an Indexed Job or JobSet of Kubernetes: `JOB_COMPLETION_INDEX`, which Kubernetes sets, with
  `TF_GPTOPT_NUM_WORKERS` and `TF_GPTOPT_WORKER_ADDRESS`, which the manifest sets.

Every worker runs the same command. Worker 0 is the chief: it alone decides what depends on a clock
or a disk (which stage is finished, which checkpoint to take up, when to write the next), takes the
lock, writes results and speaks. The others are told (`workers.py`), take part in every collective,
write nothing but print their errors. All of them read the same folders: data, models and
checkpoints lie on a file system that every worker sees.

Needs no TensorFlow (only Slurm's host lists do).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tf_gptopt._errors import UserError

NUM_WORKERS, ADDRESS = "TF_GPTOPT_NUM_WORKERS", "TF_GPTOPT_WORKER_ADDRESS"
SLURM_PORT = "TF_GPTOPT_PORT"

_EXAMPLE = (
    '{"cluster": {"worker": ["host1:1234", "host2:1234"]}, "task": {"type": "worker", "index": 0}}'
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run, and which of them this process is.

    Attributes:
        workers: `host:port` of each.
        index: of this process.
        source: where it was found: "TF_CONFIG", "Slurm" or "Kubernetes".
    """

    workers: tuple[str, ...]
    index: int
    source: str

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    @property
    def port(self) -> int:
        """Where this process listens."""
        return int(self.workers[self.index].rpartition(":")[2])


class Alone:
    """One process, without others to agree with; `workers.Workers` has the same methods."""

    index, count, is_chief = 0, 1, True

    def progress(self) -> None:
        """A step has ended: nobody is stuck."""

    def share(self, value: Any) -> Any:
        """The chief's value, on every worker."""
        return value

    def total(self, numbers: Sequence[int]) -> list[int]:
        """The sums over all workers, element by element."""
        return list(numbers)

    def together(self) -> contextlib.AbstractContextManager[None]:
        """A worker that goes while the others are in the block is a `UserError` of theirs."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A `UserError` that any worker raises in the block is raised by all of them after it. What
        is inside talks to no other worker."""
        yield


def find_cluster(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """The cluster that an environment describes; None for a process on its own.

    Raises:
        UserError: for a malformed or incomplete description.
    """
    return from_tf_config(environment) or from_slurm(environment) or from_kubernetes(environment)


def leads(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process writes and speaks: it is the chief, or on its own."""
    cluster = find_cluster(environment)
    return cluster is None or cluster.is_chief


def from_tf_config(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster of TF_CONFIG; a chief counts as the first worker."""
    text = environment.get("TF_CONFIG", "").strip()
    if not text:
        return None

    def wrong(what: str) -> UserError:
        return UserError(
            f"The environment variable TF_CONFIG {what}. Expected for example: {_EXAMPLE}. "
            "Mend it, or unset it to train alone."
        )

    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise wrong(f"is not JSON ({error})") from None
    cluster = config.get("cluster") if isinstance(config, dict) else None
    if not isinstance(cluster, dict) or not cluster:
        raise wrong("has no cluster")
    for kind, addresses in cluster.items():
        if kind not in ("chief", "worker"):
            raise wrong(f"has {kind!r} in its cluster, where chief and worker are supported")
        if not isinstance(addresses, list) or not addresses or not all(map(_is_address, addresses)):
            raise wrong(f"needs a list of host:port for {kind!r}")
    task = config.get("task")
    if not isinstance(task, dict) or task.get("type") not in cluster:
        raise wrong(f"needs a task whose type is one of {sorted(cluster)}")
    index, most = task.get("index"), len(cluster[task["type"]])
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < most:
        raise wrong(f"needs a task index from 0 to {most - 1}, not {index!r}")
    chiefs = cluster.get("chief", [])
    if len(chiefs) > 1:
        raise wrong("names more than one chief")
    workers = (*chiefs, *cluster.get("worker", []))
    if len(set(workers)) < len(workers):
        raise wrong("names the same host:port twice")
    return Cluster(workers, index + (task["type"] == "worker") * len(chiefs), "TF_CONFIG")


def from_slurm(environment: Mapping[str, str]) -> Cluster | None:
    """The tasks of this Slurm step, when there are several.

    The port of a host's first task follows from the job's number, so that two jobs on a host do not
    meet; TF_GPTOPT_PORT sets another.
    """
    if "SLURM_PROCID" not in environment or _number(environment, "SLURM_STEP_NUM_TASKS", 1) < 2:
        return None
    import tensorflow as tf

    # TensorFlow's resolver reads the host list. Its class cannot be used as a whole: it sorts hosts
    # by name, where Slurm counts (n2 before n10), so that a rank gets another one's address; and it
    # divides GPUs among tasks, which fails on hosts that have none.
    slurm = sys.modules[tf.distribute.cluster_resolver.SlurmClusterResolver.__module__]
    try:
        hosts = slurm.expand_hostlist(environment["SLURM_STEP_NODELIST"])
        tasks = slurm.expand_tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The environment of this Slurm step cannot be read ({error}). Start the workers with "
            "srun, inside sbatch or salloc."
        ) from None
    index = _number(environment, "SLURM_PROCID")
    job = _number(environment, "SLURM_JOB_ID", 0)
    first = _number(environment, SLURM_PORT, 10_000 + 16 * job % 20_000)
    places = [(host, n) for host, here in zip(hosts, tasks, strict=True) for n in range(here)]
    if not 0 <= index < len(places):
        raise UserError(
            f"SLURM_PROCID={index} is none of the {len(places)} tasks that "
            "SLURM_STEP_TASKS_PER_NODE counts. Start the workers with srun."
        )
    node = environment.get("SLURMD_NODENAME", places[index][0])
    if node != places[index][0]:
        raise UserError(
            f"Slurm runs task {index} on {node}, and by blocks it belongs on {places[index][0]}. "
            "Start the workers with srun --distribution=block."
        )
    return Cluster(tuple(f"{host}:{first + n}" for host, n in places), index, "Slurm")


def from_kubernetes(environment: Mapping[str, str]) -> Cluster | None:
    """The pods of an Indexed Job or JobSet, under the names that its headless service gives them.

    TF_GPTOPT_WORKER_ADDRESS is the address of every pod, with `{index}` where they differ, for
    example `train-worker-0-{index}.train:2222`.
    """
    # Not tf.distribute.cluster_resolver.KubernetesClusterResolver: it needs the kubernetes package
    # and the right to list pods, looks for a kubeconfig file even inside a pod, fails while a pod
    # is still pending, gives the hosts' addresses instead of the pods', and knows no index.
    if "JOB_COMPLETION_INDEX" not in environment or NUM_WORKERS not in environment:
        return None
    count, index = _number(environment, NUM_WORKERS), _number(environment, "JOB_COMPLETION_INDEX")
    pattern = environment.get(ADDRESS, "")
    if pattern.count("{index}") != 1 or not _is_address(pattern):
        raise UserError(
            f"{ADDRESS} must be the address of a pod with {{index}} in place of its number, for "
            f"example train-worker-0-{{index}}.train:2222. Received: {pattern!r}."
        )
    if not 0 <= index < count:
        raise UserError(
            f"JOB_COMPLETION_INDEX={index} is none of {NUM_WORKERS}={count} workers. Set it to the "
            "job's completions."
        )
    workers = tuple(pattern.replace("{index}", str(i)) for i in range(count))
    return Cluster(workers, index, "Kubernetes")


def seconds_of(environment: Mapping[str, str], name: str, default: float) -> float:
    """A positive number of seconds from the environment."""
    try:
        seconds = float(environment.get(name, default))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise UserError(
            f"{name} must be a positive number of seconds. Received: {environment[name]!r}."
        )
    return seconds


def _is_address(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    found = re.fullmatch(r".+:(\d+)", text)
    return bool(found) and 0 < int(found[1]) < 65536


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name} must be a whole number. Received: {text!r}.")
    return int(text)
