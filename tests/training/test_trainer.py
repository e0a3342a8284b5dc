"""fit: an ordinary run, what it refuses, what it says, Ctrl-C, divergence and damaged files."""

import dataclasses
import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.trainer import fit


class Counting:
    """Sequences that count upwards: easy to learn, and a function of (seed, step)."""

    sequence_length = 12

    def __init__(self, vocab_size=29):
        self.vocab_size = vocab_size

    def batches(self, split, batch_size, seed=0, start_step=0):
        def batch(step):
            start = tf.random.stateless_uniform(
                [batch_size, 1], [seed, step], maxval=self.vocab_size, dtype=tf.int32
            )
            ids = (start + tf.range(self.sequence_length + 1)) % self.vocab_size
            return ids[:, :-1], ids[:, 1:]

        return tf.data.Dataset.range(start_step, 2**40).map(batch)


def build(seed=0, **options):
    keras.utils.set_random_seed(seed)
    shape = {"vocab_size": 29, "embedding_dim": 16, "num_layers": 1, "num_heads": 2}
    return GPTModel(**{**shape, "max_sequence_length": 12, "dropout": 0.1, **options})


def quiet(report):
    pass


def same_weights(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.get_weights(), b.get_weights(), strict=True))


CONFIG = TrainConfig(steps=30, batch_size=4, learning_rate=1e-2, log_every=5, checkpoint_every=1e-9)


class At(keras.callbacks.Callback):
    """Does something once, after a step of the process."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action = step, action

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.step:
            self.action(self.model)


def interrupt(model):
    os.kill(os.getpid(), signal.SIGINT)


def test_it_learns_and_reports(capsys):
    reports = []
    model = build()
    config = dataclasses.replace(CONFIG, steps=80)
    metrics = fit(model, Counting(), config, None, [], reports.append)
    assert [report.step for report in reports] == list(range(5, 81, 5))
    assert metrics["steps"] == 80
    assert metrics["tokens"] == 80 * 4 * 12
    assert metrics["loss"] == reports[-1].loss < 0.5 * reports[0].loss
    assert reports[-1].seconds_left == 0
    assert reports[-1].tokens_per_second == metrics["tokens_per_second"] > 0
    assert metrics["seconds"] > 0
    assert capsys.readouterr().err == ""


def test_without_a_callback_it_prints_where_it_is(capsys):
    fit(build(), Counting(), CONFIG)
    assert "step 30/30  loss " in capsys.readouterr().err


def test_a_compiled_model_keeps_its_optimizer_and_its_callbacks():
    model = build()
    optimizer = keras.optimizers.SGD(0.1)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    seen = []
    fit(model, Counting(), CONFIG, None, [At(3, lambda model: seen.append(model))], quiet)
    assert model.optimizer is optimizer
    assert int(optimizer.iterations) == 30
    assert seen == [model]


def test_steps_per_execution_end_in_the_same_place():
    one, ten = build(), build()
    ten.compile(*optimizer_and_loss(), steps_per_execution=10)
    reports = []
    metrics = fit(one, Counting(), CONFIG, None, [], quiet)
    other = fit(ten, Counting(), CONFIG, None, [], reports.append)
    assert [report.step for report in reports] == [10, 20, 30]
    assert same_weights(one, ten)
    assert other["loss"] == pytest.approx(metrics["loss"], rel=0.05)


def optimizer_and_loss():
    from tf_gptopt.training.loss import NextTokenLoss
    from tf_gptopt.training.optimizer import optimizer_for

    return optimizer_for(CONFIG), NextTokenLoss()


# Going on


def test_ctrl_c_saves_and_the_same_call_goes_on(tmp_path, capsys):
    whole = build()
    expected = fit(whole, Counting(), CONFIG, None, [], quiet)
    handler = signal.getsignal(signal.SIGINT)
    folder = tmp_path / "checkpoints"
    with pytest.raises(KeyboardInterrupt):
        fit(build(), Counting(), CONFIG, folder, [At(13, interrupt)], quiet)
    assert (
        f"Stopped after step 13 of 30. The same call goes on from the checkpoint in {folder}"
        in (capsys.readouterr().err)
    )
    assert signal.getsignal(signal.SIGINT) is handler
    model = build(seed=5)  # its weights and dropout states are the checkpoint's
    metrics = fit(model, Counting(), CONFIG, folder, [], quiet)
    assert same_weights(model, whole)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-2)  # a report more
    assert metrics["tokens"] == expected["tokens"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "run.json",
        "step-00000025",
        "step-00000030",
    ]


def test_a_finished_run_is_only_read_again(tmp_path):
    first, second = build(), build(seed=3)
    metrics = fit(first, Counting(), CONFIG, tmp_path, [], quiet)
    trained = []
    again = fit(second, Counting(), CONFIG, tmp_path, [At(1, trained.append)], quiet)
    assert again == metrics
    assert not trained
    assert same_weights(first, second)


@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_a_damaged_checkpoint_gives_way_to_the_older_one(tmp_path, harm):
    whole = build()
    fit(whole, Counting(), CONFIG, tmp_path, [], quiet)
    data = next((tmp_path / "step-00000030").glob("*.data*"))
    if harm == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif harm == "cut":
        os.truncate(data, data.stat().st_size // 2)
    else:
        data.unlink()
    model, trained = build(seed=3), []
    fit(model, Counting(), CONFIG, tmp_path, [At(1, trained.append)], quiet)
    assert trained  # from step 25
    assert same_weights(model, whole)


def test_if_all_are_damaged_it_says_so(tmp_path):
    fit(build(), Counting(), CONFIG, tmp_path, [], quiet)
    for path in tmp_path.glob("step-*/*.index"):
        path.write_bytes(b"")
    for _ in range(2):  # and the next call does not start over, as if nothing had been there
        with pytest.raises(UserError, match="are damaged"):
            fit(build(), Counting(), CONFIG, tmp_path, [], quiet)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    fit(build(), Counting(), CONFIG, tmp_path, [], quiet)
    other = dataclasses.replace(CONFIG, seed=7, log_every=3)
    with pytest.raises(UserError, match="seed was 0 and is 7"):
        fit(build(), Counting(), other, tmp_path, [], quiet)
    with pytest.raises(UserError, match="parameters was"):
        fit(build(num_layers=2), Counting(), CONFIG, tmp_path, [], quiet)
    same_size = build()
    same_size.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(
        UserError, match=r"loss\.class was 'NextTokenLoss' and is 'SparseCat.*AdamW"
    ):
        fit(same_size, Counting(), CONFIG, tmp_path, [], quiet)


def compiled(optimizer, loss=None, **options):
    model = build(**options)
    model.compile(optimizer, loss or NextTokenLoss())
    return model


def same_adamw(**changes):
    """What `fit` makes of CONFIG, but for the changes."""
    return adamw(**{"steps": 30, "learning_rate": 1e-2, **changes})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: build(dropout=0.3), r"model\.dropout was 0\.1 and is 0\.3"),
        (lambda: build(layer_norm_epsilon=1e-3), r"model\.layer_norm_epsilon was 1e-05"),
        (lambda: build(num_heads=4), r"model\.head_dim was 8 and is 4, model\.num_heads was 2"),
        (lambda: compiled(same_adamw(epsilon=1e-5)), r"optimizer\.epsilon was 1e-08 and is 1e-05"),
        (lambda: compiled(same_adamw(learning_rate=1.0)), r"learning_rate\.peak was 0\.01"),
        (lambda: compiled(same_adamw(clip_norm=None)), r"global_clipnorm was 1\.0 and is None"),
        (lambda: compiled(same_adamw(), NextTokenLoss(ignore_label=7)), r"loss\.ignore_label was"),
        (lambda: compiled(keras.optimizers.Adam(1e-2)), r"optimizer\.class was 'AdamW'"),
    ],
)
def test_what_a_run_goes_on_with_is_compared_whole(begun, tmp_path, make, said):
    shutil.copytree(begun, tmp_path / "run")
    with pytest.raises(UserError, match=said):
        fit(make(), Counting(), CONFIG, tmp_path / "run", [], quiet)


def test_what_makes_no_difference_does_not_stop_a_run(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    fit(compiled(same_adamw()), Counting(), CONFIG, tmp_path / "run", [], quiet)
    described = tmp_path / "run" / "run.json"  # of an earlier version, which knew less
    known = json.loads(described.read_text())
    less = {key: value for key, value in known.items() if "." not in key and key != "sha256"}
    assert len(less) < len(known) - 20
    described.write_text(json.dumps(less))
    fit(build(dropout=0.3), Counting(), CONFIG, tmp_path / "run", [], quiet)
    described.write_text(json.dumps({**known, "model.dropout": 0.3}))
    with pytest.raises(UserError, match=r"run\.json has been damaged"):
        fit(build(dropout=0.3), Counting(), CONFIG, tmp_path / "run", [], quiet)
    for text in ("[]", "null"):
        described.write_text(text)
        with pytest.raises(UserError, match="must hold a JSON object"):
            fit(build(), Counting(), CONFIG, tmp_path / "run", [], quiet)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Checkpoints of a run that has ended."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    fit(build(), Counting(), CONFIG, folder, [], quiet)
    return folder


def test_a_checkpoint_being_written_is_no_checkpoint(tmp_path):
    fit(build(), Counting(), CONFIG, tmp_path, [], quiet)
    shutil.rmtree(tmp_path / "step-00000030")
    (tmp_path / ".writing-killed").mkdir()
    model = build(seed=4)
    fit(model, Counting(), CONFIG, tmp_path, [], quiet)
    assert not list(tmp_path.glob(".writing-*"))


# What goes wrong


def test_divergence_stops_the_run_and_spares_the_checkpoint(tmp_path):
    def poison(model):
        weight = model.trainable_variables[3]
        weight.assign(weight * np.nan)

    with pytest.raises(UserError, match=r"loss is nan at step 25.*Lower learning_rate"):
        fit(build(), Counting(), CONFIG, tmp_path, [At(12, poison)], quiet)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000005",
        "step-00000010",
    ]


def test_weights_that_broke_in_the_last_step_are_not_saved(tmp_path):
    def poison(model):
        weight = model.trainable_variables[3]
        weight.assign(weight * np.inf)

    with pytest.raises(UserError, match="Weights are NaN or infinite at step 30"):
        fit(build(), Counting(), CONFIG, tmp_path, [At(30, poison)], quiet)
    assert not (tmp_path / "step-00000030").exists()


@pytest.mark.parametrize(
    ("model", "dataset", "changes", "said"),
    [
        ({}, {}, {"sequence_length": 8}, "sequence_length=8"),
        ({"max_sequence_length": 8}, {}, {}, "context is 8"),
        ({}, {}, {"precision": "mixed_bfloat16"}, "set_global_policy"),
    ],
)
def test_what_does_not_fit_together_is_said_beforehand(model, dataset, changes, said):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match=said):
        fit(build(**model), Counting(**dataset), config, None, [], quiet)


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        fit(build(), Counting(), CONFIG, tmp_path / "file" / "checkpoints", [], quiet)


def test_something_else_than_a_model_is_turned_away():
    with pytest.raises(UserError, match="tf_keras model"):
        fit("gpt", Counting(), CONFIG)


def test_a_full_disk_is_said_and_the_checkpoints_stay(tmp_path):
    """A limit on the size of files fails as a full disk does: in the middle of writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(model):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    try:
        with pytest.raises(
            UserError, match=r"step 15 could not be written to \S+ \(File too large\)\. Free"
        ):
            fit(build(), Counting(), CONFIG, tmp_path, [At(12, fill)], quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run.json",
        "step-00000005",
        "step-00000010",
    ]


def test_the_whole_step_may_be_compiled_too():
    plain, compiled = build(dropout=0.0), build(dropout=0.0)
    compiled.compile(*optimizer_and_loss(), jit_compile=True)
    losses = [
        fit(model, Counting(), CONFIG, None, [], quiet)["loss"] for model in (plain, compiled)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
