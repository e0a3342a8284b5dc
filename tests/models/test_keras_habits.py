"""What tutorials and other people's code do around a Keras model: it works, or the sentence says
what to write instead."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.pruning.pruner import prune
from tf_gptopt.compression.quantization.qat import quantize_aware
from tf_gptopt.compression.structured.shrinking import shrink
from tf_gptopt.models import checkpoints
from tf_gptopt.models.checkpoints import load_model, save_model
from tf_gptopt.models.fit_checks import doubt, warn_of, watch_labels
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.kv_cache import cached_forward, create_cache
from tf_gptopt.training.loss import NextTokenLoss

VOCABULARY, TIME = 50, 8
Sparse = keras.losses.SparseCategoricalCrossentropy
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (8, TIME + 1))
X, Y = IDS[:, :-1], IDS[:, 1:]


def small(seed: int = 0, **options: Any) -> GPTModel:
    keras.utils.set_random_seed(seed)
    return GPTModel(VOCABULARY, 16, 1, 2, max_sequence_length=16, **options)


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return small()


@pytest.fixture(scope="module")
def right(model: GPTModel) -> float:
    model.compile(loss=Sparse(from_logits=True))
    return model.evaluate(X, Y, verbose=0)


# compile


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        "SparseCategoricalCrossentropy",
        keras.losses.sparse_categorical_crossentropy,
        {"token_logits": "sparse_categorical_crossentropy"},
        ["sparse_categorical_crossentropy"],
    ],
    ids=["name", "class-name", "function", "by-output", "in-a-list"],
)
def test_a_cross_entropy_by_name_is_of_logits(model: GPTModel, right: float, loss: Any) -> None:
    with pytest.warns(UserWarning, match="from_logits=True"):
        model.compile("adam", loss)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(right, abs=1e-6)
    assert right == pytest.approx(math.log(VOCABULARY), abs=0.1)


def test_one_hot_labels_and_metrics_by_name_are_of_logits(model: GPTModel, right: float) -> None:
    with pytest.warns(UserWarning, match="CategoricalCrossentropy"):
        model.compile("adam", "categorical_crossentropy")
    assert model.evaluate(X, np.eye(VOCABULARY)[Y], verbose=0) == pytest.approx(right, abs=1e-6)

    model.compile(
        loss=NextTokenLoss(),
        metrics=["accuracy", "sparse_categorical_crossentropy"],
        weighted_metrics=["ce"],
    )
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    for name in ("loss", "sparse_categorical_crossentropy", "ce"):
        assert logs[name] == pytest.approx(right, abs=1e-5), name
    assert 0 <= logs["accuracy"] < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": Sparse()}, "SparseCategoricalCrossentropy takes probabilities"),
        ({"loss": Sparse}, r"is a class.*SparseCategoricalCrossentropy\(from_logits=True\)"),
        ({"loss": "binary_crossentropy"}, "'binary_crossentropy' takes probabilities"),
        ({"loss": {"token_logits": Sparse()}}, "takes probabilities"),
        (
            {"metrics": [keras.metrics.SparseCategoricalCrossentropy()]},
            "metric SparseCategoricalCrossentropy takes probabilities",
        ),
        ({"metrics": [["accuracy", keras.metrics.CategoricalCrossentropy]]}, "is a class"),
        ({"weighted_metrics": ["binary_crossentropy"]}, "takes probabilities"),
    ],
)
def test_what_takes_probabilities_is_refused(
    model: GPTModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model.compile("adam", **arguments)


def test_a_distiller_takes_a_name_too_and_asks_for_a_loss(right: float) -> None:
    distiller = Distiller(student=small(), teacher=small())
    with pytest.raises(UserError, match=r"loss=NextTokenLoss\(\)"):
        distiller.compile("adam")
    with pytest.warns(UserWarning, match="from_logits=True"):
        distiller.compile("adam", "sparse_categorical_crossentropy")
    logs = distiller.evaluate(X, Y, verbose=0, return_dict=True)
    assert logs["hard_loss"] == pytest.approx(right, abs=1e-5)


def test_a_compiled_model_comes_back_with_its_loss(tmp_path: Path, right: float) -> None:
    with pytest.warns(UserWarning, match="from_logits=True"):
        (model := small()).compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.save(tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = keras.models.load_model(tmp_path / "model.keras")
    assert again.evaluate(X, Y, verbose=0)[0] == pytest.approx(right, abs=1e-6)


def test_an_unknown_argument_names_the_near_one() -> None:
    with pytest.raises(UserError, match=r"GPTModel has no argument 'num_layer'.*'num_layers'"):
        GPTModel(VOCABULARY, 16, num_layer=1, num_heads=2)
    with pytest.raises(UserError, match="Distiller has no argument 'temprature'"):
        Distiller(small(), small(), temprature=3.0)


# Keras 3, HDF5


def test_objects_of_keras_3_are_named(model: GPTModel) -> None:
    keras3 = pytest.importorskip("keras", "3")
    for arguments in (
        {"optimizer": keras3.optimizers.Adam()},
        {"loss": keras3.losses.SparseCategoricalCrossentropy(from_logits=True)},
        {"loss": keras3.losses.sparse_categorical_crossentropy},
        {"metrics": [keras3.metrics.SparseCategoricalAccuracy()]},
    ):
        with pytest.raises(UserError, match=r"of Keras 3.*`import tf_keras as keras`"):
            model.compile(**arguments)
    model.compile(loss=NextTokenLoss())
    with pytest.raises(UserError, match="callback EarlyStopping is of Keras 3"):
        model.fit(X, Y, callbacks=[keras3.callbacks.EarlyStopping()], verbose=0)


def test_tensorboard_is_an_extra(
    model: GPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tf_gptopt.models.fit_checks.find_spec", lambda name: None)
    model.compile(loss=NextTokenLoss())
    with pytest.raises(UserError, match=r"pip install tensorboard.*Monitor\(log_dir\)"):
        model.fit(X, Y, callbacks=[keras.callbacks.TensorBoard(tmp_path)], verbose=0)


def test_a_shape_that_has_the_name_of_a_checkpoint_says_so(recwarn: Any) -> None:
    GPTModel.from_preset("tiny", num_layers=1)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"gpt2-medium.*random weights"):
        GPTModel.from_preset("gpt2-medium", embedding_dim=16, num_layers=1, vocab_size=50)


def test_keras_3_says_whose_file_it_is(model: GPTModel, tmp_path: Path) -> None:
    keras3 = pytest.importorskip("keras", "3")
    model.save(tmp_path / "model.keras")
    with pytest.raises(UserError, match=r"this is Keras 3.*`import tf_keras as keras`"):
        keras3.models.load_model(tmp_path / "model.keras")


def test_hdf5_is_refused_and_weights_in_it_are_not(model: GPTModel, tmp_path: Path) -> None:
    for path, options in [
        (tmp_path / "model.h5", {}),
        (str(tmp_path / "model.hdf5"), {}),
        (str(tmp_path / "model"), {"save_format": "h5"}),
    ]:
        with pytest.raises(UserError, match=r"as a \.keras file"):
            model.save(path, **options)
    assert not list(tmp_path.iterdir())
    model.save_weights(tmp_path / "weights.h5")
    other = small(seed=1)
    other.load_weights(tmp_path / "weights.h5")
    np.testing.assert_array_equal(other.get_weights()[0], model.get_weights()[0])


# fit


def sequences(x: Any, y: Any) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((x, y))


@pytest.mark.parametrize("loss", [NextTokenLoss(), Sparse(from_logits=True)], ids=["ours", "keras"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.array(["one", "two"]), np.array(["ne", "wo"])), "these are strings.*tokenizer"),
        ((tf.data.Dataset.from_tensor_slices(["one", "two"]).batch(2), None), "are strings"),
        ((X[0], Y[0]), r"one sequence or one token.*\(any,\).*reshape\(-1, time\)"),
        ((sequences(X, Y), None), rf"one sequence.*\({TIME},\).*batch\(8"),
        ((X, Y[:, :-1]), rf"label for each token.*\(any, {TIME - 1}\).*ids\[:, 1:\]"),
        ((X, Y[:, -1]), r"label for each token of the inputs.*labels of shape \(any,\)"),
        ((X, np.eye(VOCABULARY)[Y]), r"one-hot.*argmax\(-1\)"),
        ((np.eye(VOCABULARY)[X], Y), r"one-hot.*argmax\(-1\)"),
        (([*X.tolist()[:-1], [1, 2]], Y.tolist()), "different lengths.*Pad"),
    ],
    ids=["text", "text-set", "row", "unbatched", "short", "last", "one-hot", "hot-x", "ragged"],
)
def test_what_fit_is_given_wrong_is_named(
    model: GPTModel, loss: Any, data: tuple, message: str
) -> None:
    model.compile("sgd", loss)
    with pytest.raises(UserError, match=f"(?s)^[A-Z].*{message}"):
        model.fit(*data, verbose=0)


@pytest.mark.parametrize("labels", [Y[:, :-1], np.eye(VOCABULARY)[Y]], ids=["short", "one-hot"])
def test_a_distillation_names_wrong_labels_as_well(model: GPTModel, labels: Any) -> None:
    distiller = Distiller(small(seed=1), model)
    distiller.compile("sgd", NextTokenLoss())
    with pytest.raises(UserError, match=r"^(There is a label for each token|Labels are token ids)"):
        distiller.fit(X, labels, verbose=0)


def test_ids_under_a_loss_for_one_hot_labels_are_named(model: GPTModel) -> None:
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    with pytest.raises(UserError, match=r"takes one-hot labels.*NextTokenLoss"):
        model.fit(X, Y, verbose=0)


def test_labels_that_are_the_inputs_are_told(capfd: Any) -> None:
    with pytest.warns(UserWarning, match="labels are the inputs"):
        watch_labels(X, X)
    copies = watch_labels(sequences(X, X).batch(4), None)
    np.testing.assert_array_equal([x for x, y in copies], X.reshape(2, 4, TIME))
    assert capfd.readouterr().err.count("labels are the inputs") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert watch_labels(X, Y) is X
        assert len(list(watch_labels(sequences(X, Y).batch(4), None))) == 2
    assert "labels are" not in capfd.readouterr().err


def test_a_training_that_came_to_nothing_is_told() -> None:
    model = small()
    model.compile("sgd", NextTokenLoss())
    with pytest.warns(UserWarning, match="every label is ignored"):
        model.fit(X, np.full_like(Y, -1), verbose=0)
    model.optimizer.learning_rate.assign(300.0)
    with (
        pytest.warns(UserWarning, match="labels are the inputs"),
        pytest.warns(UserWarning, match="worse than an untrained one"),
    ):
        model.fit(X, X, verbose=0, epochs=2)


def test_the_labels_loss_of_a_distillation_is_looked_at_too() -> None:
    distiller = Distiller(student=small(), teacher=small())
    distiller.compile("sgd", NextTokenLoss())
    with pytest.warns(UserWarning, match="worse than an untrained one"):
        warn_of(9.0, distiller)


def test_what_a_last_loss_says() -> None:
    assert doubt(math.log(VOCABULARY) + 0.3, VOCABULARY) is None
    assert doubt(1e-6, VOCABULARY) is None
    assert "3.912" in doubt(8.0, VOCABULARY)
    assert "diverged" in doubt(math.nan, VOCABULARY)


# Heads, and weights that are no numbers


def test_heads_of_a_width_that_leaves_a_rest_decode_as_they_read() -> None:
    with pytest.warns(UserWarning, match="5 wide, 15 together"):
        model = GPTModel(VOCABULARY, 16, 2, num_heads=3, max_sequence_length=16)
    whole = model(X[:1]).numpy()
    cache, found = create_cache(model, batch=1, capacity=TIME), []
    for i in range(TIME):
        logits, cache = cached_forward(model, X[:1, i : i + 1], cache, np.array([i]))
        found.append(logits[0, 0])
    np.testing.assert_allclose(found, whole[0], atol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        prune,
        quantize_aware,
        lambda model: shrink(model, layers=1),
        lambda model: save_model(model, "nowhere"),
    ],
    ids=["prune", "quantize_aware", "shrink", "save"],
)
def test_weights_that_are_no_numbers_are_refused(
    use: Callable[[GPTModel], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = small()
    kernel = model.get_layer("block_0_fc").kernel
    kernel.assign(tf.tensor_scatter_nd_update(kernel, [[0, 0]], [math.nan]))
    with pytest.raises(UserError, match="'block_0_fc/kernel' holds NaN"):
        use(model)
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_weights_are_no_numbers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    model.get_layer("final_norm").beta.assign([math.inf] * 16)
    with monkeypatch.context() as patch:  # as an earlier version wrote it
        patch.setattr(checkpoints, "check_finite", lambda weights: None)
        save_model(model, tmp_path)
    with pytest.raises(UserError, match=r"(?s)'final_norm/beta' holds NaN or infinity"):
        load_model(tmp_path)
