"""Where a cluster is found in the environment, and how its workers meet: in bounded time."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from tf_gptopt._errors import UserError
from tf_gptopt.training import last_words
from tf_gptopt.training.cluster import Cluster, find_cluster, leads
from tf_gptopt.training.launch import free_ports
from tf_gptopt.training.meeting import meet
from tf_gptopt.training.strategy import applicable, tpu_address

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "cluster"


def tf_config(task="worker", index=0, **jobs):
    return {"TF_CONFIG": json.dumps({"cluster": jobs, "task": {"type": task, "index": index}})}


def slurm(rank, nodes="n[1-2,10]", tasks="2,1(x2)", **more):
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_JOB_ID": "77",
        **more,
    }


def kubernetes(index, **more):
    return {
        "JOB_COMPLETION_INDEX": str(index),
        "TF_GPTOPT_NUM_WORKERS": "3",
        "TF_GPTOPT_WORKER_ADDRESS": "gpt-worker-0-{index}.gpt:2222",
        **more,
    }


# What the environment says


def test_no_cluster():
    assert find_cluster({}) is None
    assert leads({})
    assert applicable({}) == "default"
    assert applicable({}, gpus=1) == "default"
    assert applicable({}, gpus=2) == "mirrored"


def test_tpus_come_first():
    assert applicable({"TPU_NAME": "local"}, gpus=8) == "tpu"
    assert applicable({"COLAB_TPU_ADDR": "10.0.0.2:8470"}) == "tpu"
    assert applicable({}, tpus=1) == "tpu"
    assert tpu_address({"TPU_NAME": "node-1"}) == "node-1"
    assert tpu_address({"COLAB_TPU_ADDR": "10.0.0.2:8470"}) == "grpc://10.0.0.2:8470"
    assert tpu_address({}) is None


def test_tf_config_counts_a_chief_as_the_first_worker():
    found = find_cluster(tf_config(index=1, worker=["a:1", "b:1"]))
    assert found == Cluster(("a:1", "b:1"), 1, "TF_CONFIG")
    jobs = {"chief": ["c:1"], "worker": ["a:1", "b:1"]}
    assert find_cluster(tf_config("chief", 0, **jobs)).is_chief
    assert find_cluster(tf_config("worker", 1, **jobs)).index == 2
    assert not leads(tf_config("worker", 0, **jobs))
    assert applicable(tf_config(**jobs), gpus=4) == "multi_worker"
    assert applicable(tf_config(worker=["a:1"]), gpus=4) == "mirrored"


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ({"worker": ["a:1", "a:1"]}, "twice"),
        ({"worker": ["a:99999", "b:1"]}, "list of host:port"),
        ({"chief": ["a:1", "b:1"], "worker": ["c:1"]}, "more than one chief"),
        ({"worker": ["a:1"], "evaluator": ["b:1"]}, "'evaluator'"),
    ],
)
def test_clusters_that_cannot_be(jobs, said):
    with pytest.raises(UserError, match=said):
        find_cluster(tf_config(**jobs))


def test_slurm_counts_hosts_as_slurm_does():
    port = 10_000 + 16 * 77
    workers = (f"n1:{port}", f"n1:{port + 1}", f"n2:{port}", f"n10:{port}")
    assert find_cluster(slurm(3)) == Cluster(workers, 3, "Slurm")
    assert applicable(slurm(0)) == "multi_worker"
    assert find_cluster(slurm(1, TF_GPTOPT_PORT="5000")).port == 5001
    assert find_cluster({**slurm(0), "SLURM_STEP_NUM_TASKS": "1"}) is None  # a plain sbatch step
    assert find_cluster({**slurm(0), **tf_config(worker=["a:1"])}).source == "TF_CONFIG"
    for wrong, said in (
        (slurm(3, SLURMD_NODENAME="n2"), "--distribution=block"),
        (slurm(9), "none of the 4"),
        (slurm(0, nodes="n[1-"), "cannot be read"),
        (slurm(0, TF_GPTOPT_PORT="x"), "TF_GPTOPT_PORT"),
    ):
        with pytest.raises(UserError, match=said):
            find_cluster(wrong)


def test_kubernetes_names_its_pods():
    found = find_cluster(kubernetes(2))
    assert found.source == "Kubernetes"
    assert found.index == 2
    assert found.workers[1] == "gpt-worker-0-1.gpt:2222"
    assert applicable(kubernetes(0)) == "multi_worker"
    assert find_cluster({"JOB_COMPLETION_INDEX": "3"}) is None  # an Indexed Job of another kind
    for wrong, said in (
        (kubernetes(3), "completions"),
        (kubernetes(0, TF_GPTOPT_WORKER_ADDRESS="gpt:2222"), "{index}"),
        (kubernetes(0, TF_GPTOPT_NUM_WORKERS="many"), "whole number"),
    ):
        with pytest.raises(UserError, match=said):
            find_cluster(wrong)


# Meeting


def gather(clusters, seconds=20.0):
    """What each of these processes, threads here, gets out of `meet`."""
    answers = [None] * len(clusters)

    def one(i, cluster):
        try:
            meet(cluster, seconds)
            answers[i] = "met"
        except UserError as error:
            answers[i] = str(error)

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(clusters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=seconds + 20)
    return answers


def addresses(count):
    return tuple(f"127.0.0.1:{port}" for port in free_ports(count))


def test_workers_meet():
    workers = addresses(3)
    assert gather([Cluster(workers, i, "") for i in (2, 0, 1)]) == ["met"] * 3
    assert gather([Cluster(workers, i, "") for i in range(3)]) == ["met"] * 3  # ports are free


def test_what_one_says_when_it_ends_all_hear(monkeypatch):
    workers, lines = addresses(3), {}
    met = last_words.Line.__init__

    def keep(line, index):
        met(line, index)
        lines[index] = line

    monkeypatch.setattr(last_words.Line, "__init__", keep)
    assert gather([Cluster(workers, i, "") for i in (2, 0, 1)]) == ["met"] * 3
    assert lines[0].heard(0) is None
    time.sleep(0.2)  # the chief takes the connections in the background
    lines[2].tell("The disk is full. " + "x" * 20_000)
    for index in (0, 1):  # the chief, and another through the chief
        who, sentence = lines[index].heard(10)
        assert who == 2
        assert sentence.startswith("The disk is full. ")
        assert len(sentence) == 10_000
    lines[1].tell("Worker 2 has ended")  # which is not news
    assert lines[0].heard(0)[0] == 2
    assert lines[2].heard(0.2) is None


def test_a_worker_that_never_comes_is_named_to_all():
    workers = addresses(3)
    began = time.monotonic()
    answers = gather([Cluster(workers, 0, ""), Cluster(workers, 1, "")], seconds=1.5)
    assert time.monotonic() - began < 10
    for answer in answers:
        assert f"have not come: 2 ({workers[2]})" in answer
        assert "TF_GPTOPT_WAIT_SECONDS" in answer
    (answer,) = gather([Cluster(workers, 1, "")], seconds=0.5)
    assert f"worker 0 does not answer at {workers[0]}" in answer


def test_a_port_in_use_is_named():
    workers = addresses(2)
    with socket.create_server(("", int(workers[1].rpartition(":")[2]))):
        (answer,) = gather([Cluster(workers, 1, "")])
    assert "Worker 1 cannot listen on port" in answer
    assert "Address already in use" in answer


def test_workers_that_disagree_are_told():
    workers = addresses(2)
    other = Cluster((workers[0], "127.0.0.1:1", workers[1]), 2, "")
    answers = gather([Cluster(workers, 0, ""), other])
    assert all("another cluster" in answer for answer in answers)


def test_one_that_comes_and_goes_leaves_nobody_hanging():
    """It meets and dies before TensorFlow's own start, which waits without an end."""
    workers = addresses(2)
    code = "from tf_gptopt.training.strategy import choose_strategy; choose_strategy()"
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parents[1]), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            **tf_config(worker=list(workers)),
            "PYTHONPATH": path,
            "TF_GPTOPT_WAIT_SECONDS": "4",
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        meet(Cluster(workers, 1, ""), 60)  # and nothing more
        met = time.monotonic()
        _, errors = child.communicate(timeout=60)
        assert time.monotonic() - met < 30
        assert child.returncode == -signal.SIGKILL, errors
        assert "not all workers have joined" in errors
    finally:
        child.kill()


# The templates


def command_of(words):
    """The options of the command after `tf-gptopt`, parsed as the command line does."""
    from tf_gptopt._options import Options
    from tf_gptopt.cli import COMMANDS
    from tf_gptopt.recipes.recipe import TrainSection

    at = words.index("tf-gptopt")
    name, *options = words[at + 1 :]
    assert name == "train"
    assert name in COMMANDS
    parser = Options(name, COMMANDS[name])
    for flag in ("--dataset", "--out"):
        parser.add(flag, required=True)
    parser.section(TrainSection)
    return parser.parse(options, TrainSection)


def test_the_slurm_script():
    script = EXAMPLES / "train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    (line,) = [line for line in lines if line.startswith("srun")]
    given, section = command_of(shlex.split(line))
    assert given.dataset
    assert section.fit.batch_size % 4 == 0
    (nodes,) = re.findall(r"#SBATCH --nodes=(\d+)", text)
    (per_node,) = re.findall(r"#SBATCH --ntasks-per-node=(\d+)", text)
    count = int(nodes) * int(per_node)
    environment = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NODELIST": f"gpu[01-{int(nodes):02d}]",
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})",
        "SLURM_JOB_ID": "1234",
    }
    assert len(find_cluster(environment).workers) == count
    assert applicable(environment) == "multi_worker"
    assert "--signal=TERM@" in text  # so that a checkpoint is written before the time is up
    assert "--kill-on-bad-exit" in line


def test_the_kubernetes_manifest():
    jobset, service = None, None
    for document in yaml.safe_load_all((EXAMPLES / "jobset.yaml").read_text()):
        if document["kind"] == "JobSet":
            jobset = document
    name = jobset["metadata"]["name"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    service = jobset["spec"]["network"]["subdomain"]
    (container,) = job["template"]["spec"]["containers"]
    given, _ = command_of(container["command"])
    assert given.out
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["TF_GPTOPT_NUM_WORKERS"] == str(job["completions"])
    found = find_cluster({**environment, "JOB_COMPLETION_INDEX": "1"})
    # the name that a JobSet gives the pod of job 0 with index 1
    port = container["ports"][0]["containerPort"]
    assert found.workers[1] == f"{name}-{replicated['name']}-0-1.{service}:{port}"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
