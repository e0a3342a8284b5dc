"""Any chain of stages: each keeps what the stages before it promised, or says why it does not.

Hypothesis draws a model of some odd shape and a chain of stages, and after every stage all promises
are checked that hold by then. `CHAINS=200 pytest tests/compression/test_composition.py` walks more
chains, other ones each time.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
from tf_gptopt.compression.pruning.config import CALIBRATED, PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, strip_pruning
from tf_gptopt.compression.pruning.wrapper import PruneLowMagnitude
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.grids import find_grid
from tf_gptopt.compression.quantization.qat import (
    is_quantization_aware,
    quantize_aware,
    strip_quantization,
)
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.compression.structured.shrinking import shrink
from tf_gptopt.models.checkpoints import load_model, named_weights, save_model, weight_shapes
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.kv_cache import cached_forward, create_cache
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT

VOCAB, TIME = 53, 12
IDS = np.random.default_rng(1).integers(0, VOCAB, (4, TIME + 1)).astype(np.int32)
INPUTS, LABELS = IDS[:, :-1], IDS[:, 1:]
INT8_ERROR = 0.08  # of the logits' deviation: see tests/tflite/test_export.py, for three blocks

SHAPES = {
    "heads of 5": {"num_heads": 3, "head_dim": 5, "intermediate_dim": 37},
    "blocks differ": {
        "num_layers": 3,
        "num_heads": (1, 3, 2),
        "head_dim": 5,
        "intermediate_dim": (37, 16, 7),
    },
    "own head": {"num_heads": 3, "tie_embeddings": False},
    "dropout": {"num_heads": 2, "intermediate_dim": 50, "dropout": 0.1},
}


def build(shape: str) -> GPTModel:
    model = GPTModel(
        VOCAB,
        24,
        **{"num_layers": 2, "max_sequence_length": TIME, **SHAPES[shape]},
    )
    rng = np.random.default_rng(0)
    for weight in model.weights:  # no weight at its initial 0 or 1
        weight.assign(rng.normal(1.0 * ("gamma" in weight.name), 0.2, weight.shape))
    return model


# What is promised


@dataclasses.dataclass
class Made:
    """A model on its way, and what has been promised about it."""

    model: GPTModel
    teacher: GPTModel  # an earlier one
    zeros: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # True: stays zero
    patterns: set[tuple[int, int]] = dataclasses.field(default_factory=set)  # N:M, of all blocks
    on_grid: bool = False

    @property
    def state(self) -> str:
        if is_quantization_aware(self.model):
            return "quantized"
        wrapped = any(isinstance(layer, PruneLowMagnitude) for layer in self.model.layers)
        return "pruned" if wrapped else "plain"

    def plain(self) -> GPTModel:
        strip = {"quantized": strip_quantization, "pruned": strip_pruning}.get(self.state)
        return strip(self.model) if strip else self.model

    def kernels(self) -> dict[str, np.ndarray]:
        weights = named_weights(self.plain())
        return {name: w for name, w in weights.items() if name.endswith("/kernel")}

    def promise_zeros(self) -> None:
        """From here on, what is zero stays zero."""
        self.zeros = {
            name: kernel == 0
            for name, kernel in self.kernels().items()
            if name.startswith("block_") and not kernel.all()
        }


def check(made: Made) -> None:
    assert isinstance(made.model, GPTModel)
    plain = made.plain()
    weights = named_weights(plain)
    assert {n: w.shape for n, w in weights.items()} == weight_shapes(made.model.config)
    check_zeros(made, weights)
    kernels = {name: w for name, w in weights.items() if name.endswith("/kernel")}
    for name, kernel in kernels.items():
        for n, m in made.patterns if name.startswith("block_") else ():
            assert most_in_a_group(kernel, m) <= n, f"{name} is no longer {n}:{m}"
    if made.on_grid:
        for name, kernel in kernels.items():
            assert find_grid(kernel.T) is not None, name
    logits = made.model(INPUTS, training=False).numpy()
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(plain(INPUTS).numpy(), logits, atol=1e-4)
    cache = create_cache(made.model, len(INPUTS), TIME)
    found, cache = cached_forward(made.model, INPUTS[:, :5], cache, np.zeros(len(INPUTS)))
    last, _ = cached_forward(made.model, INPUTS[:, 5:], cache, np.full(len(INPUTS), 5))
    np.testing.assert_allclose(np.concatenate([found, last], 1), logits, atol=1e-4)


def check_zeros(made: Made, weights: dict[str, np.ndarray]) -> None:
    for name, zero in made.zeros.items():
        assert not weights[name][zero].any(), f"{name} has lost zeros"


def most_in_a_group(kernel: np.ndarray, m: int) -> int:
    """The most weights that any M consecutive inputs of one output keep."""
    rest = -len(kernel) % m
    kept = np.pad(kernel != 0, ((0, rest), (0, 0)))
    return int(kept.reshape(-1, m, kernel.shape[1]).sum(1).max())


# The stages


def do_prune(made: Made, folder: Path, **config: Any) -> None:
    """One shot, or on the way of the next three steps."""
    config = PruneConfig(end_step=3, frequency=1, refresh=2, **config)
    calibration = INPUTS if config.score in CALIBRATED else None
    made.model = prune(made.model, config, calibration)
    made.on_grid = False
    keep_promise(made)
    if config.schedule != "constant":
        do_fit(made, folder)
    if config.n_of_m:
        made.patterns.add(config.n_of_m)


def do_shrink(made: Made, folder: Path, **target: Any) -> None:
    before = np.concatenate([k.ravel() for k in made.kernels().values()])
    larger = made.model
    made.model = shrink(made.model, ShrinkConfig(**target), INPUTS)
    assert made.model.count_params() <= larger.count_params()
    if made.zeros and "embedding_dim" not in target:
        kept = np.concatenate([k[k != 0].ravel() for k in made.kernels().values()])
        assert np.isin(kept, before).all()  # parts are copied, zeros with them
    if made.zeros:
        made.promise_zeros()
    if set(target) != {"layers"}:  # inputs and largest weights may be gone: see `shrink`
        made.patterns, made.on_grid = set(), False


def do_fit(made: Made, folder: Path) -> None:
    keep_zeros(made)
    train(made, made.model)


def do_distill(made: Made, folder: Path, **config: Any) -> None:
    keep_zeros(made)
    train(made, Distiller(student=made.model, teacher=made.teacher, **config))


def do_quantize(made: Made, folder: Path) -> None:
    made.model = quantize_aware(made.model)
    made.on_grid = True


def do_strip(made: Made, folder: Path) -> None:
    made.model = made.plain()


def do_save(made: Made, folder: Path) -> None:
    if made.state == "plain":
        save_model(made.model, folder / "a")
        made.model = load_model(folder / "a")
        save_model(made.model, folder / "b")
        for name in ("model.safetensors", "config.json"):
            assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()
    else:
        before = made.model.get_weights()
        made.model.save(folder / "model.keras")
        made.model = keras.models.load_model(folder / "model.keras")
        for ours, theirs in zip(made.model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def do_export(made: Made, folder: Path) -> None:
    plain = made.plain()
    expected = plain(INPUTS[:1]).numpy()[0]
    for scheme, most in (("float32", 1e-4), ("int8", INT8_ERROR)):
        export_tflite(plain, folder / "model.tflite", QuantConfig(scheme))
        found = TFLiteGPT(folder / "model.tflite", threads=1).logits(INPUTS[0])
        deviation = np.sqrt(np.mean((expected - expected.mean(-1, keepdims=True)) ** 2))
        assert np.sqrt(np.mean((found - expected) ** 2)) < most * deviation, scheme


def keep_zeros(made: Made) -> None:
    """Training changes every weight of a plain model, so its zeros need their masks again."""
    if made.zeros and made.state == "plain":
        made.model = prune(made.model, PruneConfig(sparsity=0.0, schedule="constant"))


def train(made: Made, trainer: keras.Model) -> None:
    """Two epochs of two steps; `trainer` is the model or its distiller."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer.compile(keras.optimizers.Adam(1e-2), loss, run_eagerly=True)
    watch = pruning_callbacks(made.model, (INPUTS, LABELS)) if made.state == "pruned" else []
    trainer.fit(INPUTS, LABELS, batch_size=2, epochs=2, callbacks=watch, verbose=0)
    made.on_grid &= made.state == "quantized"
    keep_promise(made)


def keep_promise(made: Made) -> None:
    """Zeros are still there; those that pruning has added stay from now on as well."""
    check_zeros(made, named_weights(made.plain()))
    if made.zeros or made.state == "pruned":
        made.promise_zeros()


# Which stages a model in some state cannot go through: each says what to do first
REFUSALS = {
    ("quantize", "pruned"): "strip_pruning",
    ("quantize", "quantized"): "strip",
    ("prune", "quantized"): "strip_quantization",
    ("shrink", "quantized"): "strip_quantization",
}
STAGES = {
    "prune": do_prune,
    "shrink": do_shrink,
    "fit": do_fit,
    "distill": do_distill,
    "quantize": do_quantize,
    "strip": do_strip,
    "save": do_save,
    "export": do_export,
}


def walk(shape: str, chain: list[tuple[str, dict[str, Any]]], folder: Path) -> Made:
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    made = Made(build(shape), build(shape))
    for name, options in chain:
        print(f"{made.state} {shape}: {name} {options}")  # what pytest shows of a failure
        before, reason = made.model, REFUSALS.get((name, made.state))
        if name == "strip" and made.state == "plain":
            continue
        if reason:
            with pytest.raises(UserError, match=reason):
                STAGES[name](made, folder, **options)
            assert made.model is before
            continue
        STAGES[name](made, folder, **options)
        check(made)
    do_export(made, folder)
    return made


@st.composite
def prunings(draw: st.DrawFn) -> dict[str, Any]:
    """What can be asked of `prune` without contradicting oneself."""
    pattern = draw(st.sampled_from(["unstructured", "unstructured", "2:4", "4:8", "4x4", "5x1"]))
    score = draw(
        st.sampled_from(["random", "magnitude", "gradient", "taylor", "wanda", "sparsegpt"])
    )
    config = {"pattern": pattern, "score": score}
    scopes, schedules = ["layer", "output", "global"], ["constant", "cubic", "adaptive"]
    if ":" in pattern:
        scopes, schedules = ["layer", "output"], ["constant", "cubic"]
    else:
        config["sparsity"] = draw(st.sampled_from([0.3, 0.5, 0.8]))
    if score == "sparsegpt":
        scopes, schedules = ["layer", "output"], ["constant"]
    config["scope"] = draw(st.sampled_from(scopes))
    config["schedule"] = draw(st.sampled_from(schedules))
    return config


SHRINKINGS = st.sampled_from(
    [
        {"layers": 1},
        {"parameters": 0.7, "neuron_multiple": 1, "width_multiple": 1},
        {"flops": 0.8, "axes": ("heads", "neurons"), "neuron_multiple": 1},
        {"num_heads": 1, "intermediate_dim": 7},
        {"embedding_dim": 17},
    ]
)
CHAINS = st.lists(
    st.one_of(
        st.tuples(st.just("prune"), prunings()),
        st.tuples(st.just("shrink"), SHRINKINGS),
        st.tuples(st.just("distill"), st.just({})),
        st.tuples(st.sampled_from(["quantize", "strip", "strip", "save", "fit"]), st.just({})),
    ),
    min_size=2,
    max_size=4,
)


@pytest.mark.filterwarnings("ignore:.*[Pp]runing")  # stripped amid a schedule, to look at it
@settings(
    max_examples=int(os.environ.get("CHAINS", "3")),
    derandomize="CHAINS" not in os.environ,
    phases=[Phase.explicit, Phase.generate],  # a chain is short enough to read as it was drawn
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(shape=st.sampled_from(sorted(SHAPES)), chain=CHAINS)
@example(  # sparse, distilled, on its grid, trained on: all at once
    "blocks differ",
    [
        ("prune", {"score": "wanda", "pattern": "2:4", "schedule": "constant"}),
        ("distill", {}),
        ("strip", {}),
        ("quantize", {}),
        ("fit", {}),
        ("strip", {}),
        ("save", {}),
    ],
)
@example(  # pruned again where it has been pruned and shrunk before
    "own head",
    [
        ("prune", {"score": "taylor", "scope": "global", "schedule": "cubic"}),
        ("save", {}),
        ("fit", {}),
        ("shrink", {"parameters": 0.7, "neuron_multiple": 1, "width_multiple": 1}),
        ("prune", {"score": "sparsegpt", "pattern": "4:8", "schedule": "constant"}),
        ("distill", {}),
    ],
)
@example("dropout", [("prune", {"score": "gradient", "schedule": "adaptive"}), ("distill", {})])
def test_every_stage_keeps_what_was_promised(
    tmp_path_factory: pytest.TempPathFactory, shape: str, chain: list[tuple[str, dict[str, Any]]]
) -> None:
    walk(shape, chain, tmp_path_factory.mktemp("chain"))
