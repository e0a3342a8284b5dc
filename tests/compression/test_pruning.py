"""Magnitude pruning: masks hold at every moment, reach the target exactly and survive saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import (
    count_parameters,
    prune,
    sparsity,
    strip_pruning,
)
from tf_gptopt.compression.pruning.wrapper import PruneLowMagnitude
from tf_gptopt.models.gpt import GPTModel

UNEVEN = {"num_heads": (2, 3), "head_dim": 5, "intermediate_dim": (40, 17), "dropout": 0.1}
NOW = PruneConfig(0.5, schedule="constant")  # one shot, no training
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def text(batches: int, vocab_size: int = 61, time: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Batches of 4 sequences that count upwards by 1 or 2."""
    steps = np.random.default_rng(0).integers(1, 3, (4 * batches, time + 1))
    ids = (np.cumsum(steps, axis=1) % vocab_size).astype("int32")
    return ids[:, :-1], ids[:, 1:]


def train(model: GPTModel, batches: int, **fit_args: Any) -> keras.callbacks.History:
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), LOSS)
    return model.fit(*text(batches), batch_size=4, shuffle=False, verbose=0, **fit_args)


def kernels(model: GPTModel) -> dict[str, np.ndarray]:
    """The kernels as they lie in the variables, without applying any mask."""
    bases = [getattr(layer, "layer", layer) for layer in model.layers]
    return {base.name: base.kernel.numpy() for base in bases if hasattr(base, "kernel")}


def logits(model: GPTModel) -> np.ndarray:
    return model(text(1)[0]).numpy()


class Recorder(keras.callbacks.Callback):
    """The kernels after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, np.ndarray]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.steps.append(kernels(self.model))


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """One pruned training of ten batches, which several tests look at."""
    source = GPTModel(61, 15, 2, max_sequence_length=8, **UNEVEN)
    source.tokenizer = object()
    before = [w.numpy() for w in source.weights]
    pruned = prune(source, PruneConfig(0.6, initial_sparsity=0.1, end_step=7, frequency=3))
    recorder = Recorder()  # ahead of the pruning callbacks: masks must not need them
    history = train(pruned, 10, callbacks=[recorder, *pruning_callbacks(pruned)])
    return {
        "source": source,
        "before": before,
        "pruned": pruned,
        "steps": recorder.steps,
        "history": history.history,
    }


def test_prune_returns_a_wrapped_copy_and_leaves_the_model_alone(trained: dict) -> None:
    source, pruned = trained["source"], trained["pruned"]
    assert isinstance(pruned, GPTModel)
    assert (pruned.config, pruned.tokenizer) == (source.config, source.tokenizer)
    wrapped = {layer.layer.name for layer in pruned.layers if isinstance(layer, PruneLowMagnitude)}
    assert wrapped == {f"block_{i}_{p}" for i in (0, 1) for p in ("qkv", "proj", "fc", "out")}
    for weight, before in zip(source.weights, trained["before"], strict=True):
        np.testing.assert_array_equal(weight.numpy(), before)


def test_schedule_is_followed_and_zeros_are_exact_after_every_batch(trained: dict) -> None:
    expected = 0.1  # at step 0; then updates at steps 3, 6 and, off the beat of 3, at the end, 7
    for step, weights in enumerate(trained["steps"], start=1):
        if step in (3, 6, 7):
            expected = 0.6 - 0.5 * (1 - step / 7) ** 3  # Zhu & Gupta 2017, equation 1
        for name, kernel in weights.items():
            assert np.sum(kernel == 0) == pytest.approx(kernel.size * expected, abs=0.51), name


def test_pruned_weights_never_come_back(trained: dict) -> None:
    for earlier, later in zip(trained["steps"], trained["steps"][1:], strict=False):
        for name, kernel in earlier.items():
            assert not later[name][kernel == 0].any()


def test_strip_gives_a_plain_model_of_the_same_function(trained: dict) -> None:
    pruned = trained["pruned"]
    plain = strip_pruning(pruned)
    assert isinstance(plain, GPTModel)
    assert plain.tokenizer is pruned.tokenizer
    assert [layer.name for layer in plain.layers] == [la.name for la in trained["source"].layers]
    assert not [layer for layer in plain.layers if isinstance(layer, PruneLowMagnitude)]
    np.testing.assert_array_equal(logits(plain), logits(pruned))
    for kernel in kernels(plain).values():
        assert np.sum(kernel == 0) == kernel.size - round(kernel.size * 0.4)
    plain.base_layer("block_0_fc").kernel.assign(np.ones((15, 40)))
    assert kernels(pruned)["block_0_fc"].min() < 1  # nothing is shared


def test_strip_applies_masks_whatever_wrote_the_weights(tiny_model: Callable) -> None:
    pruned = prune(tiny_model(), NOW)
    kernel = pruned.base_layer("block_1_out").layer.kernel
    zero = kernel.numpy() == 0
    kernel.assign(tf.fill(kernel.shape, -1.0))
    stripped = kernels(strip_pruning(pruned))["block_1_out"]
    np.testing.assert_array_equal(stripped == 0, zero)
    assert not np.signbit(stripped[zero]).any()  # no -0.0, which would not compress
    assert sparsity(pruned)["block_1_out"] == 0.5


def test_sparsity_and_counts(trained: dict) -> None:
    pruned = trained["pruned"]
    report, plain = sparsity(pruned), strip_pruning(pruned)
    assert report == sparsity(plain)
    sizes = {name: kernel.size for name, kernel in kernels(plain).items()}
    zeros = {name: int(np.sum(kernel == 0)) for name, kernel in kernels(plain).items()}
    assert report.pop("total") == pytest.approx(sum(zeros.values()) / sum(sizes.values()))
    assert report == {name: zeros[name] / sizes[name] for name in sizes}
    everything = sum(w.size for w in plain.get_weights())
    nonzero = sum(np.count_nonzero(w) for w in plain.get_weights())
    assert count_parameters(pruned) == count_parameters(plain) == (everything, nonzero)


def test_epoch_logs_report_the_sparsity(trained: dict) -> None:
    total = sparsity(trained["pruned"])["total"]
    assert trained["history"]["sparsity"] == [pytest.approx(total)]


def test_keras_file_round_trip(trained: dict, tmp_path: Path) -> None:
    pruned = trained["pruned"]
    pruned.save(tmp_path / "pruned.keras")
    loaded = keras.models.load_model(tmp_path / "pruned.keras", compile=False)
    assert isinstance(loaded, GPTModel)
    np.testing.assert_array_equal(logits(loaded), logits(pruned))
    layer = loaded.base_layer("block_1_out")
    assert (type(layer), layer.steps_done, layer.target_sparsity) == (PruneLowMagnitude, 10, 0.6)
    train(loaded, 1, callbacks=pruning_callbacks(loaded))
    assert layer.steps_done == 11
    assert sparsity(strip_pruning(loaded)) == sparsity(pruned)
    strip_pruning(loaded).save(tmp_path / "plain.keras")
    plain = keras.models.load_model(tmp_path / "plain.keras", compile=False)
    assert kernels(plain).keys() == kernels(pruned).keys()
    assert plain.base_layer("block_1_out").get_config()["kernel_constraint"] is None


def test_resumed_at_any_step_ends_with_the_same_weights(
    tiny_model: Callable, tmp_path: Path
) -> None:
    config = PruneConfig(0.7, end_step=5, frequency=2)
    inputs, labels = text(6)

    def start() -> tuple[GPTModel, tf.train.Checkpoint]:
        model = prune(tiny_model(num_layers=1), config)
        model.compile(keras.optimizers.AdamW(1e-2), LOSS)
        model.optimizer.build(model.trainable_variables)
        return model, tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    def run(model: GPTModel, first: int, last: int) -> None:
        rows = slice(4 * first, 4 * last)
        model.fit(
            inputs[rows],
            labels[rows],
            batch_size=4,
            shuffle=False,
            verbose=0,
            callbacks=pruning_callbacks(model),
        )

    whole, _ = start()
    run(whole, 0, 6)
    killed, checkpoint = start()
    run(killed, 0, 3)
    path = checkpoint.write(str(tmp_path / "checkpoint"))
    resumed, checkpoint = start()
    for weight in resumed.trainable_weights:  # nothing is right by chance
        weight.assign(tf.ones_like(weight))
    checkpoint.read(path).assert_consumed()
    run(resumed, 3, 6)
    assert sparsity(whole)["block_0_fc"] == pytest.approx(0.7, abs=0.01)
    for expected, weight in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_zeros_of_an_earlier_pruning_stay_while_it_goes_on(tiny_model: Callable) -> None:
    half = strip_pruning(prune(tiny_model(num_layers=1), NOW))
    protected = prune(half, PruneConfig(0.0, schedule="constant", layers=("block_*_fc",)))
    further = prune(half, PruneConfig(0.75, end_step=2, frequency=1))
    train(protected, 2)
    train(further, 3)
    # pruning a model that still has its wrappers does the same as pruning the stripped one
    again = strip_pruning(prune(further, PruneConfig(0.9, schedule="constant")))
    for name, kernel in kernels(half).items():
        assert not kernels(further)[name][kernel == 0].any()
        assert not kernels(again)[name][kernels(further)[name] == 0].any()
    fractions = [sparsity(model)["block_0_fc"] for model in (half, protected, further, again)]
    assert fractions == pytest.approx([0.5, 0.5, 0.75, 0.9], abs=0.001)
    assert sparsity(protected)["block_0_out"] == 0  # the control: unprotected zeros fill up


def test_an_initially_zero_kernel_is_not_taken_for_pruned(tiny_model: Callable) -> None:
    model = tiny_model(num_layers=1)
    model.base_layer("block_0_out").kernel.assign(np.zeros((96, 24)))
    pruned = prune(model, PruneConfig(0.5))
    assert pruned.base_layer("block_0_out").mask_values().all()


def test_constant_schedule_prunes_at_once(tiny_model: Callable) -> None:
    model = tiny_model(tie_embeddings=False)
    plain = strip_pruning(prune(model, PruneConfig(0.5, schedule="constant", layers="*_fc")))
    for name, kernel in kernels(plain).items():
        before = kernels(model)[name]
        if name.endswith("_fc"):
            smallest = np.abs(before[kernel != 0]).min()
            assert np.abs(before[kernel == 0]).max() < smallest
        else:
            np.testing.assert_array_equal(kernel, before)


def test_equal_magnitudes_do_not_blur_the_target(tiny_model: Callable) -> None:
    model = tiny_model(num_layers=1)
    kernel = model.base_layer("block_0_qkv").kernel
    kernel.assign(np.round(kernel.numpy() * 10) / 10 + 0.05)  # a coarse grid, as after quantizing
    assert sparsity(prune(model, NOW))["block_0_qkv"] == 0.5


def test_small_kernels_can_stay_dense(tiny_model: Callable) -> None:
    fractions = sparsity(
        prune(tiny_model(), PruneConfig(0.5, schedule="constant", min_weights=1000))
    )
    assert fractions["block_0_proj"] == 0  # 24 x 24
    assert fractions["block_0_qkv"] == 0.5


@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    head_dim=st.integers(1, 5),
    neurons=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    width=st.integers(1, 11),
    fraction=st.floats(0, 0.999),
    tied=st.booleans(),
)
@settings(deadline=None, max_examples=5)
def test_prune_and_strip_are_exact_for_odd_shapes(
    heads: tuple, head_dim: int, neurons: tuple, width: int, fraction: float, tied: bool
) -> None:
    model = GPTModel(
        7,
        width,
        2,
        heads,
        head_dim=head_dim,
        intermediate_dim=neurons,
        max_sequence_length=8,
        tie_embeddings=tied,
    )
    plain = strip_pruning(prune(model, PruneConfig(fraction, schedule="constant")))
    for name, kernel in kernels(plain).items():
        kept = np.count_nonzero(kernel)
        if name == "token_logits":
            assert kept == kernel.size
        else:
            assert kept == pytest.approx(max(1, kernel.size * (1 - fraction)), abs=0.501)


def test_mixed_precision_trains_with_exact_masks(tiny_model: Callable) -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = tiny_model(num_layers=1)
    keras.mixed_precision.set_global_policy("float32")
    pruned = prune(model, PruneConfig(0.5, end_step=2, frequency=1))
    assert pruned.base_layer("block_0_fc").dtype_policy.name == "mixed_bfloat16"
    before = kernels(pruned)["block_0_fc"]
    train(pruned, 3, callbacks=pruning_callbacks(pruned))
    plain = strip_pruning(pruned)
    assert plain.base_layer("block_0_fc").compute_dtype == "bfloat16"
    assert sparsity(plain)["total"] == pytest.approx(0.5, abs=1e-3)
    after = kernels(plain)["block_0_fc"]
    assert np.abs(after - before)[after != 0].max() > 1e-4  # and what was kept has learnt
    np.testing.assert_array_equal(logits(plain), logits(pruned))


def test_strip_warns_of_a_target_that_was_not_reached(tiny_model: Callable) -> None:
    pruned = prune(tiny_model(), PruneConfig(0.5, end_step=100))
    with pytest.warns(UserWarning, match=r"0\.0% sparse, not 50\.0%.*step 0 of 100"):
        strip_pruning(pruned)


def test_watch_notices_an_optimizer_that_does_not_prune(tiny_model: Callable) -> None:
    class Stubborn(keras.optimizers.SGD):
        def apply_gradients(self, *args: Any, **kwargs: Any) -> None:
            pass

    pruned = prune(tiny_model(num_layers=1), PruneConfig(0.5))
    pruned.compile(Stubborn(), LOSS, run_eagerly=True)
    with pytest.raises(UserError, match="without a pruning step"):
        pruned.fit(*text(1), verbose=0, callbacks=pruning_callbacks(pruned))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, r"fraction in \[0, 1\)"),
        ({"sparsity": -0.1}, r"fraction in \[0, 1\)"),
        ({"sparsity": 50}, r"For 50% write 0\.5"),
        ({"sparsity": float("nan")}, "fraction"),
        ({"sparsity": 0.3, "initial_sparsity": 0.4}, "must not exceed"),
        ({"begin_step": 10, "end_step": 10}, "must come after begin_step"),
        ({"begin_step": -1}, "at least 0"),
        ({"frequency": 0}, "at least 1"),
        ({"frequency": 2.5}, "integer"),
        ({"schedule": "polynomal"}, "Did you mean 'polynomial'"),
        ({"layers": ()}, "patterns of layer names"),
        ({"score": "taylr"}, "Did you mean 'taylor'"),
        ({"scope": "row"}, "Unknown pruning scope"),
        ({"pattern": "4:2"}, "1 <= N < M"),
        ({"pattern": "0x4"}, "block of inputs x outputs"),
        ({"pattern": 24}, "block of inputs x outputs"),
        ({"pattern": "2:4", "sparsity": 0.7}, r"fixes the sparsity at 0\.5.*Leave sparsity out"),
        ({"pattern": "2:4", "scope": "global"}, "kernels cannot share"),
        ({"pattern": "2:4", "schedule": "adaptive"}, "may stop before"),
        ({"score": "sparsegpt"}, "schedule='constant' and begin_step=0"),
        ({"score": "sparsegpt", "schedule": "constant", "scope": "global"}, "one layer after"),
        ({"schedule": "adaptive", "end_step": 0}, "must come after begin_step"),
        ({"tolerance": 0}, "positive number"),
        ({"power": float("nan")}, "positive number"),
    ],
)
def test_config_says_what_is_wrong(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PruneConfig(**values)


def test_n_of_m_fixes_the_sparsity() -> None:
    assert PruneConfig(pattern="1:4").sparsity == 0.75
    assert PruneConfig(0.75, pattern="1:4").sparsity == 0.75
    assert PruneConfig(pattern="1:4").n_of_m == (1, 4)
    assert PruneConfig(pattern="16x1").block == (16, 1)


def test_model_and_pattern_mistakes(tiny_model: Callable) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=r"names no Dense layer.*Did you mean 'block_0_fc'"):
        prune(model, PruneConfig(layers=("blok_0_fc",)))
    with pytest.raises(UserError, match="names no Dense layer"):
        prune(model, PruneConfig(layers=("token_embedding",)))
    with pytest.raises(UserError, match="Lower min_weights"):
        prune(model, PruneConfig(min_weights=10**6))
    with pytest.raises(UserError, match="not wrapped for pruning"):
        pruning_callbacks(model)
    with pytest.raises(UserError, match="GPTModel is needed"):
        prune(keras.Sequential([keras.layers.Dense(2)]))
    keras3 = pytest.importorskip("keras")
    with pytest.raises(UserError, match="Keras 3"):
        prune(keras3.Sequential([keras3.layers.Dense(2)]))
