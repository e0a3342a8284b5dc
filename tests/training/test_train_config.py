"""TrainConfig's checks, and the two choices: strategy and precision."""

import json
import subprocess
import sys

import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt.training import precision
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.precision import choose_precision
from tf_gptopt.training.strategy import choose_strategy


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"sequence_length": -1}, "sequence_length=-1"),
        ({"steps": 10, "warmup_steps": 10}, "warmup_steps=10, steps=10"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"precision": "bfloat16"}, "mixed_bfloat16"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"final_learning_rate": 2}, "final_learning_rate=2"),
        ({"beta_2": 1.0}, "beta_2=1.0"),
        ({"checkpoint_every": -3}, "checkpoint_every=-3"),
    ],
)
def test_a_wrong_number_is_named(wrong, said):
    with pytest.raises(UserError, match=said):
        TrainConfig(**wrong)


def test_the_default_warm_up_follows_the_steps():
    assert TrainConfig(steps=200).warmup == 10
    assert TrainConfig(steps=1).warmup == 0
    assert TrainConfig(**TrainConfig(steps=7, clip_norm=None).to_dict()) == TrainConfig(
        steps=7, clip_norm=None
    )


def test_the_config_needs_no_tensorflow():
    code = "import sys, tf_gptopt.training.config; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Strategies


def test_one_device_gets_plain_keras(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    strategy, why = choose_strategy()
    assert strategy is tf.distribute.get_strategy()
    assert "one device" in why


def test_tf_config_with_one_worker_is_no_cluster(monkeypatch):
    config = {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert choose_strategy()[0] is tf.distribute.get_strategy()


def test_mirrored_on_request(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    strategy, why = choose_strategy("mirrored")
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    assert "replica" in why


GOOD = {"worker": ["a:1", "b:1"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "no cluster"),
        ("{}", "no cluster"),
        (json.dumps({"cluster": {"worker": "a:1"}}), "list of host:port"),
        (json.dumps({"cluster": {"worker": ["a"]}}), "list of host:port"),
        (json.dumps({"cluster": {"ps": ["a:1"]}}), "'ps'"),
        (json.dumps({"cluster": GOOD}), "needs a task"),
        (json.dumps({"cluster": GOOD, "task": {"type": "chief", "index": 0}}), "needs a task"),
        (json.dumps({"cluster": GOOD, "task": {"type": "worker", "index": 2}}), "from 0 to 1"),
        (json.dumps({"cluster": GOOD, "task": {"type": "worker", "index": "0"}}), "from 0 to 1"),
    ],
)
def test_a_malformed_tf_config_is_explained(monkeypatch, text, said):
    monkeypatch.setenv("TF_CONFIG", text)
    for name in ("auto", "multi_worker"):
        with pytest.raises(UserError, match=said):
            choose_strategy(name)


def test_unknown_and_impossible_strategies(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(UserError, match="Did you mean 'mirrored'"):
        choose_strategy("miror")
    with pytest.raises(UserError, match="TF_CONFIG"):
        choose_strategy("multi_worker")


# Precision


def test_precision_follows_the_cpu(monkeypatch):
    monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx512f", "avx512_vnni"})
    assert choose_precision() == ("float32", "this CPU has no bfloat16 units")
    policy, why = choose_precision("mixed_bfloat16")
    assert policy == "mixed_bfloat16"
    assert "float32 would be faster" in why
    monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx512f", "amx_bf16"})
    policy, why = choose_precision("auto")
    assert policy == "mixed_bfloat16"
    assert "amx_bf16" in why


@pytest.mark.parametrize(
    ("capability", "policy"),
    [((9, 0), "mixed_bfloat16"), ((7, 5), "mixed_float16"), ((6, 1), "float32")],
)
def test_precision_follows_the_gpu(monkeypatch, capability, policy):
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind: ["gpu"] if kind == "GPU" else []
    )
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda gpu: {"compute_capability": capability}
    )
    chosen, why = choose_precision()
    assert chosen == policy
    assert f"{capability[0]}.{capability[1]}" in why


def test_an_unknown_precision_is_named():
    with pytest.raises(UserError, match="mixed_float16"):
        choose_precision("mixed_float32")


def test_cpu_flags_are_read():
    assert isinstance(precision.cpu_flags(), set)


def test_recompute_reaches_the_student_and_refuses_a_mesh(tiny_model):
    from tf_gptopt.compression.distillation.distiller import Distiller
    from tf_gptopt.training import trainer

    student = tiny_model()
    trainer._recompute(Distiller(student=student, teacher=tiny_model()))
    assert student.recompute
    with pytest.raises(UserError, match="pipeline instead"):
        TrainConfig(mesh="batch=1,model=2", recompute=True)
