"""Model FLOPs and peaks, scalars for TensorBoard, and a trace with its summary."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.pruning.pruner import prune
from tf_gptopt.compression.quantization.qat import quantize_aware
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.recipes.console import Console
from tf_gptopt.training import flops
from tf_gptopt.training.callbacks import Progress, ProgressLine
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.monitoring import Monitor
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.parallel.mesh import Mesh
from tf_gptopt.training.parallel.tensor import shard
from tf_gptopt.training.profile import Profile, operations, summarize
from tf_gptopt.training.trainer import fit


class Counting:
    sequence_length = 8

    def batches(self, split, batch_size, seed=0, start_step=0):
        ids = (np.arange(batch_size)[:, None] * 5 + np.arange(9)) % 29
        return tf.data.Dataset.from_tensors((ids[:, :-1], ids[:, 1:])).repeat()


def build(**options):
    shape = {"vocab_size": 29, "embedding_dim": 16, "num_layers": 1, "num_heads": 2}
    return GPTModel(**{**shape, "max_sequence_length": 8, **options})


# FLOPs


def test_flops_are_those_of_the_paper():
    model = GPTModel.from_preset("tiny")
    config, length = model.config, 64
    width = config.embedding_dim
    matrices = 12 * width**2 * config.num_layers + config.vocab_size * width
    heads = width * config.num_layers
    expected = 6 * matrices + 12 * heads * length
    assert flops.training_flops(model, length) == expected
    biases = model.count_params() - matrices - config.max_sequence_length * width
    assert 0 < biases < 0.02 * matrices  # and nothing else is left out


def test_flops_follow_each_blocks_shape_and_wrappers_change_nothing():
    tied = build(num_layers=2, num_heads=(2, 1), head_dim=8, intermediate_dim=(20, 40))
    blocks = 16 * (48 + 16 + 20 + 20) + 16 * (24 + 8 + 40 + 40)
    expected = 6 * (blocks + 29 * 16) + 12 * (16 + 8) * 8
    assert flops.training_flops(tied, 8) == expected
    assert flops.training_flops(shard(tied, Mesh.parse("batch=1")), 8) == expected
    untied = build(tie_embeddings=False)
    assert flops.training_flops(untied, 8) == flops.training_flops(build(), 8)
    for wrapped in (prune(untied), quantize_aware(untied)):
        assert flops.training_flops(wrapped, 8) == flops.training_flops(untied, 8)


def test_a_teacher_adds_its_forward_pass():
    student, teacher = build(), build(num_layers=3)
    both = flops.training_flops(Distiller(student=student, teacher=teacher), 8)
    alone, third = flops.training_flops(student, 8), flops.training_flops(teacher, 8) / 3
    assert both == pytest.approx(alone + third)
    never_run = Distiller(student=student, teacher=teacher, alpha=0.0)
    assert flops.training_flops(never_run, 8) == alone


def test_the_peak_is_measured_once_and_is_above_what_products_reach():
    peak, why = flops.model_peak(build(), "float32")
    assert "GFLOP/s in float32, measured on this CPU" in why
    assert flops.model_peak(build(), "float32")[0] == peak
    assert 1e9 < peak < 1e14


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "float16", 756e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("Tesla V100-SXM2-16GB", "float16", 125e12),
        ("Tesla T4", "float16", 65e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", None),
        ("Tesla T4", "bfloat16", None),
        ("NVIDIA H200", "float32", None),
    ],
)
def test_listed_gpus(name, dtype, peak):
    assert flops.listed_gpu_peak(name, dtype) == peak


# What is shown


def test_both_printers_show_it(capsys):
    report = Progress(120, 600, 4.1234, 2410.4, 65.0, 1e-3, 0.712, "141 GFLOP/s in float32")
    ProgressLine()(report)
    printed = capsys.readouterr().err
    assert "MFU 100% is 141 GFLOP/s in float32\n" in printed
    assert "step 120/600  loss 4.1234  2,410 tokens/s  MFU 71%  1:05 left" in printed
    console = Console()
    console._last_line = -100.0
    for _ in range(2):
        console.step(report)
    printed = capsys.readouterr().out
    assert printed.count("MFU 100% is 141 GFLOP/s") == 1
    assert "step 120/600  loss 4.1234  2,410 tokens/s  MFU 71%  1:05 left" in printed
    grown = dataclasses.replace(
        report, skipped=2, loss_scale=512.0, batch_size=16, gradient_noise_scale=23.4
    )
    console._last_line = -100.0
    console.step(grown)
    ProgressLine()(grown)
    for printed in capsys.readouterr():
        assert "MFU 71%  batch 16  noise scale 23.4  2 skipped  loss scale 512  1:05" in printed
    ProgressLine()(dataclasses.replace(report, mfu=None))
    assert "MFU" not in capsys.readouterr().err


def scalars(folder):
    """`{tag: {step: value}}` of all event files."""
    found = {}
    for path in sorted(folder.glob("events.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    return found


CONFIG = TrainConfig(
    steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=2, log_every=4, tensorboard=True
)


def test_fit_writes_what_it_reports_and_traces(tmp_path, capsys):
    reports = []
    config = dataclasses.replace(CONFIG, profile=True)
    fit(build(), Counting(), config, tmp_path / "checkpoints", [], reports.append)
    assert "MatMul" in (tmp_path / "profile" / "summary.txt").read_text()
    assert "5 steps of" in capsys.readouterr().err
    found = scalars(tmp_path / "tensorboard")
    for tag, field in (("loss", "loss"), ("learning_rate", "learning_rate"), ("mfu", "mfu")):
        expected = {report.step: getattr(report, field) for report in reports}
        assert found[tag] == pytest.approx(expected, rel=1e-5)
    assert reports[-1].learning_rate == pytest.approx(1e-3)
    assert sorted(found["tokens_per_second"]) == [4, 8, 12]
    assert 0 < reports[-1].mfu <= 1
    # neither changes the result: the finished run is taken up with both left out
    plain = dataclasses.replace(config, profile=False, tensorboard=False)
    assert fit(build(), Counting(), plain, tmp_path / "checkpoints")["steps"] == 12
    with pytest.raises(UserError, match="checkpoint_dir"):
        fit(build(), Counting(), CONFIG)


def test_in_a_fit_of_your_own(tmp_path):
    keras.mixed_precision.set_global_policy("mixed_float16")
    model = build()
    model.compile(adamw(steps=40), loss=NextTokenLoss())
    data = Counting().batches("train", 4)
    said = []
    profile = Profile(tmp_path / "trace", start=2, steps=3, on_summary=said.append)
    monitor = Monitor(tmp_path / "logs", batch_shape=(4, 8), every=3)
    for epochs in (1, 2):  # a second fit draws on
        model.fit(
            data, steps_per_epoch=7, initial_epoch=epochs - 1, epochs=epochs, verbose=0,
            callbacks=[monitor, profile],
        )  # fmt: skip
    found = scalars(tmp_path / "logs")
    assert sorted(found["loss"]) == [3, 6, 10, 13]
    assert set(found) >= {"learning_rate", "tokens_per_second", "mfu", "loss_scale"}
    assert found["loss_scale"][3] == 2.0**15
    assert all(0 < value <= 1 for value in found["mfu"].values())
    assert said
    assert said[0].startswith("3 steps of")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        model.fit(
            data, steps_per_epoch=4, verbose=0, callbacks=[Monitor(tmp_path / "file", None, 2)]
        )


# Traces


def trace(plane_name, events):
    """An XSpace of one plane and one thread; events are (name, display name, begin, end, stats)."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    plane = space.planes.add(name=plane_name)
    line = plane.lines.add()
    for number, (name, display, begin, end, stats) in enumerate(events, 1):
        plane.event_metadata[number].name = name
        plane.event_metadata[number].display_name = display
        event = line.events.add(metadata_id=number, offset_ps=begin, duration_ps=end - begin)
        for key, text in stats.items():
            stat = 100 + len(plane.stat_metadata)
            plane.stat_metadata[stat].name = key
            event.stats.add(metadata_id=stat, str_value=text)
    return space


def times(space):
    return {
        row.kind: (round(row.seconds * 1e12), row.calls, row.dearest) for row in operations(space)
    }


def test_own_time_excludes_what_runs_inside():
    island = {"hlo_module": "a_inference__gelu_1164__.1", "hlo_op": "fusion"}
    events = [
        ("Process", "", 0, 1000, {}),
        ("a/while:While", "While", 0, 600, {}),
        ("a/while/m:MatMul", "MatMul", 100, 200, {}),
        ("a/while/n:MatMul", "MatMul", 200, 500, {}),
        ("fusion", "", 700, 750, island),
        ("Iterator::Root::Prefetch", "Iterator::Prefetch", 800, 900, {}),
    ]
    assert times(trace("/host:CPU", events)) == {
        "MatMul": (400, 2, "a/while/n"),
        "While": (200, 1, "a/while"),
        "XLA gelu": (50, 1, "fusion"),
    }


def test_kernels_of_an_accelerator_count_under_their_operation():
    events = [
        ("sm90_gemm", "", 0, 70, {"tf_op": "gpt/block_0_qkv/MatMul:MatMul"}),
        ("memcpy", "", 80, 90, {}),
    ]
    assert times(trace("/device:GPU:0", events)) == {
        "MatMul": (70, 1, "gpt/block_0_qkv/MatMul"),
        "memcpy": (10, 1, "memcpy"),
    }


def test_without_a_trace_it_says_so(tmp_path):
    with pytest.raises(UserError, match="no trace in"):
        summarize(tmp_path, 1, 1.0)


def test_a_second_profiler_is_refused(tmp_path):
    model = build()
    model.compile(adamw(steps=40), loss=NextTokenLoss())
    tf.profiler.experimental.start(str(tmp_path / "first"))
    try:
        with pytest.raises(UserError, match="there can be one"):
            model.fit(
                Counting().batches("train", 4), steps_per_epoch=3, verbose=0,
                callbacks=[Profile(tmp_path / "second", start=1)],
            )  # fmt: skip
    finally:
        tf.profiler.experimental.stop(save=False)


def test_utilisation_is_never_more_than_all(tiny_model):
    """A peak that a short measurement put too low gives way to what was reached."""
    from tf_gptopt.training.flops import Utilisation

    share = Utilisation(tiny_model(), 32, "float32")
    rate = share.peak / share.flops  # tokens/s that would take all of it
    assert share(rate / 2) == pytest.approx(0.5)
    assert share(3 * rate) == 1.0
    said = share.why
    assert said.startswith("the most reached in this training, more than the ")
    assert share(4 * rate) == 1.0
    assert share.why == said  # said once, not again whenever it goes a little faster
    assert share(rate) == pytest.approx(1 / 4)
