"""Every precision through the whole road: train, distill while pruning, QAT of what is pruned.

How far may the loss be from float32's? bfloat16 keeps 8 bits, so every product is rounded by up to
2^-9 of itself, to either side alike. The distance allowed is that of the loss at the start, ln 41,
rounded once: 0.007 nats. (Measured with 2 blocks, 40 steps a stage: at most 0.001 in bfloat16, by
policy or in the graph, and 0.0003 in float16; another order of the data changes it by 0.001 to
0.025.)
"""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, sparsity, strip_pruning
from tf_gptopt.compression.quantization.grids import find_grid
from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
from tf_gptopt.models.checkpoints import load_checkpoint, save_model
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw, optimizer_for
from tf_gptopt.training.precision import use_precision
from tf_gptopt.training.trainer import fit

VOCAB, LENGTH, STEPS = 41, 12, 30
DISTANCE = 2.0**-9 * np.log(VOCAB)
MIXED = ("mixed_bfloat16", "mixed_float16", "graph_bfloat16")
STAGES = ("train", "distill", "qat")


class Chain:
    """A Markov chain whose next tokens are few: there is something to learn and a floor to it."""

    sequence_length = LENGTH

    def __init__(self):
        chances = np.random.default_rng(7).dirichlet(np.full(VOCAB, 0.1), size=VOCAB)
        self.following = chances.cumsum(1).astype("float32")

    def batches(self, split, batch_size, seed=0, start_step=0):
        def batch(step):
            rng = np.random.default_rng([seed, step])
            ids = [rng.integers(0, VOCAB, batch_size)]
            for _ in range(LENGTH):
                chosen = rng.random((batch_size, 1)) > self.following[ids[-1]]
                ids.append(np.minimum(chosen.sum(1), VOCAB - 1))
            ids = np.stack(ids, 1).astype("int32")
            return ids[:, :-1], ids[:, 1:]

        def all_batches():
            for step in range(start_step, 10**9):
                yield batch(step)

        spec = tf.TensorSpec([batch_size, LENGTH], tf.int32)
        return tf.data.Dataset.from_generator(all_batches, output_signature=(spec, spec))


def start(model, rate, steps):
    """Compile, and return what fits and what brings everything back to before."""
    config = TrainConfig(steps=steps, batch_size=8, learning_rate=rate, log_every=10)
    model.compile(optimizer_for(config), NextTokenLoss())
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    before = [tf.convert_to_tensor(variable) for variable in variables]

    def train(precision, callbacks=()):
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        run = dataclasses.replace(config, precision=precision)
        return fit(model, Chain(), run, None, callbacks, lambda report: None)["loss"]

    return train


def road(precision):
    """`{precision: (loss of each stage, models that the stages leave)}`.

    In float32 each stage is gone through a second time, with its graph rewritten.
    """
    rewrites = precision == "float32"
    use_precision(precision)
    keras.utils.set_random_seed(3)
    losses, models = {}, {}
    rewritten = {}, {}

    teacher = GPTModel(VOCAB, 32, 1, 2, max_sequence_length=LENGTH)
    train = start(teacher, 5e-3, 2 * STEPS)
    if rewrites:
        rewritten[0]["train"] = train("graph_bfloat16")
    losses["train"] = train(precision)

    student = prune(teacher, PruneConfig(0.5, end_step=STEPS // 2, frequency=2))
    train = start(Distiller(student=student, teacher=teacher), 2e-3, STEPS)
    if rewrites:
        rewritten[0]["distill"] = train("graph_bfloat16")
        rewritten[1]["distill"] = strip_pruning(student)
    losses["distill"] = train(precision)
    models["pruned"], models["distill"] = student, strip_pruning(student)

    aware = quantize_aware(models["distill"])
    train = start(aware, 1e-3, STEPS)
    if rewrites:
        rewritten[0]["qat"] = train("graph_bfloat16")
        rewritten[1]["qat"] = strip_quantization(aware)
    losses["qat"] = train(precision)
    models["aware"], models["qat"] = aware, strip_quantization(aware)
    roads = {precision: (losses, models)}
    return {**roads, "graph_bfloat16": rewritten} if rewrites else roads


@pytest.fixture(scope="module")
def roads():
    """All four roads, one after the other in one process."""
    done = {}
    for precision in ("mixed_bfloat16", "mixed_float16", "float32"):
        done |= road(precision)
    return done


@pytest.mark.parametrize("precision", MIXED)
def test_every_stage_learns_as_in_float32(roads, precision):
    expected, losses = roads["float32"][0], roads[precision][0]
    assert tuple(losses) == STAGES
    for stage, loss in losses.items():
        assert 0 < abs(loss - expected[stage]) < DISTANCE, (stage, loss, expected[stage])
    assert losses["train"] < np.log(VOCAB) - 50 * DISTANCE  # it has learnt far more than that


@pytest.mark.parametrize("precision", ["float32", *MIXED])
def test_what_a_stage_promises_holds(roads, precision):
    models = roads[precision][1]
    for model in models.values():
        assert {weight.dtype for weight in model.trainable_weights} == {tf.float32}
    kernels = {}
    for stage in ("distill", "qat"):
        layers = [x for x in models[stage].layers if isinstance(x, keras.layers.Dense)]
        kernels[stage] = {layer.name: layer.kernel.numpy() for layer in layers}
    if precision == "graph_bfloat16":  # its QAT began where float32's did
        zeros = roads["float32"][1]["distill"]
        kernels["distill"] = {
            name: zeros.base_layer(name).kernel.numpy() for name in kernels["qat"]
        }
    assert sparsity(models["distill"])["total"] == pytest.approx(0.5, abs=1e-3)
    for name, kernel in kernels["qat"].items():
        assert not kernel[kernels["distill"][name] == 0].any(), name
        assert find_grid(kernel.T) is not None, name
    table = models["qat"].base_layer("token_embedding").embeddings.numpy()
    assert find_grid(table) is not None


@pytest.mark.parametrize(
    ("precision", "name"), [("mixed_bfloat16", "aware"), ("mixed_float16", "pruned")]
)
def test_wrapped_models_and_results_come_back_from_disk(roads, precision, name, tmp_path):
    models = roads[precision][1]
    ids = next(iter(Chain().batches("valid", 4)))[0]
    model = models[name]
    model.compile(adamw(steps=10), NextTokenLoss())  # under float32, which is global now
    model.train_on_batch(ids, ids)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(ids), model(ids))
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for optimizer in (model.optimizer, again.optimizer):
        scales = isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer)
        assert scales == (precision == "mixed_float16")
    save_model(models["qat"], tmp_path / "qat")  # which any precision can load
    plain = load_checkpoint(tmp_path / "qat")
    assert plain.base_layer("block_0_fc").compute_dtype == "float32"
    for a, b in zip(models["qat"].get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(plain(ids), models["qat"](ids), atol=0.1)
