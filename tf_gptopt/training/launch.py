"""A cluster on one machine: real processes, started, watched and ended together.

Each worker is `python -m tf_gptopt COMMAND` with its own `TF_CONFIG` (addresses on 127.0.0.1, free
ports), its share of the cores, and its lines prefixed `[worker 0]`. The first one that fails ends
all, and its exit code is the launcher's; Ctrl-C and SIGTERM are passed on, so that the workers
agree on a step, write a checkpoint and end. A launcher that is killed takes its workers along.
Needs no TensorFlow.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from tf_gptopt._errors import UserError

GRACE = "TF_GPTOPT_GRACE_SECONDS"  # for the others to end by themselves; then they are killed
_GRACE = 30.0
_LAUNCHER = "TF_GPTOPT_LAUNCHER"  # its process id, for the workers
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_STOPPED = {128 + signal.SIGINT: "SIGINT", 128 + signal.SIGTERM: "SIGTERM"}


def launch(command: Sequence[str], workers: int, threads: int | None = None) -> int:
    """Run `tf-gptopt COMMAND` on `workers` processes of this machine, and return the exit code.

    ```python
    launch(["train", "--dataset", "data", "--out", "model"], workers=2)
    ```

    Args:
        command: a command of `tf-gptopt` and its options, the same for every worker.
        workers: how many.
        threads: of each worker; None divides the cores.

    Returns:
        0 when all workers end well, else the exit code of the one that failed first (128 + the
        signal's number for one that was killed); 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        UserError: when `workers` or `threads` is below 1.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be 1 or more. Received: {name}={value}.")
    environments = worker_environments(workers, os.environ, threads)
    crew = _Crew()
    with crew.signals():
        for index, environment in enumerate(environments):
            crew.start(index, [sys.executable, "-m", "tf_gptopt", *command], environment)
        return crew.wait()


def end_with_launcher() -> None:
    """In a worker, first of all: be killed with the launcher, however it ends. Nothing else would
    end it, and the next start of the command would find the folder in use. (On Linux; elsewhere it
    trains on.)"""
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it has ended already
        sys.exit(1)


def worker_environments(
    workers: int, environment: Mapping[str, str], threads: int | None = None
) -> list[dict[str, str]]:
    """The environment of each worker: `TF_CONFIG`, and threads where the user has set none."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = str(threads or max(1, (cores or 1) // workers))
    made = []
    for index in range(workers):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        limits = {"TF_NUM_INTRAOP_THREADS": share, "OMP_NUM_THREADS": share}
        if threads is None:
            limits = {name: environment.get(name, value) for name, value in limits.items()}
        made.append(
            {
                **environment,
                **limits,
                "TF_CONFIG": json.dumps(config),
                "PYTHONUNBUFFERED": "1",
            }
        )
    return made


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different; taken soon, they are still free."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]


class _Crew:
    """The worker processes."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self.asked = 0  # the signal that the launcher was sent
        self._readers: list[threading.Thread] = []
        self._line = threading.Lock()  # lines of different workers do not mix

    def start(self, index: int, command: list[str], environment: dict[str, str]) -> None:
        process = subprocess.Popen(
            command,
            env={**environment, _LAUNCHER: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C reaches the launcher alone, once
        )
        self.processes.append(process)
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            reader = threading.Thread(target=self._copy, args=(index, source, target), daemon=True)
            reader.start()
            self._readers.append(reader)

    @contextlib.contextmanager
    def signals(self):
        """Pass Ctrl-C and SIGTERM on to the workers; the second one kills them. And whatever
        happens to the launcher, no worker is left."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self._pass_on)
        try:
            yield
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
            for reader in self._readers:
                reader.join(timeout=5)
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self) -> int:
        """Until all have ended; the exit code of the whole."""
        failed: tuple[int, int] | None = None
        deadline, paused = None, None
        while any(process.poll() is None for process in self.processes):
            if failed is None and (failed := self._failure()):
                paused = self._paused()
            if deadline is None and (failed or self.asked):
                deadline = time.monotonic() + _grace()
            if deadline is not None and time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            time.sleep(0.05)
        failed = failed or self._failure()
        for reader in self._readers:
            reader.join(timeout=5)
        if self.asked:
            return 128 + self.asked
        if failed is None:
            return 0
        index, code = failed
        how, advice = f"ended with {code}", "Its lines above say why."
        goes_on = "The same command goes on from the newest checkpoint."
        if code < 0:
            how, advice = f"was killed by {signal.Signals(-code).name}", goes_on
        if code in _STOPPED:
            how, advice = f"was stopped by {_STOPPED[code]}", goes_on
        if paused is not None:
            index, how, advice = paused, "was stopped by SIGSTOP and did not answer", goes_on
        print(
            f"tf-gptopt: error: Worker {index} {how}, and with it the others. {advice}",
            file=sys.stderr,
            flush=True,
        )
        return 128 - code if code < 0 else code

    def _failure(self) -> tuple[int, int] | None:
        """The first worker that has failed, and its code."""
        for index, process in enumerate(self.processes):
            if process.poll():
                return index, process.returncode
        return None

    def _paused(self) -> int | None:
        """A worker that is there and does not run."""
        for index, process in enumerate(self.processes):
            with contextlib.suppress(ChildProcessError, AttributeError):  # Windows has none of it
                flags = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
                if os.waitid(os.P_PID, process.pid, flags) is not None:
                    return index
        return None

    def _pass_on(self, number: int, _: object) -> None:
        self._send(signal.SIGKILL if self.asked else number)
        self.asked = number

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _copy(self, index: int, source: IO[bytes], target: IO[str]) -> None:
        for line in source:
            text = line.decode("utf-8", "replace").rstrip("\n")
            with self._line, contextlib.suppress(BrokenPipeError):
                target.write(f"[worker {index}] {text}\n")
                target.flush()


def _grace() -> float:
    return float(os.environ.get(GRACE, _GRACE))
