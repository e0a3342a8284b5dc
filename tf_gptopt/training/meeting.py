"""How the workers of a cluster meet, before TensorFlow joins them: in bounded time.

TensorFlow waits without an end for a worker that never comes, and joins without a word a cluster
that each worker describes differently. So they meet first, over a plain socket on the chief's own
port. Needs no TensorFlow.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt.training.cluster import Cluster, seconds_of
from tf_gptopt.training.last_words import Line

WAIT = "TF_GPTOPT_WAIT_SECONDS"


def meet(cluster: Cluster, seconds: float) -> Line:
    """Return when every worker of the cluster is there, on all of them alike, with the line over
    which one that ends tells the others why.

    The chief listens on its own port; each worker, its port reserved, tells it who it is and waits
    for the word.

    Raises:
        UserError: when this worker's port is in use, when a worker has not come after `seconds`,
            and when two workers disagree on the cluster.
    """
    deadline = time.monotonic() + seconds
    try:
        listener = socket.create_server(("", cluster.port), backlog=len(cluster.workers))
    except OSError as error:
        raise UserError(
            f"Worker {cluster.index} cannot listen on port {cluster.port} ({error.strerror}). End "
            "the process that uses it, or give this worker another port (in the environment of all "
            "workers)."
        ) from None
    with listener:
        return (_gather if cluster.is_chief else _report)(cluster, listener, deadline, seconds)


def wait_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """How long to wait for the other workers: TF_GPTOPT_WAIT_SECONDS, or 60."""
    return seconds_of(environment, WAIT, 60.0)


def _gather(cluster: Cluster, listener: socket.socket, deadline: float, seconds: float) -> Line:
    """The chief's side of `meet`."""
    problem, line, port = "", Line(cluster.index), 0
    with contextlib.ExitStack() as stack:
        present: dict[int, socket.socket] = {}
        while not problem and len(present) < len(cluster.workers) - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                peer = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                missing = set(range(1, len(cluster.workers))) - present.keys()
                names = ", ".join(f"{i} ({cluster.workers[i]})" for i in sorted(missing))
                problem = (
                    f"After {seconds:g} s these workers have not come: {names}. Start them, look "
                    f"into their logs, or wait longer with {WAIT}=600."
                )
                break
            hello = _receive(peer, min(deadline, time.monotonic() + 5)) or {}
            index = hello.get("index")
            if index is None:
                continue  # not one of ours: somebody looked at the port
            if hello.get("workers") != list(cluster.workers) or index in {0, *present}:
                problem = (
                    f"Worker {index} describes another cluster than worker 0: {hello['workers']}, "
                    f"not {list(cluster.workers)}. Give all workers the same list, and each its "
                    "own index."
                )
            present[index] = peer
        if not problem:
            port = line.listen(len(present))
        for peer in present.values():
            with contextlib.suppress(OSError):
                _send(peer, {"problem": problem, "port": port})
        for peer in present.values():  # they close first, so that this port is free at once
            _receive(peer, time.monotonic() + 1)
    if problem:
        raise UserError(problem)
    return line


def _report(cluster: Cluster, listener: socket.socket, deadline: float, seconds: float) -> Line:
    """Another worker's side of `meet`; `listener` only reserves its port."""
    host, _, port = cluster.workers[0].rpartition(":")
    while True:
        try:
            chief = socket.create_connection(
                (host.strip("[]"), int(port)), timeout=max(0.01, deadline - time.monotonic())
            )
            break
        except OSError as error:  # not there yet, or its name is not known yet
            if time.monotonic() >= deadline:
                raise UserError(
                    f"After {seconds:g} s worker 0 does not answer at {cluster.workers[0]} "
                    f"({error}). Start it, look into its log, or wait longer with {WAIT}=600."
                ) from None
            time.sleep(0.2)
    with chief:
        answer = None
        with contextlib.suppress(OSError):
            _send(chief, {"index": cluster.index, "workers": list(cluster.workers)})
            answer = _receive(chief, deadline + 10)
    if answer is None:
        raise UserError(
            f"Worker 0 ({cluster.workers[0]}) ended before all workers were there. Its log says "
            "why; then start all workers again."
        )
    if answer["problem"]:
        raise UserError(answer["problem"])
    line = Line(cluster.index)
    line.connect(host.strip("[]"), answer["port"])
    return line


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer: socket.socket, deadline: float) -> dict[str, Any] | None:
    """One line of JSON; None when the peer has gone, is late or speaks otherwise."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 1 << 20:
            peer.settimeout(max(0.01, deadline - time.monotonic()))
            received = peer.recv(65536)
            if not received:
                return None
            line += received
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
