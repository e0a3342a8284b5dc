"""Batches are shifted windows of the stream, in an order that is a function of (seed, step)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt.data import dataset as dataset_module
from tf_gptopt.data.corpus import Document
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.data.packing import DatasetInfo, SplitInfo, write_dataset
from tf_gptopt.data.tokenizer import train_tokenizer


def stream(tokens: int, valid: int = 200, length: int = 8, dtype: str = "uint16") -> TokenDataset:
    """A dataset whose token at position i is i: a batch shows where it was cut."""
    streams = {"train": np.arange(tokens, dtype=dtype), "valid": np.arange(valid, dtype=dtype)}
    train, held_out = (SplitInfo(len(ids), 1, 1, "") for ids in streams.values())
    info = DatasetInfo(train, held_out, dtype, 60_000, 0, length, "", 0.1, 0)
    return TokenDataset(info, streams, length)


def take(dataset: tf.data.Dataset, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(itertools.islice(dataset.as_numpy_iterator(), count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = [Document(str(i), f"def f{i}(x):\n    return {i} * x\n" * 9) for i in range(60)]
    tokenizer = train_tokenizer((document.text for document in words), 300)
    write_dataset(words, tokenizer, tmp_path, 32)
    return tmp_path


@pytest.mark.parametrize("split", ["train", "valid"])
def test_batches_have_static_shapes_and_shifted_labels(folder: Path, split: str) -> None:
    dataset = TokenDataset.load(folder)
    batches = dataset.batches(split, 4)
    assert batches.element_spec == (tf.TensorSpec((4, 32), tf.int32),) * 2
    twice = np.tile(dataset.tokens(split), 2).astype(np.int32)  # train is a ring
    windows = {twice[i : i + 33].tobytes() for i in range(dataset.num_tokens(split))}
    for inputs, labels in take(batches, 10):
        np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
        for row, label in zip(inputs, labels[:, -1:], strict=True):
            assert np.concatenate([row, label]).tobytes() in windows


@pytest.mark.parametrize(("tokens", "length", "batch"), [(1000, 8, 3), (9, 8, 4), (257, 16, 16)])
def test_an_epoch_predicts_every_token_once(tokens: int, length: int, batch: int) -> None:
    dataset = stream(tokens, length=length)
    windows = dataset.num_windows("train")
    assert windows == tokens // length
    epochs = 3
    steps = -(-epochs * windows // batch)
    labels = np.concatenate([labels for _, labels in take(dataset.batches("train", batch), steps)])
    grids = set()
    for epoch in range(epochs):
        rows = labels[epoch * windows : (epoch + 1) * windows]
        assert len(np.unique(rows)) == rows.size == windows * length
        gaps = np.diff(np.sort(rows[:, 0]))
        grids.add(int(rows[0, 0]) % length)
        assert np.all(gaps % length == 0) or tokens % length
    if tokens > 900:
        assert len(grids) > 1
        assert len({labels[i * windows : (i + 1) * windows, 0].tobytes() for i in range(3)}) == 3


def test_order_is_a_function_of_seed_and_step() -> None:
    def batches(seed: int = 0, start: int = 0, size: int = 4) -> list[tuple[np.ndarray, ...]]:
        return take(stream(1000).batches("train", size, seed=seed, start_step=start), 70)

    first = batches()
    np.testing.assert_equal(batches(), first)  # 70 batches are more than two epochs
    for start in (1, 31, 32, 69):
        np.testing.assert_equal(batches(start=start)[: 70 - start], first[start:])
    for seed in (1, -1, 256, 2**16, 2**31, 2**40, 2**63):  # the op underneath drops high bits
        assert (batches(seed)[0][0] != first[0][0]).any(), seed
    # Twice the batch is two batches: the number of replicas or of accumulated steps is no matter
    joined = [np.concatenate([a[0], b[0]]) for a, b in zip(first[::2], first[1::2], strict=True)]
    np.testing.assert_equal([inputs for inputs, _ in batches(size=8)[:35]], joined)


def test_a_far_step_costs_nothing() -> None:
    inputs, _ = take(stream(1000).batches("train", 4, start_step=10**12), 1)[0]
    assert inputs.shape == (4, 8)


def test_orders_of_epochs_are_unrelated() -> None:
    """TensorFlow's default of 4 rounds fails this by far: its epochs resemble one another."""
    dataset = stream(60_000, length=2)
    windows = dataset.num_windows("train")
    starts = dataset._shuffled_starts(seed=0, batch_size=windows)
    orders = [starts(tf.constant(epoch, tf.int64)).numpy() for epoch in range(6)]
    noise = 5 / np.sqrt(windows)  # five standard deviations
    for a, b in itertools.combinations([*orders, np.arange(windows)], 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < noise
    for order in orders:
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < noise


def test_no_two_epochs_are_alike_and_no_version_changes_them() -> None:
    starts = tf.function(stream(1000)._shuffled_starts(seed=0, batch_size=125))
    orders = [starts(tf.constant(epoch, tf.int64)).numpy() for epoch in range(600)]
    assert len({order[:4].tobytes() for order in orders}) == 600
    # A run that was begun with an earlier version goes on with its own batches
    assert orders[0][:4].tolist() == [60, 908, 820, 812]


def test_valid_is_one_pass_in_order() -> None:
    dataset = stream(100, valid=200, length=8)
    assert dataset.num_windows("valid") == 24  # 199 inputs with a label
    batches = take(dataset.batches("valid", 5), 99)
    assert len(batches) == 4  # four windows fill no fifth batch
    inputs = np.concatenate([inputs for inputs, _ in batches])
    np.testing.assert_array_equal(inputs.ravel(), np.arange(160))
    np.testing.assert_array_equal(batches[0][1].ravel(), np.arange(1, 41))
    assert dataset.batches("valid", 5).cardinality() == 4
    assert len(take(dataset.batches("valid", 5, max_batches=2), 99)) == 2
    assert len(take(dataset.batches("valid", 5, max_batches=9), 99)) == 4
    np.testing.assert_equal(take(dataset.batches("valid", 5, start_step=1), 99), batches[1:])
    ((inputs, _),) = take(dataset.batches("valid", 1000), 99)  # less than a batch is one batch
    assert inputs.shape == (24, 8)


def test_train_never_ends_unless_asked() -> None:
    dataset = stream(100)
    assert dataset.batches("train", 4).cardinality() == tf.data.INFINITE_CARDINALITY
    assert len(take(dataset.batches("train", 4, start_step=5, max_batches=3), 99)) == 3


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_stream_too_long_for_memory_gives_the_same_batches(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    expected = take(stream(1000).batches("train", 4), 20)
    monkeypatch.setattr(dataset_module, "_IN_MEMORY", 10)
    batches = stream(1000, dtype=dtype).batches("train", 4)
    assert batches.element_spec == (tf.TensorSpec((4, 8), tf.int32),) * 2
    np.testing.assert_equal(take(batches, 20), expected)


def test_another_sequence_length(folder: Path) -> None:
    dataset = TokenDataset.load(folder, sequence_length=50)
    assert take(dataset.batches("train", 2), 1)[0][0].shape == (2, 50)
    longest = min(dataset.num_tokens("train"), dataset.num_tokens("valid")) - 1
    assert take(TokenDataset.load(folder, longest).batches("valid", 1), 9)[0][0].shape[1] == longest
    with pytest.raises(UserError, match=rf"valid split .* needs {longest + 2}"):
        TokenDataset.load(folder, sequence_length=longest + 1)
    with pytest.raises(UserError, match="must be positive"):
        TokenDataset.load(folder, sequence_length=0)


def test_damaged_files_are_user_errors(folder: Path) -> None:
    path = folder / "train.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"train.bin is truncated.*Make the dataset again"):
        TokenDataset.load(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"train.bin is damaged.*sha256"):
        TokenDataset.load(folder)
    TokenDataset.load(folder, verify=False)
    path.unlink()
    with pytest.raises(UserError, match=r"train.bin is missing"):
        TokenDataset.load(folder)
    with pytest.raises(UserError, match="There is no dataset in"):
        TokenDataset.load(folder / "absent")


def test_bad_requests() -> None:
    dataset = stream(100)
    with pytest.raises(UserError, match="'test'"):
        dataset.batches("test", 4)
    with pytest.raises(UserError, match="batch_size=0"):
        dataset.batches("train", 0)
    with pytest.raises(UserError, match="start_step=-1"):
        dataset.batches("train", 4, start_step=-1)
    with pytest.raises(UserError, match="max_batches=0"):
        dataset.batches("valid", 4, max_batches=0)


def test_fit_under_mirrored_strategy(folder: Path, run_child: Callable[..., str]) -> None:
    """Two replicas see, together, the batches that one device sees, and learn from them."""
    code = f"""
        import json
        import numpy as np
        from tf_gptopt._keras import keras
        from tf_gptopt.data.dataset import TokenDataset

        dataset = TokenDataset.load({str(folder)!r})

        def build():
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [keras.Input((None,), dtype="int32"), keras.layers.Embedding(300, 16),
                 keras.layers.Dense(300)]
            )
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.SGD(1.0), loss)
            return model

        def train(strategy):
            with strategy.scope():
                model = build()
            fitted = model.fit(
                dataset.batches("train", 8), epochs=2, steps_per_epoch=10, verbose=0,
                validation_data=dataset.batches("valid", 2),
            )
            return fitted.history

        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        one, two = train(tf.distribute.get_strategy()), train(strategy)
        rows = []
        for parts, _ in strategy.experimental_distribute_dataset(dataset.batches("train", 8)):
            parts = strategy.experimental_local_results(parts)
            rows.append(np.concatenate([part.numpy() for part in parts]))
            if len(rows) == 5:
                break
        same = all(
            np.array_equal(a, b)
            for a, (b, _) in zip(rows, dataset.batches("train", 8).as_numpy_iterator())
        )
        print("RESULT" + json.dumps([one, two, same]))
    """
    output = run_child(code, devices=2)
    one, two, same = json.loads(output.partition("RESULT")[2])
    assert same
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4)
        assert one[name][1] < one[name][0]
