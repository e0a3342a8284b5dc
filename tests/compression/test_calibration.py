"""Calibration: which tokens, and what reaches each Dense layer, in bounded memory."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.calibration import stream_inputs, walk_blocks
from tf_gptopt.compression.calibration_text import calibration_ids, check_ids
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune
from tf_gptopt.data.corpus import Document
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.data.packing import write_dataset

UNEVEN = {"num_heads": (2, 3), "head_dim": 5, "intermediate_dim": (40, 17), "dropout": 0.1}
IDS = np.random.default_rng(1).integers(0, 61, (7, 12))


def inputs_by_keras(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every Dense layer's input (and the head's), from the whole model at once."""
    tensors = {}
    for layer in model.layers:
        base = getattr(layer, "layer", layer)
        if isinstance(base, keras.layers.Dense) or base.name == "token_logits":
            tensors[base.name] = tf.nest.flatten(layer.input)[0]
    found = keras.Model(model.inputs, tensors)(ids)
    return {
        name: tf.reshape(tf.cast(x, tf.float32), [-1, x.shape[-1]]).numpy()
        for name, x in found.items()
    }


class Collector:
    """An observer that keeps all it sees."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, x: tf.Tensor) -> None:
        assert x.dtype == tf.float32
        self.parts.setdefault(name, []).append(x.numpy())

    def joined(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.parts.items()}


# Token ids


def test_ids_from_arrays_tensors_and_datasets() -> None:
    ids = np.arange(40).reshape(8, 5)
    pairs = tf.data.Dataset.from_tensor_slices((ids, ids + 1)).batch(3)
    for source in (ids, ids.tolist(), tf.constant(ids), pairs, pairs.map(lambda x, y: x)):
        found = calibration_ids(source)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, ids)
        np.testing.assert_array_equal(calibration_ids(source, 4, length=2), ids[:4, :2])
    np.testing.assert_array_equal(calibration_ids(pairs.repeat(), 10)[8:], ids[:2])  # endless
    assert len(calibration_ids(pairs.repeat())) == 128
    assert len(calibration_ids(np.repeat(ids, 50, 0))) == 50 * len(ids)  # an array is taken whole


def test_ids_from_a_token_dataset(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = Path(__file__).read_text()
    texts = [source[start : start + 300] for start in range(0, 6000, 300)]
    write_dataset([Document(str(i), t) for i, t in enumerate(texts)], tiny_tokenizer, tmp_path, 16)
    data = TokenDataset.load(tmp_path)
    ids = calibration_ids(data, 9)
    assert ids.shape == (9, 16)
    np.testing.assert_array_equal(ids, calibration_ids(data, 9))  # the same ones every time
    np.testing.assert_array_equal(ids[:, :5], calibration_ids(data, 9, length=5))
    stream = data.tokens("train")
    ring = np.concatenate([stream, stream[:16]])
    windows = {tuple(w) for w in np.lib.stride_tricks.sliding_window_view(ring, 16).tolist()}
    assert {tuple(row) for row in ids.tolist()} <= windows
    assert len({tuple(row) for row in ids.tolist()}) == 9
    with pytest.raises(UserError, match="17 tokens"):
        calibration_ids(data, length=17)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("some text", {}, "Encode text"),
        (np.zeros((2, 3)), {}, "integers"),
        (np.zeros(9, int), {}, "shape"),
        ([[1, 2], [3]], {}, "one length"),
        (np.zeros((0, 8), int), {}, "no calibration text"),
        (tf.data.Dataset.range(0).batch(2), {}, "no calibration text"),
        (tf.data.Dataset.range(4), {}, "shape"),
        (np.zeros((4, 8), int), {"length": 9}, "smaller length"),
        (np.zeros((4, 8), int), {"examples": 0}, "examples"),
        (np.zeros((4, 8), int), {"length": True}, "length"),
        (
            tf.data.Dataset.from_generator(
                lambda: (np.zeros((2, n), np.int32) for n in (3, 4)),
                output_signature=tf.TensorSpec((None, None), tf.int32),
            ),
            {},
            "length=",
        ),
    ],
)
def test_wrong_sources_are_told_what_to_give(source: Any, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibration_ids(source, **arguments)


def test_ids_must_be_the_models(tiny_model: Callable) -> None:
    model = tiny_model()
    for ids, message in (
        ([[0, 61]], "0 to 60"),
        ([[-1, -1], [0, 3]], "no token"),
        (np.zeros((2, 33), int), "length=32"),
        (np.zeros((0, 4), int), "no calibration text"),
    ):
        with pytest.raises(UserError, match=message):
            check_ids(model, ids)
        with pytest.raises(UserError, match=message):
            next(walk_blocks(model, ids))
    with pytest.raises(UserError, match="tf_keras"):
        next(walk_blocks("gpt", IDS))
    with pytest.raises(UserError, match="batch_size"):
        next(walk_blocks(model, IDS, 0))


# Inputs


@pytest.mark.parametrize(
    ("policy", "shape", "pruned"),
    [
        ("float32", {"tie_embeddings": False}, False),
        ("mixed_bfloat16", UNEVEN, True),
    ],
)
def test_inputs_are_those_of_the_model(
    tiny_model: Callable, policy: str, shape: dict, pruned: bool
) -> None:
    keras.mixed_precision.set_global_policy(policy)
    model = tiny_model(**shape)
    if pruned:
        model = prune(model, PruneConfig(0.5, schedule="constant"))
    truth = inputs_by_keras(model, IDS)
    walked, streamed, names = Collector(), Collector(), []
    for block in walk_blocks(model, IDS, batch_size=3, head=True):  # 3 + 3 + 1
        names += block.layers
        block.inputs(walked)
    stream_inputs(model, IDS, truth, streamed, batch_size=2)
    assert names == [
        *(f"block_{i}_{part}" for i in (0, 1) for part in ("qkv", "proj", "fc", "out")),
        "token_logits",
    ]
    for seen in (walked.joined(), streamed.joined()):
        assert seen.keys() == truth.keys()
        for name, x in truth.items():
            tolerance = 1e-5 if policy == "float32" else 0.05
            np.testing.assert_allclose(seen[name], x, rtol=tolerance, atol=tolerance)


def test_the_next_block_sees_what_was_changed_and_this_one_what_it_was(
    tiny_model: Callable,
) -> None:
    model = tiny_model()
    before = inputs_by_keras(model, IDS)
    seen = Collector()
    for block in walk_blocks(model, IDS, batch_size=4):
        block.inputs(seen)
        for name in block.layers:
            kernel = model.base_layer(name).kernel
            kernel.assign(kernel * 0.5)
    after, seen = inputs_by_keras(model, IDS), seen.joined()
    for name in ("block_0_proj", "block_0_out"):
        np.testing.assert_allclose(seen[name], before[name], atol=1e-5)
    np.testing.assert_allclose(seen["block_1_qkv"], after["block_1_qkv"], atol=1e-5)
    assert np.abs(seen["block_1_qkv"] - before["block_1_qkv"]).max() > 0.1


def test_one_block_can_be_looked_at_again_after_a_change(tiny_model: Callable) -> None:
    model = tiny_model()
    block = next(walk_blocks(model, IDS))
    first, second = Collector(), Collector()
    block.inputs(first, ["block_0_fc"])
    assert first.parts.keys() == {"block_0_fc"}
    kernel = model.base_layer("block_0_qkv").kernel
    kernel.assign(-kernel)
    block.inputs(second)
    truth = inputs_by_keras(model, IDS)["block_0_fc"]
    np.testing.assert_allclose(second.joined()["block_0_fc"], truth, atol=1e-5)
    assert np.abs(first.joined()["block_0_fc"] - truth).max() > 0.01


def test_a_block_is_over_when_the_walk_goes_on(tiny_model: Callable) -> None:
    blocks = list(walk_blocks(tiny_model(), IDS))
    with pytest.raises(RuntimeError, match="block 0"):
        blocks[0].inputs(lambda name, x: None)


def test_memory_is_one_set_of_hidden_states_and_one_batch(tiny_model: Callable) -> None:
    model = tiny_model()
    ids = np.random.default_rng(0).integers(0, 61, (200, 32))
    states = ids.size * model.config.embedding_dim * 4
    alive: list[weakref.ref] = []
    most, held = 0, []

    def observe(name: str, x: tf.Tensor) -> None:
        nonlocal most
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(x)]
        most = max(most, sum(len(ref()) for ref in alive))
        assert len(x) == 8 * 32

    tracemalloc.start()
    for block in walk_blocks(model, ids, batch_size=8):
        block.inputs(observe)
        numpy_only = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        snapshot = tracemalloc.take_snapshot().filter_traces([numpy_only])
        held.append(sum(trace.size for trace in snapshot.traces))
    tracemalloc.stop()
    assert all(states <= size < 1.2 * states + ids.nbytes for size in held)
    assert most <= 2 * 4 * 8 * 32  # four layers' inputs of a batch, while the next are made


def test_a_model_that_was_calibrated_can_be_forgotten(tiny_model: Callable) -> None:
    model = tiny_model()
    stream_inputs(model, IDS, ["block_1_fc"], lambda *_: None)
    nodes = len(model.base_layer("block_0_fc")._inbound_nodes)
    stream_inputs(model, IDS, ["block_1_fc"], lambda *_: None)  # makes nothing new
    assert len(model.base_layer("block_0_fc")._inbound_nodes) == nodes
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_progress_rises_to_its_total(tiny_model: Callable) -> None:
    model, calls = tiny_model(), []
    for block in walk_blocks(model, IDS, 3, lambda *call: calls.append(call)):
        block.inputs(lambda name, x: None)
    assert [done for done, _, _ in calls] == [*range(1, 10)]  # 3 batches, 3 times
    assert {total for _, total, _ in calls} == {9}
    assert calls[0][2] == "block 0 observed"
    calls.clear()
    stream_inputs(model, IDS, ["block_0_fc"], lambda *_: None, 3, lambda *call: calls.append(call))
    assert calls == [(i, 3, "block 0") for i in (1, 2, 3)]  # and block 1 never ran


def test_unknown_layers_are_named(tiny_model: Callable) -> None:
    with pytest.raises(UserError, match="Did you mean 'block_0_fc'"):
        stream_inputs(tiny_model(), IDS, ["block_0_fcc"], lambda *_: None)
