"""A GPT over a mesh computes, learns and goes on as the plain one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tf_gptopt.data.corpus import Document
from tf_gptopt.data.packing import write_dataset
from tf_gptopt.models.checkpoints import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]

SETTING = """
import os
import shutil
import tempfile
import numpy as np
from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.checkpoints import named_weights
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.parallel.placement import bytes_per_device
from tf_gptopt.training.parallel.tensor import shard, unshard
from tf_gptopt.training.trainer import fit

def build(**shape):
    shape = {"vocab_size": 31, "embedding_dim": 16, "num_layers": 1, "num_heads": 4, **shape}
    return GPTModel(max_sequence_length=8, **shape)

def noisy(model):
    rng = np.random.default_rng(0)
    for weight in model.weights:
        noise = rng.normal(0.0, 0.3, weight.shape)
        weight.assign(noise + 1.0 if "gamma" in weight.name else noise)
    return model

rng = np.random.default_rng(1)
ids = rng.integers(0, 31, (4, 9)).astype(np.int32)
inputs, labels = ids[:, :-1], ids[:, 1:].copy()
labels[0, :5] = -1  # padding, unevenly spread over the rows of a mesh

def one_step(model):  # of gradient descent: the weights change by the gradient
    weights = named_weights if isinstance(model, GPTModel) else type(model).named_weights
    before = weights(model)
    model.compile(keras.optimizers.SGD(1.0), NextTokenLoss())
    loss = model.fit(inputs, labels, batch_size=4, verbose=0).history["loss"][0]
    return loss, {name: before[name] - after for name, after in weights(model).items()}

def near(a, b, tolerance):  # as a fraction of the largest element
    for name in b:
        error = np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()
        assert error < tolerance, (name, error)
"""

EQUAL = """
UNEVEN = {"tie_embeddings": False, "num_layers": 2, "num_heads": (5, 4), "head_dim": 3,
          "intermediate_dim": (9, 30)}
cases = [({}, ["batch=2,model=2", "model=4", "batch=4"]), (UNEVEN, ["model=2"])]
for shape, meshes in cases:
    plain = noisy(build(**shape))
    logits, weights = plain(inputs).numpy(), named_weights(plain)
    sharded = [shard(plain, mesh) for mesh in meshes]
    loss, gradient = one_step(plain)
    for model in sharded:
        # float32 sums in another order: a few units of 1e-7 a product
        np.testing.assert_allclose(model(inputs), logits, atol=2e-5)
        near(model.named_weights(), weights, 1e-9)
        sharded_loss, sharded_gradient = one_step(model)
        assert abs(sharded_loss - loss) < 2e-6 * loss, (model.mesh, sharded_loss, loss)
        near(sharded_gradient, gradient, 2e-5)
        again = unshard(model)
        assert again.config == plain.config
        near(named_weights(again), named_weights(plain), 2e-5)

# one sequence fewer than rows, another loss, a metric: logits are gathered
model = shard(noisy(build()), "batch=2")
labels[:] = np.abs(labels)
model.compile(loss=keras.losses.SparseCategoricalCrossentropy(True), metrics=["accuracy"])
other = model.evaluate(inputs[:1], labels[:1], verbose=0)
model.compile(loss=NextTokenLoss())
np.testing.assert_allclose(model.evaluate(inputs[:1], labels[:1], verbose=0), other[0], rtol=1e-6)
assert model.predict(inputs[:3], verbose=0).shape == (3, 8, 31)
labels[0, 0] = 31  # no token
try:
    model.evaluate(inputs[:1], labels[:1], verbose=0)
except UserError as error:
    assert str(error).endswith("Received a label: 31"), error
else:
    raise AssertionError("a label beyond the vocabulary was taken")
"""

TRAINED = """
from collections import Counter
from tensorflow.python.eager import context

class Noise:
    sequence_length = 8
    def batches(self, split, batch_size, seed=0, start_step=0):
        def batch(step):
            shape = [batch_size, 9]
            ids = tf.random.stateless_uniform(shape, [seed, step], maxval=31, dtype=tf.int32)
            return ids[:, :-1], ids[:, 1:]
        return tf.data.Dataset.range(start_step, 2**40).map(batch)

def train(mesh, folder=None, **shape):
    keras.utils.set_random_seed(5)
    model, losses = build(**shape), []
    config = TrainConfig(8, 4, learning_rate=1e-2, log_every=2, checkpoint_every=1e-9, mesh=mesh)
    fit(model, Noise(), config, folder, (), lambda report: losses.append(report.loss))
    return losses, named_weights(model)

MESH = "batch=2,model=2"
losses, weights = train(None)
sharded_losses, sharded_weights = train(MESH)
np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
for name in weights:  # Adam divides by the root of tiny squares: there a rounding error grows
    np.testing.assert_allclose(sharded_weights[name], weights[name], atol=2e-3)

folder = tempfile.mkdtemp()
_, whole = train(MESH, folder, dropout=0.2)
shutil.rmtree(os.path.join(folder, "step-00000008"))  # as if it had been killed just before
losses, resumed = train(MESH, folder, dropout=0.2)
assert len(losses) == 1, losses  # step 8
for name in whole:
    np.testing.assert_array_equal(whole[name], resumed[name])

# What lies where
plain = build(embedding_dim=32)
total = 4 * plain.count_params()
for mesh in ("model=2", MESH, "batch=4"):
    model = shard(plain, mesh)
    model.compile(adamw(steps=10), NextTokenLoss())
    model.optimizer.build(model.trainable_variables)
    weights, optimizer = bytes_per_device(model.variables), model.optimizer.variables
    assert len(weights) == model.mesh.size and sum(weights.values()) == total
    assert max(weights.values()) < 1.25 * total / model.mesh.size, weights  # whole pieces
    moments = bytes_per_device(v for v in optimizer if v.shape.rank)
    assert moments == {device: 2 * size for device, size in weights.items()}

# What runs where: products alike on all devices, and an optimizer's part beside its weight
model = shard(build(), MESH)
model.compile(adamw(steps=10), NextTokenLoss())
model.optimizer.build(model.trainable_variables)
step = tf.function(lambda x, y: model.train_step((x, y)))
context.context().enable_graph_collection()
step(tf.constant(inputs), tf.constant(ids[:, 1:]))
parts = context.context().export_run_metadata().function_graphs[-1].partition_graphs
counts = [Counter(node.op for node in part.node) for part in parts]
assert len(counts) == 4
products = {sum(n for op, n in count.items() if "MatMul" in op) for count in counts}
assert len(products) == 1 and products.pop() > 20, counts
homes = sorted(Counter(v.device for v in model.trainable_variables).values())
for op in ("L2Loss", "ResourceApplyAdam"):
    assert sorted(count[op] for count in counts) == homes, (op, counts)

keras.mixed_precision.set_global_policy("mixed_bfloat16")
plain = noisy(build())
model = shard(plain, MESH)
logits = plain(inputs).numpy()
np.testing.assert_allclose(model(inputs), logits, atol=0.05 * logits.std())  # 8 bits a number
assert unshard(model).base_layer("block_0_fc").compute_dtype == "bfloat16"
print("trained")
"""


DTENSOR = """
from tensorflow.experimental import dtensor
from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel

keras.backend.experimental.enable_tf_random_generator()
keras.utils.set_random_seed(0)
dtensor.initialize_accelerator_system("CPU")
mesh = dtensor.create_mesh([("batch", 2), ("model", 2)], device_type="CPU")
layouts = keras.dtensor.experimental.LayoutMap(mesh=mesh)
layouts[".*qkv.*kernel"] = dtensor.Layout([dtensor.UNSHARDED, "model"], mesh)
layouts[".*fc.*kernel"] = dtensor.Layout([dtensor.UNSHARDED, "model"], mesh)
layouts[".*out.*kernel"] = dtensor.Layout(["model", dtensor.UNSHARDED], mesh)
layouts[".*proj.*kernel"] = dtensor.Layout(["model", dtensor.UNSHARDED], mesh)
rows = dtensor.Layout(["batch", dtensor.UNSHARDED], mesh)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
with layouts.scope():
    model = GPTModel(31, 16, 1, 4, max_sequence_length=8, dropout=0.1)
    model.compile(keras.optimizers.Adam(mesh=mesh), loss)
plain = tf.data.Dataset.from_tensors((tf.zeros([4, 8], tf.int32),) * 2)
sharded = dtensor.DTensorDataset(
    tf.data.Dataset.from_tensors((tf.zeros([8], tf.int32),) * 2).repeat(4),
    global_batch_size=4, mesh=mesh, layouts=(rows, rows), batch_dim="batch",
)
for dataset, complaint in ((plain, "tf._element_layouts"), (sharded, "SPMD expansion")):
    try:
        model.fit(dataset, steps_per_epoch=1, verbose=0)
    except tf.errors.UnknownError as error:
        assert complaint in str(error), error
    else:
        raise AssertionError("DTensor has learned this: see why tensor.py does without it")
print("stopped")
"""


def test_it_computes_trains_and_goes_on_as_the_plain_model(run_child):
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    out = run_child(SETTING + EQUAL + TRAINED, devices=4, XLA_FLAGS=quick)
    assert out.endswith("trained\n")


def test_dtensor_still_stops_where_the_module_says(run_child):
    assert run_child(DTENSOR, devices=4).endswith("stopped\n")


def test_from_the_command_line(tmp_path, tiny_tokenizer):
    documents = [Document(f"{i}", f"def function_{i}(): return {i} * {i}\n" * 4) for i in range(40)]
    write_dataset(documents, tiny_tokenizer, tmp_path / "data", sequence_length=16)
    tiny_tokenizer.save(tmp_path / "data")
    command = ["train", "--dataset", "data", "--out", "out", "--fit.mesh", "batch=2,model=2"]
    command += ["--model.embedding_dim", "16", "--model.num_layers", "1", "--model.num_heads", "2"]
    command += ["--fit.steps", "3", "--fit.batch_size", "4", "--fit.precision", "float32"]
    done = subprocess.run(
        [sys.executable, "-m", "tf_gptopt", *command],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a mesh of 4 devices, batch=2,model=2" in done.stdout + done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 3
    model = load_checkpoint(tmp_path / "out")
    assert model.config.num_heads == 2
    assert model.count_params() == metrics["parameters"]
    assert np.isfinite(model(np.zeros([1, 16], np.int32))).all()
