"""`shrink` to a budget or a shape: it is met from below, and what is dead goes first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, strip_pruning
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.qat import quantize_aware
from tf_gptopt.compression.structured.budget import Spending
from tf_gptopt.compression.structured.config import ShrinkConfig
from tf_gptopt.compression.structured.ladders import Cuts
from tf_gptopt.compression.structured.shrinking import describe_shrink, shrink
from tf_gptopt.compression.structured.surgery import all_units, extract, shape_of
from tf_gptopt.models.checkpoints import load_model
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.counting import token_flops, weight_count
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT
from tf_gptopt.training.loss import NextTokenLoss

IDS = np.random.default_rng(0).integers(0, 61, (3, 9)).astype(np.int32)
UNEVEN = {
    "num_layers": 3,
    "num_heads": (1, 2, 3),
    "head_dim": 5,
    "intermediate_dim": (40, 17, 31),
}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_budgets_are_met_from_below(data: Any) -> None:
    layers = data.draw(st.integers(1, 4))

    def per_block(most: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(1, most), min_size=layers, max_size=layers)))

    config = GPTConfig(
        data.draw(st.integers(2, 90)),
        data.draw(st.integers(1, 40)),
        layers,
        per_block(5),
        intermediate_dim=per_block(70),
        head_dim=data.draw(st.integers(1, 9)),
        max_sequence_length=20,
        tie_embeddings=data.draw(st.booleans()),
    )
    kinds = {"parameters": weight_count, "flops": lambda shape: token_flops(shape, 20)}
    kind = data.draw(st.sampled_from(sorted(kinds)))
    cost = kinds[kind]
    axes = data.draw(st.sets(st.sampled_from(("heads", "neurons", "layers", "width")), min_size=1))
    multiple = data.draw(st.sampled_from([1, 3, 16]))
    shrinking = ShrinkConfig(
        **{kind: 0.5}, axes=tuple(axes), neuron_multiple=multiple, width_multiple=multiple
    )
    cuts = Cuts(config, shrinking)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for ladder in cuts.ladders.values():
        ladder.damage = np.r_[0.0, rng.random(len(ladder.sizes) - 1).cumsum()]
        ladder.reach = len(ladder.sizes) - 1
        rng.shuffle(ladder.order)
    whole, least = cost(config), cuts.least(cost)
    target = data.draw(st.integers(least, whole))
    spending = Spending(cuts, cost)
    spending.cut(target)
    spending.give_back(target)

    kept = cuts.kept()
    left = shape_of(config, kept)
    assert cost(left) == spending.cost() <= target
    # nothing could be given back
    assert all(spending.cost(levels) > target for levels in cuts.neighbours(-1))
    if cost(left) == whole:
        assert left == config
    for axis, was, now in (
        ("width", [config.embedding_dim], [left.embedding_dim]),
        ("heads", [config.block_heads[i] for i in kept.layers], left.block_heads),
        (
            "neurons",
            [config.block_intermediate_dims[i] for i in kept.layers],
            left.block_intermediate_dims,
        ),
        ("layers", [config.num_layers], [left.num_layers]),
    ):
        grain = multiple if axis in ("width", "neurons") else 1
        assert all(a == b or (b < a and b % grain == 0) for a, b in zip(was, now, strict=True))
        assert axis in axes or list(was) == list(now)


@pytest.mark.parametrize(
    ("target", "axes"),
    [
        ({"parameters": 0.6}, ("heads", "neurons", "layers", "width")),
        ({"flops": 0.8, "importance": "taylor"}, ("heads", "neurons")),
    ],
)
def test_a_model_meets_its_budget(tiny_model: Callable, target: dict, axes: tuple) -> None:
    model = tiny_model(num_heads=(2, 3), head_dim=6, intermediate_dim=(40, 33))
    told: list = []
    config = ShrinkConfig(**target, axes=axes, neuron_multiple=2, width_multiple=2)
    small = shrink(model, config, IDS, on_progress=lambda *what: told.append(what))

    def cost(shape: GPTConfig) -> int:
        return weight_count(shape) if "parameters" in target else token_flops(shape, 32)

    fraction = getattr(config, config.budget)
    assert 0.85 * fraction < cost(small.config) / cost(model.config) <= fraction
    assert small.count_params() == weight_count(small.config)
    assert {done == total for done, total, _ in told} == {True, False}
    assert any("importance" in what for *_, what in told)
    text = describe_shrink(model, small)
    assert f"{small.count_params():,}" in text
    if "width" not in axes:
        assert small.config.embedding_dim == 24
        assert small.config.num_layers == 2


def test_what_is_dead_goes_first(tiny_model: Callable) -> None:
    model = tiny_model(**UNEVEN)
    gamma = model.base_layer("final_norm").gamma
    gamma.assign(8 * gamma)  # sure of itself: on its own text, all that is alive matters
    kept = all_units(model.config)
    # head 1 of block 2, neurons 3, 4, 5 of block 1 and block 0 do nothing
    for name, columns in (("block_2_qkv", slice(35, 40)), ("block_1_fc", slice(3, 6))):
        for weight in model.base_layer(name).weights:
            array = weight.numpy()
            array[..., columns] = 0.0
            weight.assign(array)
    for name in ("block_0_proj", "block_0_out"):
        for weight in model.base_layer(name).weights:
            weight.assign(np.zeros(weight.shape))
    kept.heads[2], kept.neurons[1] = np.array([0, 2]), np.delete(kept.neurons[1], [3, 4, 5])
    alive = extract(model, kept._replace(layers=np.array([1, 2])))
    target = ShrinkConfig(
        parameters=alive.count_params(),
        axes=("heads", "neurons", "layers"),
        importance="taylor",
        neuron_multiple=1,
    )
    own = model.generate(IDS, max_length=30)
    small = shrink(model, target, own)
    assert small.config == alive.config
    np.testing.assert_allclose(small(IDS), model(IDS), atol=1e-5)
    # the same by shape; blocks by importance, not by their distance
    assert shrink(model, 2, IDS).config.num_heads == (2, 3)
    assert shrink(model, 2).config.num_heads == (1, 3)
    shape = ShrinkConfig(layers=[1, 2], num_heads=2, intermediate_dim=(14, 31))
    np.testing.assert_allclose(shrink(model, shape, IDS)(IDS), model(IDS), atol=1e-5)


def test_a_shape_is_taken_as_it_is(tiny_model: Callable) -> None:
    model = tiny_model(tie_embeddings=False)
    shape = ShrinkConfig(layers=1, num_heads=2, intermediate_dim=21, embedding_dim=17)
    config = shrink(model, shape, IDS).config
    assert (config.num_layers, config.num_heads, config.head_dim) == (1, 2, 8)
    assert (config.intermediate_dim, config.embedding_dim) == (21, 17)


def test_the_result_is_an_ordinary_model(tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model(**UNEVEN)
    pruned = strip_pruning(prune(model, PruneConfig(0.5, schedule="constant")))
    kept = all_units(model.config)
    kept.heads[1] = np.array([1])
    kept = kept._replace(channels=np.arange(3, 24))
    kept.neurons[0] = np.arange(11, 30)
    small = extract(pruned, kept)
    kernel = pruned.base_layer("block_0_fc").kernel.numpy()[3:, 11:30]
    np.testing.assert_array_equal(small.base_layer("block_0_fc").kernel, kernel)
    assert 0.3 < np.mean(kernel == 0) < 0.7

    protected = prune(small, PruneConfig(0.0))  # zeros stay while it trains on
    protected.compile("adam", loss=NextTokenLoss())
    protected.fit(IDS, np.roll(IDS, -1, 1), verbose=0)
    trained = strip_pruning(protected)
    after = trained.base_layer("block_0_fc").kernel.numpy()
    assert not after[kernel == 0].any()
    assert not np.array_equal(after, kernel)
    trained.save_to_preset(str(tmp_path / "small"))
    loaded = load_model(tmp_path / "small")
    assert loaded.config == small.config
    np.testing.assert_array_equal(loaded(IDS), trained(IDS))


@pytest.mark.parametrize(("scheme", "most"), [("float32", 1e-4), ("int8", 0.06)])
def test_it_exports(tiny_model: Callable, tmp_path: Path, scheme: str, most: float) -> None:
    model = tiny_model(**UNEVEN)
    kept = all_units(model.config)
    kept.heads[2], kept.neurons[0] = np.array([0, 2]), np.arange(7, 29)
    small = extract(model, kept._replace(channels=np.delete(np.arange(24), [2, 9, 11])))
    path = tmp_path / "small.tflite"
    export_tflite(small, path, QuantConfig(scheme))
    runtime, ids = TFLiteGPT(path, threads=1), np.tile(IDS[0], 3)
    expected = small(ids[None])[0].numpy()
    error = np.sqrt(np.mean((runtime.logits(ids) - expected) ** 2) / np.var(expected))
    assert error < most
    written = runtime.generate(IDS[0], max_new_tokens=12)
    by_keras = small.generate(IDS[:1], max_length=9 + 12)[0]
    if scheme == "float32":
        np.testing.assert_array_equal(written, by_keras)
    else:  # equal until two tokens are nearly as likely
        assert list(written[:10]) == list(by_keras[:10])


@pytest.mark.parametrize(
    ("target", "calibration", "complaint"),
    [
        (ShrinkConfig(parameters=0.5), None, "text to measure on"),
        (ShrinkConfig(num_heads=2), None, "text to measure on"),
        (ShrinkConfig(parameters=0.01), IDS, "budget cannot be met"),
        (ShrinkConfig(parameters=0.5, axes=("heads",)), IDS, "cut along more axes"),
        (ShrinkConfig(num_heads=4), IDS, "Block 0 has 3"),
        (ShrinkConfig(intermediate_dim=(8, 9, 10)), IDS, "one per block"),
        (ShrinkConfig(embedding_dim=25), IDS, "24 wide"),
        (ShrinkConfig(parameters=0.5), IDS[:, :1], "2 tokens or more"),
        (ShrinkConfig(parameters=0.5), IDS + 60, "token ids 0 to 60"),
        (ShrinkConfig(parameters=0.5), "text", "token ids"),
    ],
)
def test_what_cannot_be_done_is_explained(
    tiny_model: Callable, target: ShrinkConfig, calibration: Any, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        shrink(tiny_model(), target, calibration)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"parameters": 0.5, "flops": 0.5},
        {"parameters": 0.5, "layers": 2},
        {"parameters": 1.5},
        {"flops": 0},
        {"parameters": True},
        {"num_heads": 0},
        {"embedding_dim": (8, 8)},
        {"parameters": 0.5, "axes": ()},
        {"parameters": 0.5, "axes": ("depth",)},
        {"parameters": 0.5, "importance": "activations"},
        {"parameters": 0.5, "neuron_multiple": 0},
    ],
)
def test_impossible_configurations_are_refused(values: dict) -> None:
    with pytest.raises(UserError, match=r"Received|Did you mean|Known"):
        ShrinkConfig(**values)


def test_a_quantization_aware_model_is_refused(tiny_model: Callable) -> None:
    with pytest.raises(UserError, match="strip_quantization"):
        shrink(quantize_aware(tiny_model()), 1)
