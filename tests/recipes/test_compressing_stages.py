"""The stages that compress, each on its own: rounds, one shot, budgets, and what a kill leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt._files import read_json
from tf_gptopt.compression.distillation.config import DistillConfig
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.grids import find_grid
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.recipe import Recipe
from tf_gptopt.recipes.runner import (
    find_stage,
    forget_other_key,
    run_recipe,
    run_stage,
    stage_key,
)
from tf_gptopt.recipes.sections import (
    CorpusSection,
    DatasetSection,
    DistillSection,
    EvaluateSection,
    ExportSection,
    ModelSection,
    PruneSection,
    QatSection,
    QuantizeSection,
    ShrinkSection,
    TokenizerSection,
    TrainSection,
)
from tf_gptopt.training.config import TrainConfig

QUIET = Console(quiet=True)
SHORT = TrainConfig(steps=6, batch_size=4, learning_rate=1e-3)
SAVING = dataclasses.replace(SHORT, steps=40, checkpoint_every=0.01, log_every=5)
MIXED = QuantConfig("int4", granularity="channel", layers={"token_embedding": "int8"})
SMALL = ShrinkConfig(parameters=0.6, neuron_multiple=4, width_multiple=4)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """A road of two rounds without pruning and training on a grid, on some of the project's own
    sources."""
    import tf_gptopt

    corpus = tmp_path_factory.mktemp("corpus")
    for i, path in enumerate(sorted(Path(tf_gptopt.__file__).parent.rglob("*.py"))[:30]):
        (corpus / f"{i:03}.py").write_text(path.read_text("utf-8"), "utf-8")
    return Recipe(
        name="rounds",
        corpus=CorpusSection((str(corpus),)),
        tokenizer=TokenizerSection(300),
        dataset=DatasetSection(16, 0.2),
        train=TrainSection(ModelSection(24, 1, 3), SHORT),
        distill=DistillSection(student=SMALL, rounds=2, calibration=8, fit=SAVING),
        prune=None,
        qat=None,
        quantize=QuantizeSection(MIXED),
        evaluate=EvaluateSection(tokens=512, speed_tokens=8, tolerance=10.0),
    )


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory) -> Path:
    """The folder of a whole run."""
    out = tmp_path_factory.mktemp("runs") / "done"
    run_recipe(recipe, out, QUIET)
    return out


@pytest.fixture
def stage(done, tmp_path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """`stage("prune", section)`: its folder and metrics; it reads the trained model."""

    def run(name: str, section: Any, out: Path | None = None, model: Path | None = None) -> Any:
        out = out or tmp_path / name
        source = "teacher_folder" if name == "distill" else "model_folder"
        inputs = {source: model or done / "train", "dataset_folder": done / "dataset"}
        return out, run_stage(find_stage(name), section, inputs, out, 0, QUIET)

    return run


def killed_when(moment: Callable[[], bool], done: Path, out: Path, *command: Any) -> None:
    """Start a command, and SIGKILL it as soon as `moment` has come."""
    words = [*command, "--dataset", done / "dataset", "--out", out]
    child = subprocess.Popen(
        [sys.executable, "-m", "tf_gptopt", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while child.poll() is None and not moment():
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    output, _ = child.communicate()
    assert child.returncode == -signal.SIGKILL, output
    assert not (out / "metrics.json").exists()


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def on_grid(folder: Path, layer: str, bits: int) -> bool:
    """Whether the layer's matrix lies on a grid of so many bits, a scale for each channel."""
    from safetensors.numpy import load_file

    (name,) = (n for n in load_file(folder / "model.safetensors") if f"{layer}/" in n
               and not n.endswith("bias"))  # fmt: skip
    matrix = load_file(folder / "model.safetensors")[name]
    return find_grid(matrix if "embed" in name else matrix.T, bits) is not None


def steps_saved(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob("step-*"))


def test_rounds_shrink_by_equal_shares_and_leave_every_student(done):
    metrics = json.loads((done / "distill" / "metrics.json").read_text())
    teacher = json.loads((done / "train" / "metrics.json").read_text())["parameters"]
    first, last = (one["parameters"] for one in metrics["rounds"])
    assert 0.6 * teacher > last > 0.5 * teacher
    assert 0.6**0.5 * teacher > first > 0.6 * teacher
    assert metrics["parameters"] == last
    from tf_gptopt.models.checkpoints import load_model

    assert load_model(done / "distill" / "round-1").count_params() == first
    assert load_model(done / "distill").count_params() == last
    assert not list((done / "distill").rglob("checkpoints"))


def test_stages_that_are_left_out(done):
    assert not (done / "prune").exists()
    assert not (done / "qat").exists()
    report = json.loads((done / "report.json").read_text())
    rows = {row["name"]: row["reference"] for row in report["rows"]}
    assert rows == {"train": None, "distill": "train", "quantize": "distill", "export": "distill"}
    sizes = {row["name"]: row["size"]["parameters"] for row in report["rows"]}
    assert sizes["distill"] < sizes["train"]


def test_the_file_holds_what_was_quantized(done):
    export = json.loads((done / "export" / "metrics.json").read_text())
    assert export["scheme"] == MIXED.name
    assert export["section"]["quantization"] == MIXED.to_dict()
    assert on_grid(done / "quantize", "block_0_out", 4)
    rows = {row["name"]: row for row in json.loads((done / "report.json").read_text())["rows"]}
    assert rows["export"]["loss"] == pytest.approx(rows["quantize"]["loss"], abs=0.02)
    assert rows["quantize"]["loss"] != rows["distill"]["loss"]


def test_killed_in_the_second_round(done, tmp_path, stage, recipe):
    out = tmp_path / "distill"
    options = {
        "student.parameters": 0.6, "student.neuron_multiple": 4, "student.width_multiple": 4,
        "rounds": 2, "calibration": 8, "steps": 40, "batch_size": 4, "checkpoint_every": 0.01,
        "log_every": 5,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    teacher = ["--teacher", done / "train"]
    killed_when(lambda: bool(steps_saved(out)), done, out, "distill", *teacher, *words)
    first = (out / "round-1" / "metrics.json").stat().st_mtime_ns
    _, metrics = stage("distill", recipe.distill, out)
    assert metrics["key"] == json.loads((done / "distill" / "metrics.json").read_text())["key"]
    assert (out / "round-1" / "metrics.json").stat().st_mtime_ns == first  # not trained again
    assert weights(out) == weights(done / "distill")
    assert weights(out / "round-1") == weights(done / "distill" / "round-1")


def test_killed_amid_adaptive_pruning_by_taylor(done, tmp_path, stage, capfd):
    pruning = PruneConfig(
        0.6, score="taylor", schedule="adaptive", frequency=6, end_step=30, refresh=5,
        tolerance=0.001, increment=0.2,
    )  # fmt: skip
    wild = dataclasses.replace(SAVING, learning_rate=5.0)  # so that rises have to be taken back
    section = PruneSection(pruning, calibration=8, fit=wild)
    undisturbed, metrics = stage("prune", section)
    assert "was too much" in capfd.readouterr().err
    out = tmp_path / "killed"
    options = {
        "pruning.sparsity": 0.6, "pruning.score": "taylor", "pruning.schedule": "adaptive",
        "pruning.frequency": 6, "pruning.end_step": 30, "pruning.refresh": 5,
        "pruning.tolerance": 0.001, "pruning.increment": 0.2, "calibration": 8, "steps": 40,
        "batch_size": 4, "checkpoint_every": 0.01, "log_every": 5, "learning_rate": 5.0,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]

    def amid() -> bool:
        return any(path.name >= "step-00000008" for path in steps_saved(out))

    killed_when(amid, done, out, "prune", "--model", done / "train", *words)
    _, again = stage("prune", section, out)
    assert again["key"] == metrics["key"]
    assert weights(out) == weights(undisturbed)
    assert again["sparsity"] == metrics["sparsity"]


def test_a_changed_stage_forgets_its_rounds(done, tmp_path):
    out = tmp_path / "distill"
    shutil.copytree(done / "distill", out)
    forget_other_key(out, read_json(out / "key.json"))
    assert (out / "round-1").exists()
    forget_other_key(out, "another")
    assert not (out / "round-1").exists()


def test_pruning_at_once_trains_nothing(stage):
    pruning = PruneConfig(score="wanda", pattern="2:4", end_step=100)
    out, metrics = stage("prune", PruneSection(pruning, calibration=4, one_shot=True))
    assert metrics["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert "loss" not in metrics
    assert weights(out)


def test_a_sparse_teacher_hands_its_zeros_down(stage):
    sparse, _ = stage("prune", PruneSection(PruneConfig(0.7), one_shot=True))
    section = DistillSection(layers=1, fit=SHORT)
    _, metrics = stage("distill", section, model=sparse)
    kernels = 12 * 24 * 24  # of the block that is left
    assert metrics["parameters"] - metrics["nonzero"] == pytest.approx(0.7 * kernels, rel=0.01)


def test_shrinking_alone(stage):
    out, metrics = stage("shrink", ShrinkSection(SMALL, calibration=4))
    assert weights(out)
    with pytest.raises(UserError, match=r"--target\.parameters"):
        ShrinkSection()
    assert metrics["parameters"] == metrics["nonzero"]


def test_students_of_several_teachers_and_of_logits_on_disk(done, stage):
    section = DistillSection(
        layers=1, teachers=(str(done / "distill"),), distillation=DistillConfig(top_k=5), fit=SHORT
    )
    out, metrics = stage("distill", section)
    assert metrics["loss"] > 0
    assert not (out / "checkpoints").exists()  # nor the logits in it
    keys = [
        stage_key("distill", dataclasses.replace(section, teachers=teachers), {}, 0)
        for teachers in ((), (str(done / "distill"),), (str(done / "distill" / "round-1"),))
    ]
    assert len(set(keys)) == 3


def test_rounds_towards_a_number_of_weights_remove_a_third_at_most(stage):
    section = DistillSection(student=ShrinkConfig(parameters=4000), rounds=2, fit=SHORT)
    with pytest.raises(UserError, match="Take rounds="):
        stage("distill", section)


def test_a_student_that_learns_on_its_grid(stage):
    out, metrics = stage("distill", DistillSection(layers=1, quantization=MIXED, fit=SHORT))
    assert metrics["loss"] > 0
    assert on_grid(out, "block_0_fc", 4)
    assert on_grid(out, "token_embedding", 8)


def test_a_student_that_gets_sparse_while_it_learns(stage):
    pruning = PruneConfig(0.6, end_step=4, frequency=2)
    _, metrics = stage("distill", DistillSection(layers=1, pruning=pruning, fit=SHORT))
    kernels = 12 * 24 * 24
    assert metrics["parameters"] - metrics["nonzero"] == pytest.approx(0.6 * kernels, rel=0.01)


def test_a_sparse_student_on_its_grid_stays_sparse(stage):
    sparse, _ = stage("prune", PruneSection(PruneConfig(0.7), one_shot=True))
    section = DistillSection(layers=1, quantization=QuantConfig(), fit=SHORT)
    out, metrics = stage("distill", section, model=sparse)
    assert metrics["parameters"] - metrics["nonzero"] >= 0.69 * 12 * 24 * 24
    assert on_grid(out, "block_0_qkv", 8)


def test_quantizing_after_training_and_exporting_that(done, stage, tmp_path):
    scheme = QuantConfig("int4", granularity="channel", range="mse", rounding="gptq")
    out, metrics = stage("quantize", QuantizeSection(scheme, calibration=8))
    assert metrics["parameters"]
    assert on_grid(out, "block_0_fc", 4)
    section = ExportSection(scheme)
    inputs = {"model_folder": out}
    info = run_stage(find_stage("export"), section, inputs, tmp_path / "file", 0, QUIET)
    assert info["scheme"] == scheme.name
    assert (tmp_path / "file" / "model.tflite").is_file()


def test_a_static_file_of_a_float_model_looks_at_text(done, tmp_path):
    section = ExportSection(QuantConfig(activations="static"), calibration=4)
    inputs = {"model_folder": done / "train"}
    with pytest.raises(UserError, match="calibration"):
        run_stage(find_stage("export"), section, inputs, tmp_path / "file", 0, QUIET)
    inputs["dataset_folder"] = done / "dataset"
    info = run_stage(find_stage("export"), section, inputs, tmp_path / "file", 0, QUIET)
    assert info["scheme"] == "int8 static"


def test_training_on_a_grid_whose_scales_are_learned(stage):
    out, _ = stage("qat", QatSection(MIXED, learned_ranges=True, fit=SHORT))
    assert on_grid(out, "block_0_fc", 4)
    fixed, _ = stage("qat", QatSection(MIXED, fit=SHORT), out=out.parent / "fixed")
    assert weights(fixed) != weights(out)


def test_training_with_static_activations_leaves_their_ranges(stage):
    from tf_gptopt.models.checkpoints import load_model

    scheme = QuantConfig(activations="static")
    out, _ = stage("qat", QatSection(scheme, calibration=4, fit=SHORT))
    ranges = load_model(out).activation_ranges
    assert "block_0_qkv/input" in ranges
    info = run_stage(
        find_stage("export"), ExportSection(scheme), {"model_folder": out}, out / "file", 0, QUIET
    )
    assert info["scheme"] == scheme.name
