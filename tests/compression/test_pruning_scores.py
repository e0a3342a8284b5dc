"""Scores decide which weights go: against scores computed by hand, in training, on replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.calibration import stream_inputs
from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, sparsity, strip_pruning
from tf_gptopt.compression.pruning.scores import batches_of
from tf_gptopt.compression.pruning.wrapper import wrappers
from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
from tf_gptopt.models.gpt import GPTModel

IDS = np.random.default_rng(0).integers(0, 61, (100, 24)).astype("int32")  # more than one batch
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(scope="module")
def model() -> GPTModel:
    keras.utils.set_random_seed(1)
    return GPTModel(
        61, 18, 2, (2, 1), head_dim=5, intermediate_dim=(23, 40), max_sequence_length=24
    )


def one_shot(**changes: Any) -> PruneConfig:
    return PruneConfig(schedule="constant", **changes)


def kernels(model: GPTModel) -> dict[str, np.ndarray]:
    bases = [getattr(layer, "layer", layer) for layer in model.layers]
    chosen = [base for base in bases if isinstance(base, keras.layers.Dense)]
    return {base.name: base.kernel.numpy() for base in chosen}


def train(model: GPTModel, steps: int, **fit_args: Any) -> None:
    model.compile(keras.optimizers.AdamW(1e-2), LOSS)
    rows = IDS[: 4 * steps]
    model.fit(rows[:, :-1], rows[:, 1:], batch_size=4, shuffle=False, verbose=0, **fit_args)


def in_groups(kernel: np.ndarray, m: int = 4) -> int:
    """The most weights in any group of m consecutive inputs of an output."""
    padded = np.pad(kernel, [(0, -len(kernel) % m), (0, 0)])
    return int(np.count_nonzero(padded.reshape(-1, m, kernel.shape[1]), axis=1).max())


def mean_gradients(model: GPTModel) -> dict[str, np.ndarray]:
    """Mean over batches (by their tokens) of the absolute gradient of the mean loss."""
    sums = {name: np.zeros_like(kernel) for name, kernel in kernels(model).items()}
    layers = [model.base_layer(name) for name in sums]
    for ids in np.split(IDS, [2048 // 24]):
        with tf.GradientTape() as tape:
            logits = model(ids[:, :-1])
            loss = tf.reduce_sum(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=ids[:, 1:], logits=logits)
            )
        found = tape.gradient(loss, [layer.kernel for layer in layers])
        for name, gradient in zip(sums, found, strict=True):
            sums[name] += np.abs(gradient.numpy())
    return {name: total / IDS[:, 1:].size for name, total in sums.items()}


@pytest.fixture(scope="module")
def by_taylor(model: GPTModel) -> GPTModel:
    """In pruning by Taylor scores, with one threshold for all kernels."""
    config = PruneConfig(
        0.7, 0.2, score="taylor", scope="global", end_step=6, frequency=2, refresh=3
    )
    return prune(model, config, tf.data.Dataset.from_tensor_slices(IDS).batch(50))


def test_taylor_importance_is_the_gradient_averaged_over_batches(
    model: GPTModel, by_taylor: GPTModel
) -> None:
    expected = mean_gradients(model)
    for layer in wrappers(by_taylor):
        importance = expected[layer.layer.name]
        np.testing.assert_allclose(layer.importance.numpy(), importance, rtol=1e-3, atol=1e-7)


def test_global_scope_reaches_the_total_and_refreshes_while_training(
    by_taylor: GPTModel, tmp_path: Path
) -> None:
    layers = wrappers(by_taylor)
    size = sum(layer.mask_values().size for layer in layers)
    first = [layer.importance.numpy() for layer in layers]

    def zeros(layers: list) -> int:
        return sum(int(np.sum(layer.mask_values() == 0)) for layer in layers)

    totals = [zeros(layers)]

    class Recorder(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            totals.append(zeros(layers))
            if batch == 2:
                checkpoint.write(str(tmp_path / "third"))

    checkpoint = tf.train.Checkpoint(model=by_taylor)
    train(by_taylor, 8, callbacks=[*pruning_callbacks(by_taylor), Recorder()])
    for step, total in enumerate(totals):
        rise = 0.7 - 0.5 * (1 - min(step // 2 * 2, 6) / 6) ** 3
        assert total == pytest.approx(size * rise, abs=len(layers)), step
    # measured again after step 3, and not after 6, when the schedule has ended
    assert any(
        (layer.importance.numpy() != old).any() for layer, old in zip(layers, first, strict=True)
    )
    fractions = sparsity(by_taylor)
    assert max(fractions.values()) - min(fractions.values()) > 0.1  # kernels differ
    checkpoint.read(str(tmp_path / "third"))
    assert zeros(layers) == totals[3]


def test_the_global_mask_is_one_threshold(model: GPTModel) -> None:
    config = one_shot(sparsity=0.6, scope="global")
    plain = kernels(strip_pruning(prune(model, config)))
    before = kernels(model)
    kept = np.concatenate([np.abs(before[name][plain[name] != 0]) for name in plain])
    gone = np.concatenate([np.abs(before[name][plain[name] == 0]) for name in plain])
    assert kept.min() >= gone.max()
    assert kept.size == round(0.4 * (kept.size + gone.size))
    # what is zero already counts, and stays
    half = strip_pruning(prune(model, one_shot(layers="block_0_*")))
    further = prune(half, config)
    assert sparsity(further)["total"] == pytest.approx(0.6, abs=1e-3)
    assert not any(
        kernels(further)[name][kernel == 0].any() for name, kernel in kernels(half).items()
    )


def test_gradient_score_ignores_the_weights_size(model: GPTModel) -> None:
    (layer,) = wrappers(prune(model, one_shot(score="gradient", layers="block_0_fc"), IDS))
    expected, kept = mean_gradients(model)["block_0_fc"], layer.mask_values() > 0
    assert expected[kept].min() >= expected[~kept].max() * (1 - 1e-3)
    assert np.sum(kept) == kept.size // 2


def test_wanda_compares_the_weights_of_an_output(model: GPTModel) -> None:
    squares: dict[str, Any] = {}

    def observe(name: str, x: tf.Tensor) -> None:
        squares[name] = squares.get(name, 0) + np.square(x).sum(0)

    stream_inputs(model, IDS, ["block_1_out"], observe)
    config = one_shot(score="wanda", scope="output", layers="block_1_out")
    kernel = kernels(model)["block_1_out"]
    scores = np.abs(kernel) * np.sqrt(squares["block_1_out"])[:, None]
    kept = kernels(prune(model, config, IDS))["block_1_out"] != 0
    expected = scores >= np.sort(scores, axis=0)[len(kernel) // 2]
    np.testing.assert_array_equal(kept, expected)


def test_random_masks_repeat_and_are_nested(model: GPTModel) -> None:
    def zeros(fraction: float, seed: int = 0) -> dict[str, np.ndarray]:
        config = one_shot(sparsity=fraction, score="random", seed=seed, layers="*_fc")
        pruned = kernels(prune(model, config))
        return {name: pruned[name] == 0 for name in ("block_0_fc", "block_1_fc")}

    few, many, again, other = zeros(0.3), zeros(0.8), zeros(0.3), zeros(0.3, seed=1)
    for name, zero in few.items():
        np.testing.assert_array_equal(again[name], zero)
        assert not (zero & ~many[name]).any()
        assert (zero != other[name]).mean() > 0.2
        assert np.corrcoef(zero.ravel(), np.abs(kernels(model)[name]).ravel())[0, 1] < 0.2


def test_patterns_survive_what_comes_later(tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model(num_layers=1, embedding_dim=18)
    paired = prune(model, PruneConfig(pattern="2:4", score="wanda", end_step=2, frequency=1), IDS)
    train(paired, 2, callbacks=pruning_callbacks(paired))
    paired.save(tmp_path / "paired.keras")
    loaded = keras.models.load_model(tmp_path / "paired.keras", compile=False)
    layer, saved = (x.base_layer("block_0_qkv") for x in (loaded, paired))
    assert (layer.score, layer.pattern, layer.scope) == ("wanda", "2:4", "layer")
    np.testing.assert_array_equal(layer.importance.numpy(), saved.importance.numpy())
    pruning_callbacks(loaded)  # without its calibration text

    plain, half = strip_pruning(loaded), strip_pruning(prune(model, one_shot()))
    more = strip_pruning(prune(plain, one_shot(sparsity=0.8)))
    blocks = strip_pruning(prune(plain, one_shot(sparsity=0.5, pattern="4x4")))
    thinner = strip_pruning(prune(half, one_shot(pattern="2:4")))
    aware = quantize_aware(plain)
    train(aware, 1)
    aware = strip_quantization(aware)
    for name, kernel in kernels(plain).items():
        groups, rest = divmod(len(kernel), 4)
        zeros = kernel.shape[1] * (2 * groups + max(0, rest - 2))
        assert np.sum(kernel == 0) == zeros
        for changed in (plain, more, blocks, thinner, aware):
            assert in_groups(kernels(changed)[name]) == 2
        for changed in (more, blocks, aware):
            assert not kernels(changed)[name][kernel == 0].any()
        assert not kernels(thinner)[name][kernels(half)[name] == 0].any()
        assert np.sum(kernels(more)[name] == 0) == kernel.size - round(0.2 * kernel.size)


def test_what_sparsegpt_solves_is_the_mask(model: GPTModel) -> None:
    config = one_shot(score="sparsegpt", pattern="2:4", layers="block_*_fc")
    solved = prune(model, config, IDS)
    before, changed = kernels(model)["block_1_fc"], kernels(solved)["block_1_fc"]
    assert in_groups(changed) == 2
    kept = changed != 0
    assert np.abs(changed - before)[kept].max() > 1e-4  # what stays has moved
    np.testing.assert_array_equal(solved.base_layer("block_1_fc").mask_values(), kept)
    train(solved, 2)
    np.testing.assert_array_equal(kernels(solved)["block_1_fc"] != 0, kept)
    further = prune(strip_pruning(solved), one_shot(sparsity=0.7, score="sparsegpt"), IDS)
    assert not kernels(further)["block_1_fc"][~kept].any()
    assert sparsity(further)["block_1_fc"] == pytest.approx(0.7, abs=0.01)


def test_blocks_and_untied_heads(tiny_model: Callable) -> None:
    config = one_shot(pattern="4x4", layers=("token_logits", "block_0_fc"))
    pruned = prune(tiny_model(tie_embeddings=False), config)
    blocks = (kernels(pruned)["block_0_fc"] != 0).reshape(6, 4, 24, 4).sum((1, 3))
    assert set(blocks.ravel()) == {0, 16}
    assert np.count_nonzero(blocks) == 72
    head = kernels(pruned)["token_logits"]  # 24 x 61: the last blocks are 4 x 1
    assert np.sum(head.reshape(6, 4, 61).any(1)[:, ::4]) == 48
    train(pruned, 1, callbacks=pruning_callbacks(pruned))
    np.testing.assert_array_equal(kernels(pruned)["token_logits"] == 0, head == 0)


@pytest.mark.parametrize("score", ["gradient", "taylor", "wanda", "sparsegpt"])
def test_scores_that_need_text_say_so(model: GPTModel, score: str) -> None:
    with pytest.raises(UserError, match=r"give prune\(\.\.\., calibration=\.\.\.\)"):
        prune(model, one_shot(score=score))
    with pytest.raises(UserError, match="token ids"):
        prune(model, one_shot(score=score), IDS + 61)


def test_batches_are_shared_out_to_replicas() -> None:
    parts = list(batches_of(np.arange(21 * 256).reshape(21, 256), replicas=2))
    assert [ids.shape for ids, _ in parts] == [(2, 8, 256)] * 2
    rows = np.concatenate([ids[weights[..., 0] > 0] for ids, weights in parts])
    np.testing.assert_array_equal(rows, np.arange(21 * 256).reshape(21, 256))


def test_replicas_hold_the_same_masks_and_importance(run_child: Callable) -> None:
    """Under mixed_float16, with two microbatches an update."""
    printed = run_child(
        """
        import numpy as np
        from tf_gptopt._keras import keras
        from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
        from tf_gptopt.compression.pruning.config import PruneConfig
        from tf_gptopt.compression.pruning.pruner import prune, sparsity, strip_pruning
        from tf_gptopt.models.gpt import GPTModel
        from tf_gptopt.training.loss import NextTokenLoss
        from tf_gptopt.training.optimizer import adamw

        def check_replicas(model):
            for variable in model.variables:
                first, second = strategy.experimental_local_results(variable)
                np.testing.assert_array_equal(first.numpy(), second.numpy(), variable.name)

        ids = np.random.default_rng(0).integers(0, 31, (24, 9))
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        keras.mixed_precision.set_global_policy("mixed_float16")
        source = GPTModel(31, 16, 1, 2, max_sequence_length=9)
        config = PruneConfig(
            0.6, score="taylor", scope="global", end_step=5, frequency=2, refresh=2
        )
        with strategy.scope():
            pruned = prune(source, config, ids)
            pruned.compile(adamw(steps=6, learning_rate=1e-2, accumulate=2), NextTokenLoss())
        alone = prune(source, config, ids).base_layer("block_0_fc").importance.numpy()
        together = pruned.base_layer("block_0_fc").importance.numpy()
        np.testing.assert_allclose(together, alone, rtol=0.02, atol=1e-4 * alone.max())
        data = np.tile(ids, (2, 1))
        callbacks = pruning_callbacks(pruned)
        pruned.fit(data[:, :-1], data[:, 1:], batch_size=4, verbose=0, callbacks=callbacks)
        check_replicas(pruned)
        assert (pruned.base_layer("block_0_fc").importance.numpy() != together).any()
        plain = strip_pruning(pruned)  # outside of the scope
        print(pruned.base_layer("block_0_fc").steps_done, round(sparsity(plain)["total"], 3))

        with strategy.scope():
            pruned = prune(source, PruneConfig(schedule="adaptive", increment=0.3, scope="output"))
        (*_, adaptive) = pruning_callbacks(pruned, validation=ids)
        adaptive.on_train_begin()  # the first rise
        check_replicas(pruned)
        adaptive.state.baseline = 0.0  # nothing is within the tolerance of that
        adaptive._judge(10)
        check_replicas(pruned)
        print(sparsity(pruned)["total"], [kept for *_, kept in adaptive.state.history])
        """
    )
    steps, total, again, *kept = printed.split()
    assert (steps, total) == ("6", "0.6")
    assert float(again) == pytest.approx(0.15, abs=0.04)  # half of the first rise, by columns of 16
    assert kept == ["[True,", "False]"]
