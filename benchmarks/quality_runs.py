"""The techniques that benchmarks/quality.py compares: each a function from a laboratory to a plain
model. All that train on get the same tokens in the same order, `tune_steps` steps of them or twice
as many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality_lab import Lab
from tf_gptopt.compression.distillation.cache_writer import cache_logits
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.distillation.losses import (
    AttentionMaps,
    HiddenStates,
    Relations,
    SoftLabels,
)
from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
from tf_gptopt.compression.pruning.config import BLOCK_KERNELS, PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, strip_pruning
from tf_gptopt.compression.quantization.config import RECIPES, QuantConfig
from tf_gptopt.compression.quantization.ptq import quantize
from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.compression.structured.shrinking import shrink
from tf_gptopt.evaluation.sensitivity import measure_sensitivity
from tf_gptopt.evaluation.size import file_bytes
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.recipes.distill_stage import part_of_the_way
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT

SCORES = ("random", "magnitude", "gradient", "taylor", "wanda", "sparsegpt")
SPARSITIES = (0.3, 0.5, 0.7, 0.9)
TUNE_RATE, DISTILL_RATE, QAT_RATE = 1.5e-4, 1e-3, 1e-4
THIRD = 0.67  # of the parameters stay
ROUNDS = 2
STUDENT_SEEDS = (0, 1, 2)
TOP_K = 32
SIGNALS: dict[str, list[Any]] = {  # beside plain soft labels
    "reverse": [SoftLabels(divergence="reverse")],
    "js": [SoftLabels(divergence="js")],
    "hidden_states": [SoftLabels(), HiddenStates(normalize=True, weight=0.5)],
    "attention_maps": [SoftLabels(), AttentionMaps(weight=0.2)],
    "relations": [SoftLabels(), Relations(weight=0.2)],
}


PTQ_VARIANTS: dict[str, dict[str, Any]] = {
    "int8-static-p99.99": {"recipe": "int8-static", "range": "percentile", "percentile": 99.99},
    "int8-tensor": {"recipe": "int8", "granularity": "tensor"},
    "int8-global": {"recipe": "int8", "granularity": "global"},
    "int4-minmax": {"recipe": "int4", "range": "minmax"},
    "int4-channel": {"recipe": "int4", "granularity": "channel"},
    "int4-channel-gptq": {"recipe": "int4-gptq", "granularity": "channel"},
    "int4-per-128": {"recipe": "int4", "granularity": 128},
    "int4-per-128-gptq": {"recipe": "int4-gptq", "granularity": 128},
    "int4-gptq-cache": {"recipe": "int4-gptq", "kv_cache": "int8"},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of the table.

    Args:
        name: its folder's name.
        group: what it is compared with.
        make: makes the model; takes the laboratory, the run's folder and `settings`.
        settings: what tells it from its group.
    """

    name: str
    group: str
    make: Callable[..., GPTModel]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def parent(lab: Lab, folder: Path) -> GPTModel:
    return lab.parent


def early(lab: Lab, folder: Path) -> GPTModel:
    """The parent a third of the way, where the same model in PyTorch has its loss."""
    return lab.early


def continued(lab: Lab, folder: Path, times: int) -> GPTModel:
    """The parent, trained on as the others are: what those tokens alone are worth."""
    model = lab.parent
    lab.fit(model, times * lab.scale.tune_steps, TUNE_RATE, folder)
    return model


def pruned(lab: Lab, folder: Path, **config: Any) -> GPTModel:
    """At one stroke, without training."""
    if "layers" in config:
        config["layers"] = tuple(config["layers"])
    config = PruneConfig(schedule="constant", seed=lab.scale.seed, **config)
    return strip_pruning(prune(lab.parent, config, lab.calibration))


def pruned_by_two(lab: Lab, folder: Path, sparsity: float, magnitude: str) -> GPTModel:
    """By magnitude where a `magnitude` kernel is, by Wanda elsewhere."""
    rest = tuple(pattern for pattern in BLOCK_KERNELS if pattern != magnitude)
    model = lab.parent
    for score, layers in (("wanda", rest), ("magnitude", (magnitude,))):
        config = PruneConfig(sparsity, score=score, layers=layers, schedule="constant")
        model = strip_pruning(prune(model, config, lab.calibration))
    return model


def pruned_and_tuned(
    lab: Lab, folder: Path, taught: bool = False, times: int = 1, **config: Any
) -> GPTModel:
    """Along the cubic schedule over a third of the training; SparseGPT, which moves weights when
    it removes others, at its beginning. `taught` by the parent, or on the labels alone; for so many
    `times` the others' steps."""
    schedule = "constant" if config.get("score") == "sparsegpt" else "cubic"
    steps, seed = times * lab.scale.tune_steps, lab.scale.seed
    end = steps // 3
    config = PruneConfig(schedule=schedule, end_step=end, frequency=5, seed=seed, **config)
    sparse = prune(lab.parent, config, lab.calibration)
    trained = Distiller(sparse, lab.parent) if taught else sparse
    lab.fit(trained, steps, TUNE_RATE, folder, pruning_callbacks(sparse))
    return strip_pruning(sparse)


def adaptively_pruned(lab: Lab, folder: Path, tolerance: float) -> GPTModel:
    """As sparse as the tolerance allows; four times the others' tokens, for it has to try."""
    steps = 4 * lab.scale.tune_steps
    config = PruneConfig(
        sparsity=0.95, schedule="adaptive", end_step=steps, frequency=25, tolerance=tolerance
    )
    sparse = prune(lab.parent, config)
    watch = pruning_callbacks(sparse, lab.data.batches("valid", 8, max_batches=8))
    lab.fit(sparse, steps, TUNE_RATE, folder, watch)
    return strip_pruning(sparse)


def shrunk(lab: Lab, folder: Path, **target: Any) -> GPTModel:
    """Smaller, without training."""
    return shrink(lab.parent, ShrinkConfig(**target), lab.calibration)


def distilled(lab: Lab, folder: Path, rounds: int = 1, **target: Any) -> GPTModel:
    """Smaller, then taught by the parent; in several rounds, each takes its share of the way."""
    teacher = student = lab.parent
    steps = 2 * lab.scale.tune_steps // rounds
    for number in range(1, rounds + 1):
        goal = part_of_the_way(ShrinkConfig(**target), teacher.config, number, rounds)
        student = shrink(student, goal, lab.calibration)
        student = _taught(lab, student, teacher, folder / f"round_{number}", steps)
    return student


def from_scratch(lab: Lab, folder: Path, like: str) -> GPTModel:
    """The shape of another run's model with random weights, on as many tokens as that one saw."""
    config = TFLiteGPT(lab.folder / like / "model.tflite").config
    shape = {
        name: getattr(config, name)
        for name in (*dict(lab.scale.shape), "head_dim", "intermediate_dim")
    }
    model = lab.fresh(shape)
    lab.fit(model, 2 * lab.scale.tune_steps, 2e-3, folder)
    return model


def half(lab: Lab, folder: Path, seed: int, signal: str) -> GPTModel:
    """Every other block of the parent, taught by it (through a `signal`) or by the labels alone."""
    parent = lab.parent
    student = shrink(parent, layers=parent.config.num_layers // 2)
    steps = 2 * lab.scale.tune_steps
    if signal == "labels":
        lab.fit(student, steps, DISTILL_RATE, folder, seed=seed)
        return student
    if signal == "cached":
        cached = cache_logits(parent, lab.data, folder / "checkpoints" / "logits", TOP_K)
        distiller = Distiller(student, cached)
        lab.fit(distiller, steps, DISTILL_RATE, folder, seed=seed, data=cached)
        return student
    teacher = [parent, lab.early] if signal == "two-teachers" else parent
    return _taught(lab, student, teacher, folder, steps, seed, SIGNALS.get(signal))


def quantized(lab: Lab, folder: Path, recipe: str, **changes: Any) -> tuple[GPTModel, QuantConfig]:
    """After training, on the calibration text where the scheme takes some."""
    config = QuantConfig.from_recipe(recipe, **changes)
    return quantize(lab.parent, config, lab.calibration), config


def mixed(lab: Lab, folder: Path, options: list[str], bytes: float) -> tuple[GPTModel, QuantConfig]:
    """GPTQ with the bits of each layer that what it costs alone suggests, measured on two batches
    of the training split; `bytes` as a share of uniform int4."""
    gptq = QuantConfig.from_recipe("int4-gptq")
    table = measure_sensitivity(
        lab.parent,
        lab.sample(),
        options,
        lab.calibration,
        config=gptq,
        out=folder / "checkpoints" / "sensitivity.json",
    )
    config = QuantConfig.from_sensitivity(table, bytes=bytes)
    return quantize(lab.parent, config, lab.calibration), config


def quantized_aware(
    lab: Lab, folder: Path, recipe: str, rate: float = QAT_RATE, **changes: Any
) -> tuple[GPTModel, QuantConfig]:
    """Trained on with what the file will hold."""
    config = QuantConfig.from_recipe(recipe, **changes)
    aware = quantize_aware(lab.parent, config, calibration=lab.calibration)
    lab.fit(aware, lab.scale.tune_steps, rate, folder)
    return strip_quantization(aware), config


def small(lab: Lab, folder: Path) -> tuple[GPTModel, QuantConfig]:
    """Half the depth, half of the weights, int8: distilled at every stage."""
    parent, steps, config = lab.parent, lab.scale.tune_steps, QuantConfig()
    student = shrink(parent, layers=parent.config.num_layers // 2)
    student = _taught(lab, student, parent, folder / "half", 2 * steps)
    pruning = PruneConfig(schedule="cubic", end_step=steps // 3, frequency=5)
    sparse = prune(student, pruning)
    teaching = Distiller(sparse, parent)
    lab.fit(teaching, steps, TUNE_RATE, folder / "sparse", pruning_callbacks(sparse))
    aware = quantize_aware(strip_pruning(sparse), config)
    lab.fit(Distiller(aware, parent), steps, QAT_RATE, folder / "aware")
    return strip_quantization(aware), config


def small_dense(lab: Lab, folder: Path, like: str) -> tuple[GPTModel, QuantConfig]:
    """A dense model whose int8 file is no smaller than another run's after gzip, trained in float
    on as many tokens as the parent and that run together."""
    scale, shape = lab.scale, dict(lab.scale.shape)
    target = lab.finished(like, {})["gzip_bytes"]
    for width in range(8, shape["embedding_dim"], 8):
        model = lab.fresh({**shape, "embedding_dim": width})
        export_tflite(model, folder / "size.tflite", QuantConfig(), tokenizer=lab.tokenizer)
        if file_bytes(folder / "size.tflite")[1] >= target:
            break
    lab.fit(model, scale.parent_steps, scale.parent_rate, folder / "first")
    more = scale.more_steps + 4 * scale.tune_steps
    lab.fit(model, more, scale.more_rate, folder / "more", seed=1)
    return model, QuantConfig()


def _taught(
    lab: Lab,
    student: GPTModel,
    teacher: Any,
    folder: Path,
    steps: int,
    seed: int = 0,
    losses: list[Any] | None = None,
) -> GPTModel:
    lab.fit(Distiller(student, teacher, losses=losses), steps, DISTILL_RATE, folder, seed=seed)
    return student


def runs() -> Iterator[Run]:
    """Every run, those of the table of bounds first."""
    yield Run("parent", "parent", parent)
    yield Run("early", "early", early)
    yield Run("continued", "tuned", continued, {"times": 1})
    for score in SCORES:
        yield _prune(score, 0.5, tuned=False)
    yield _prune("magnitude", 0.5)
    for score in ("magnitude", "sparsegpt"):
        yield _prune(score, 0.5, pattern="2:4")
    for score in ("magnitude", "taylor"):
        yield _prune(score, 0.7)
    width = ("heads", "neurons", "width")
    third = {"parameters": THIRD, "axes": width, "importance": "taylor"}
    yield Run("third-distilled", "structured, tuned", distilled, third)
    minitron = {**third, "rounds": ROUNDS}
    yield Run("third-minitron", "structured, tuned", distilled, minitron)
    yield Run("third-scratch", "structured, tuned", from_scratch, {"like": "third-minitron"})
    for seed in STUDENT_SEEDS:
        for signal in ("distilled", "labels"):
            yield _half(signal, seed)
    yield Run("continued-long", "structured, tuned", continued, {"times": 2})
    for score, pattern in (("magnitude", "unstructured"), ("sparsegpt", "2:4")):
        row = _prune(score, 0.5, pattern=pattern)
        name = row.name.replace("tuned", "taught")
        yield dataclasses.replace(row, name=name, settings={**row.settings, "taught": True})
        settings = {**row.settings, "times": 2}
        yield Run(f"{row.name}-long", "tuned, longer", pruned_and_tuned, settings)

    for recipe in RECIPES:
        if recipe not in ("float32", "float16"):
            yield Run(f"ptq-{recipe}", "quantized", quantized, {"recipe": recipe})
    for recipe in ("int8", "int8-static", "int4"):
        yield Run(f"qat-{recipe}", "quantized, tuned", quantized_aware, {"recipe": recipe})
    for name, changes in PTQ_VARIANTS.items():
        yield Run(f"ptq-{name}", "quantized", quantized, changes)
    options = ["int8", "int4", "int4:64", "int4:128"]
    yield Run("ptq-mixed", "quantized", mixed, {"options": options, "bytes": 1.0})
    yield Run("small", "small", small)
    yield Run("small-dense", "small", small_dense, {"like": "small"})

    for signal in (*SIGNALS, "two-teachers", "cached"):
        yield _half(signal, 0)
    for sparsity in (0.3, 0.7, 0.9):
        for score in SCORES:
            yield _prune(score, sparsity, tuned=False)
    for sparsity in SPARSITIES:
        yield _prune("magnitude", sparsity, tuned=False, scope="global")
        yield _prune("wanda", sparsity, tuned=False, scope="output")  # its paper's group
    for kind in ("qkv", "proj", "fc", "out"):  # where Wanda wins and where it loses
        for score in ("magnitude", "wanda"):
            row, layers = _prune(score, 0.5, tuned=False), [f"block_*_{kind}"]
            settings = {**row.settings, "layers": layers}
            yield dataclasses.replace(row, name=f"{score}-{kind}-50%", settings=settings)
    two = {"sparsity": 0.5, "magnitude": "block_*_out"}
    yield Run("wanda-but-out-50%", "one-shot", pruned_by_two, two)
    for pattern in ("2:4", "4:8", "16x1", "4x4"):
        for score in ("magnitude", "wanda", "sparsegpt"):
            yield _prune(score, 0.5, tuned=False, pattern=pattern)
    for axes in (("heads",), ("neurons",), ("width",), ("layers",), width, (*width, "layers")):
        for importance in ("activation", "taylor"):
            target = {"parameters": 0.9, "axes": axes, "importance": importance}
            yield Run(f"shrunk-{'-'.join(axes)}-{importance}", "structured", shrunk, target)
    for sparsity in (0.5, 0.7, 0.9, 0.3):
        for score in SCORES:
            if (score, sparsity) not in (("magnitude", 0.5), ("magnitude", 0.7), ("taylor", 0.7)):
                yield _prune(score, sparsity)
    for sparsity in SPARSITIES:
        yield _prune("magnitude", sparsity, scope="global")
    for pattern in ("4:8", "16x1", "4x4"):
        yield _prune("magnitude", 0.5, pattern=pattern)
    yield Run("adaptive-2%", "tuned", adaptively_pruned, {"tolerance": 0.02})


def _half(signal: str, seed: int) -> Run:
    settings = {"seed": seed, "signal": signal}
    return Run(f"half-{signal}-{seed}", "half depth", half, settings)


def _prune(
    score: str,
    sparsity: float,
    tuned: bool = True,
    pattern: str = "unstructured",
    scope: str = "layer",
) -> Run:
    parts = [score, "" if scope == "layer" else scope, "" if pattern == "unstructured" else pattern]
    name = "-".join([*filter(None, parts), f"{sparsity:.0%}"]).replace(":", "of")
    settings = {"score": score, "sparsity": sparsity, "pattern": pattern, "scope": scope}
    if tuned:
        return Run(f"{name}-tuned", "tuned", pruned_and_tuned, settings)
    return Run(name, "one-shot", pruned, settings)
