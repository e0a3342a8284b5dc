"""`tf-gptopt launch`: a job of real processes, interrupted in every way, ends as if nothing had
happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.cli import main
from tf_gptopt.data.corpus import Document
from tf_gptopt.data.packing import write_dataset
from tf_gptopt.training.launch import _Crew, free_ports, launch, worker_environments


def test_each_worker_gets_its_place_and_its_share_of_the_cores():
    made = worker_environments(2, {"HOME": "/", "TF_CONFIG": "old"}, None)
    configs = [json.loads(environment["TF_CONFIG"]) for environment in made]
    assert [config["task"] for config in configs] == [
        {"type": "worker", "index": 0},
        {"type": "worker", "index": 1},
    ]
    assert configs[0]["cluster"] == configs[1]["cluster"]
    ports = {address.rpartition(":")[2] for address in configs[0]["cluster"]["worker"]}
    assert len(ports) == 2
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert {e["TF_NUM_INTRAOP_THREADS"] for e in made} == {str(max(1, cores // 2))}
    assert {e["HOME"] for e in made} == {"/"}
    mine = {"TF_NUM_INTRAOP_THREADS": "7"}
    assert worker_environments(1, mine)[0]["TF_NUM_INTRAOP_THREADS"] == "7"
    assert worker_environments(1, mine, threads=3)[0]["TF_NUM_INTRAOP_THREADS"] == "3"
    assert len(set(free_ports(5))) == 5


def test_mistakes(capsys):
    with pytest.raises(UserError, match="workers=0"):
        launch(["train"], workers=0)
    for arguments, said in (
        (["launch", "--workers", "2"], "after `--`"),
        (["launch", "--", "trian"], "Did you mean 'train'"),
        (["launch", "--", "launch"], "after `--`"),
        (["launch", "--wrokers", "2", "--", "train"], "Did you mean '--workers'"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err


def test_one_workers_mistake_ends_all_with_its_code(capfd):
    assert (
        main(["launch", "--workers", "2", "--", "train", "--dataset", "nowhere", "--out", "x"]) == 2
    )
    lines = capfd.readouterr().err.splitlines()
    assert "[worker 0] tf-gptopt: error: nowhere does not exist. Check the path." in lines
    assert "ended with 2" in lines[-1]


@pytest.mark.parametrize(
    ("first", "stop", "said", "code"),
    [
        ("sys.exit(143)", None, "Worker 0 was stopped by SIGTERM, and with it the others", 143),
        ("sys.exit(2)", 1, "Worker 1 was stopped by SIGSTOP and did not answer, and with", 2),
        ("sys.exit(2)", None, "Worker 0 ended with 2, and with it the others. Its lines", 2),
    ],
)
def test_a_stopped_worker_is_called_stopped(monkeypatch, capfd, first, stop, said, code):
    monkeypatch.setenv("TF_GPTOPT_GRACE_SECONDS", "0.2")
    crew = _Crew()
    with crew.signals():
        for index, ending in enumerate((first, "time.sleep(60)")):
            command = [sys.executable, "-c", f"import sys, time; time.sleep(0.5); {ending}"]
            crew.start(index, command, dict(os.environ))
        if stop is not None:
            os.kill(crew.processes[stop].pid, signal.SIGSTOP)
        assert crew.wait() == code
    assert said in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
@pytest.mark.parametrize("seconds", [0.0, 1.0])  # before the workers know of it, and after
def test_a_killed_launcher_takes_its_workers_along(dataset, tmp_path, seconds):
    job = Job(dataset, tmp_path / "out")
    deadline = time.monotonic() + 60
    while len(workers := job.workers()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(seconds)
    job.process.kill()
    job.process.communicate()
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_one_worker_says_the_other_says_too(dataset, tmp_path):
    """Its own copy of the data is damaged; the other would know only of a broken connection."""
    shutil.copytree(dataset, tmp_path / "damaged")
    data = bytearray((tmp_path / "damaged" / "train.bin").read_bytes())
    data[100] ^= 1
    (tmp_path / "damaged" / "train.bin").write_bytes(data)
    children = []
    for environment, folder in zip(
        worker_environments(2, os.environ), (dataset, tmp_path / "damaged"), strict=True
    ):
        command = [sys.executable, "-m", "tf_gptopt", *TRAIN.split()]
        command += ["--dataset", str(folder), "--out", str(tmp_path / "out")]
        children.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [2, 2], errors
    sentence = f"{tmp_path}/damaged/train.bin is damaged or belongs to another dataset"
    assert f"tf-gptopt: error: {sentence}" in errors[1]
    assert f"tf-gptopt: error: Worker 1 has ended: {sentence}" in errors[0]


STEPS = 120
TRAIN = (
    "train --model.embedding_dim 16 --model.num_layers 1 --model.num_heads 2 --model.dropout 0.1 "
    f"--fit.steps {STEPS} --fit.batch_size 4 --fit.checkpoint_every 1e-9 --fit.precision float32"
)


class Job:
    """`tf-gptopt launch` over two workers."""

    def __init__(self, dataset, out):
        self.out = out
        options = [*TRAIN.split(), "--dataset", str(dataset), "--out", str(out)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tf_gptopt", "launch", "--workers", "2", "--", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def workers(self):
        """Process numbers of worker 0 and worker 1: the launcher starts them in this order."""
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return sorted(map(int, listed.stdout.split()))

    def steps(self):
        found = (path.name for path in (self.out / "checkpoints").glob("step-*"))
        return sorted(int(name.removeprefix("step-")) for name in found)

    def wait_for_a_step_after(self, step, timeout=120):
        deadline = time.monotonic() + timeout
        while max(self.steps(), default=0) <= step:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, timeout=120):
        output, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, output, errors


def damage(folder):
    """Flip a byte in the midst of a checkpoint's numbers."""
    (data,) = folder.glob("checkpoint.data-*")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    data.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tiny_tokenizer):
    dataset = tmp_path_factory.mktemp("data") / "dataset"
    texts = [f"def f{i}(x):\n    return {i} * x + {i * i}\n" * 9 for i in range(60)]
    write_dataset(
        [Document(str(i), text) for i, text in enumerate(texts)], tiny_tokenizer, dataset, 16
    )
    tiny_tokenizer.save(dataset)
    return dataset


def test_a_cluster_goes_on_from_anything(tmp_path, dataset):
    undisturbed = Job(dataset, tmp_path / "undisturbed")
    code, output, errors = undisturbed.end()
    assert code == 0, errors
    assert "[worker 0]" in output
    assert f"step {STEPS}/{STEPS}" in output
    assert "[worker 1]" not in output + errors  # it has nothing to say
    chance = random.Random()
    out = tmp_path / "disturbed"

    job = Job(dataset, out)  # a worker is killed at a random step
    job.wait_for_a_step_after(0)
    time.sleep(chance.random())
    os.kill(job.workers()[1], signal.SIGKILL)
    killed = time.monotonic()
    code, output, errors = job.end()
    assert code == 128 + signal.SIGKILL, errors
    assert time.monotonic() - killed < 45
    assert "Worker 1 was killed by SIGKILL" in errors
    assert "[worker 0] tf-gptopt: error: Worker 1 (127.0.0.1:" in errors
    assert "same command" in errors
    assert "Traceback" not in errors
    assert not (out / "metrics.json").exists()

    steps = job.steps()
    assert steps[-1] < STEPS
    if len(steps) > 1:  # the newest checkpoint is damaged
        damage(out / "checkpoints" / f"step-{steps[-1]:08d}")
    job = Job(dataset, out)
    job.wait_for_a_step_after(steps[-1])
    if len(steps) > 1:
        assert (out / "checkpoints" / f"damaged-{steps[-1]:08d}").exists()
    if chance.random() < 0.5:
        number = signal.SIGTERM  # one worker is preempted
        os.kill(job.workers()[1], number)
    else:
        number = signal.SIGINT  # Ctrl-C
        job.process.send_signal(number)
    code, output, errors = job.end()
    assert code == 128 + number, errors
    assert "Traceback" not in errors
    assert f"Stopped after step {job.steps()[-1]} of {STEPS}" in errors

    code, output, errors = Job(dataset, out).end()
    assert code == 0, errors
    for name in ("model.safetensors", "config.json"):
        whole = (tmp_path / "undisturbed" / name).read_bytes()
        assert (out / name).read_bytes() == whole, name
    losses = [
        json.loads((run / "metrics.json").read_text())["loss"] for run in (out, undisturbed.out)
    ]
    assert losses[0] == losses[1]
    left = {path.name for path in out.iterdir()} - {path.name for path in undisturbed.out.iterdir()}
    assert not left
