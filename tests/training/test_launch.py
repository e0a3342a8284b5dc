"""`tf-gptopt launch`: a job of real processes, interrupted in every way, ends as if nothing had
happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.cli import main
from tf_gptopt.data.corpus import Document
from tf_gptopt.data.packing import write_dataset
from tf_gptopt.training.launch import free_ports, launch, worker_environments


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


def test_a_cluster_goes_on_from_anything(tmp_path, tiny_tokenizer):
    dataset = tmp_path / "dataset"
    texts = [f"def f{i}(x):\n    return {i} * x + {i * i}\n" * 9 for i in range(60)]
    write_dataset(
        [Document(str(i), text) for i, text in enumerate(texts)], tiny_tokenizer, dataset, 16
    )
    tiny_tokenizer.save(dataset)
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
