"""A pipeline of stages computes what the plain model does, on other devices at the same time."""

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.training.memory import split_blocks

SETUP = """
import collections
import numpy as np
from tf_gptopt._keras import keras
from tf_gptopt.models import fused
from tf_gptopt.models.checkpoints import named_weights
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.parallel.pipeline import pipeline, unpipeline

rng = np.random.default_rng(0)
ids = rng.integers(0, 61, [7, 17]).astype(np.int32)
x, y = ids[:, :-1], ids[:, 1:].copy()
y[:2, 4:] = -1  # the first microbatch has few labels, the last one almost all
y[3, 1:] = -1

def build(**overrides):
    keras.utils.set_random_seed(1)
    shape = dict(vocab_size=61, embedding_dim=24, num_layers=2, num_heads=3)
    model = GPTModel(**{**shape, "max_sequence_length": 16, **overrides})
    for weight in model.weights:
        weight.assign_add(rng.normal(0.0, 0.1, weight.shape))
    return model

def device(thing):
    return thing.device.rpartition("device:")[2]

def close(a, b, tolerance):
    np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())))
"""

SAME = """
def compare(policy="float32", tolerance=2e-5, rows=4, microbatches=2, recompute=False, **overrides):
    keras.mixed_precision.set_global_policy(policy)
    inputs, labels = tf.constant(x[:rows]), tf.constant(y[:rows])
    plain = build(**overrides)
    piped = pipeline(plain, 2, microbatches=microbatches)
    piped.recompute = recompute
    close(piped(inputs), plain(inputs), tolerance)
    for model in (plain, piped):
        model.compile(adamw(100, warmup_steps=1), loss=NextTokenLoss())

    @tf.function(autograph=False)
    def of_plain(inputs, labels):
        with tf.GradientTape() as tape:
            loss = plain.loss(labels, plain(inputs, training=True))
            scaled = getattr(plain.optimizer, "get_scaled_loss", lambda loss: loss)(loss)
        gradients = tape.gradient(scaled, plain.trainable_variables)
        unscaled = getattr(plain.optimizer, "get_unscaled_gradients", lambda same: same)
        return loss, unscaled(gradients)

    of_piped = tf.function(piped.loss_and_gradients)
    loss, gradients = of_plain(inputs, labels)
    piped_loss, piped_gradients = of_piped(inputs, labels)
    close(piped_loss, loss, tolerance)
    for a, b in zip(piped_gradients, gradients, strict=True):
        close(a, tf.convert_to_tensor(b), tolerance)
    return plain, piped, of_plain, of_piped.get_concrete_function(inputs, labels).graph

plain, piped, of_plain, graph = compare(num_layers=3, rows=6, microbatches=3)
losses = []
for _ in range(4):
    loss, gradients = of_plain(x[:6], y[:6])
    losses.append(float(loss))
    plain.optimizer.apply_gradients(zip(gradients, plain.trainable_variables, strict=True))
history = piped.fit(x[:6], y[:6], batch_size=6, epochs=4, verbose=0).history
close(history["loss"], losses, 2e-5)
close(piped.evaluate(x, y, batch_size=7, verbose=0), NextTokenLoss()(y, plain(x)), 2e-5)
back = unpipeline(piped)
assert type(back) is GPTModel
assert {device(weight) for weight in back.weights} == {"CPU:0"}
for name, weight in named_weights(plain).items():
    close(named_weights(back)[name], weight, 1e-3)

# Recomputed blocks; a table for the logits alone; microbatches of 2 and 3 sequences; half precision
# scales the loss, and a loss that is NaN updates nothing
_, half, *_ = compare("mixed_float16", 3e-2, rows=5, tie_embeddings=False, recompute=True)
for weight in (1.0, np.nan):
    half.train_on_batch(x[:5], y[:5], np.full(5, weight, "float32"))
    assert half.optimizer.iterations == 1

# Weights, moments and every operation of a stage are where the stage is
counts = collections.Counter(device(weight) for weight in piped.weights)
assert counts == {"CPU:0": 2 + 24, "CPU:1": 12 + 2}, counts
homes = {variable.name: device(variable) for variable in piped.weights}
moments = [v for v in piped.optimizer.variables if "/m/" in v.name or "/v/" in v.name]
assert len(moments) == 2 * len(piped.weights)
for moment in moments:
    assert device(moment) == homes[moment.name.partition("/")[2][2:]], moment.name
whole = sum(weight.shape.num_elements() for weight in piped.weights)
for name in counts:
    part = sum(w.shape.num_elements() for w in piped.weights if device(w) == name)
    assert 0.3 * whole < part < 0.7 * whole

for kind in ("PartitionedCall", "MatMul"):
    used = {device(op) for op in graph.get_operations() if op.type.endswith(kind)}
    assert used == {"CPU:0", "CPU:1"}, (kind, used)
with tf.device("CPU:1"):
    assert device(fused.gelu(tf.ones([4]))) == "CPU:1"
print("same")
"""

IN_FLIGHT = """
import time

clocks = {
    (stage, m): [tf.Variable(0.0, dtype=tf.float64) for _ in range(2)]
    for stage in range(2) for m in range(2)
}
seen = collections.Counter()

def clock(after):  # not tf.timestamp: such operations wait for each other
    now = lambda _: time.perf_counter()
    return tf.numpy_function(now, [tf.reshape(after, [-1])[:1]], tf.float64, stateful=False)

def timed(stage, x, table, training):
    begun, ended = clocks[stage, seen[stage]]
    seen[stage] += 1
    with tf.control_dependencies([begun.assign(clock(x))]):
        y = forward(stage, tf.identity(x), table, training)
    last = y.head.rows if stage else y  # the loss starts from there
    with tf.control_dependencies([ended.assign(clock(last))]):
        last = tf.identity(last)
    if stage:
        y.head = y.head._replace(rows=last)
    return y if stage else last

keras.mixed_precision.set_global_policy("float32")
busy = pipeline(build(embedding_dim=192), 2, microbatches=2)
busy.compile(adamw(100, warmup_steps=1), loss=NextTokenLoss())
forward, busy.placement.forward = busy.placement.forward, timed
step = tf.function(busy.loss_and_gradients)
together = 0
for _ in range(20):  # the first one compiles, and the machine may be busy with other work
    step(tf.constant(x[:4]), tf.constant(y[:4]))
    begun, ended = ({key: float(pair[i]) for key, pair in clocks.items()} for i in range(2))
    assert begun[1, 0] >= ended[0, 0]  # a microbatch goes through the stages in order
    assert begun[0, 1] >= ended[0, 0]  # and a stage does one task at a time
    assert begun[1, 1] >= ended[1, 0]
    together += begun[1, 0] < ended[0, 1] and begun[0, 1] < ended[1, 0]
assert together >= 3, together  # stage 1 is at microbatch 0 while stage 0 is at microbatch 1
print("in flight")
"""

FIT = """
import tempfile
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.trainer import fit

class Random:
    sequence_length = 16
    def batches(self, split, batch_size, seed=0, start_step=0):
        def batch(step):
            shape = [batch_size, 17]
            ids = tf.random.stateless_uniform(shape, [seed, step], maxval=61, dtype=tf.int32)
            return ids[:, :-1], ids[:, 1:]
        return tf.data.Dataset.range(start_step, 2**40).map(batch)

class Crash(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            raise InterruptedError

def train(folder=None, callbacks=(), **options):
    rng.bit_generator.state = np.random.default_rng(5).bit_generator.state
    model = build(dropout=0.1)
    config = TrainConfig(6, 1, log_every=1, checkpoint_every=1e-9, **options)
    fit(model, Random(), config, folder, callbacks, lambda report: None)
    return model.get_weights()

whole = train(pipeline=2)
folder = tempfile.mkdtemp()
try:
    train(folder, [Crash()], pipeline=2)
except InterruptedError:
    pass
for a, b in zip(train(folder, pipeline=2), whole, strict=True):
    np.testing.assert_array_equal(a, b)
print("resumed")
"""


@pytest.mark.parametrize(
    ("blocks", "stages", "split"),
    [(5, 2, [(0, 3), (3, 5)]), (5, 3, [(0, 2), (2, 4), (4, 5)]), (2, 2, [(0, 1), (1, 2)])],
)
def test_blocks_are_divided_evenly(blocks, stages, split):
    assert split_blocks(blocks, stages) == split


def test_more_stages_than_blocks():
    with pytest.raises(UserError, match="cannot be divided among 3 stages"):
        split_blocks(2, 3)


def test_a_pipeline_is_the_plain_model_with_stages_at_work_together(run_child):
    printed = run_child(SETUP + SAME + IN_FLIGHT + FIT, devices=2)
    assert printed.split("\n")[:-1] == ["same", "in flight", "resumed"]


def test_a_task_waits_for_those_that_it_needs_and_few_microbatches_are_kept():
    from tf_gptopt.training.parallel.stages import BACKWARD, FORWARD, schedule

    for stages, microbatches in ((2, 1), (2, 5), (4, 3), (3, 8)):
        done, kept, most = [], [0] * stages, [0] * stages
        for stage, m, task in schedule(stages, microbatches):
            if task == FORWARD:
                assert stage == 0 or (stage - 1, m, FORWARD) in done
            else:
                assert (stage, m, FORWARD) in done
                assert stage == stages - 1 or (stage + 1, m, BACKWARD) in done
            done.append((stage, m, task))
            kept[stage] += 1 if task == FORWARD else -1
            most[stage] = max(most[stage], kept[stage])
        assert len(set(done)) == len(done) == 2 * stages * microbatches
        assert most == [min(stages - stage, microbatches) for stage in range(stages)]


def test_mistakes(tiny_model):
    import tensorflow as tf

    from tf_gptopt.compression.pruning.config import PruneConfig
    from tf_gptopt.compression.pruning.pruner import prune
    from tf_gptopt.training.config import TrainConfig
    from tf_gptopt.training.parallel.pipeline import pipeline
    from tf_gptopt.training.parallel.stages import split_batch

    tf.ones([])  # TensorFlow computes, so that the CPU stays one device
    model = tiny_model()
    for wrong, remedy in (
        ({"stages": 64}, "Take fewer stages"),
        ({"stages": 1}, "two stages or more"),
        ({"devices": ["CPU:0", "CPU:77"]}, "no device 'CPU:77'"),
        ({"devices": ["CPU:0", "CPU:0"]}, "two different devices"),
        ({}, "Give either stages"),
        ({"devices": ["CPU:0"], "microbatches": 0}, "two different devices"),
    ):
        with pytest.raises(UserError, match=remedy):
            pipeline(model, **wrong)
    with pytest.raises(UserError, match="strip_pruning"):
        pipeline(prune(model, PruneConfig(min_weights=1)), 2)
    with pytest.raises(UserError, match="larger batch or fewer microbatches"):
        split_batch(tf.ones([3, 2]), 4)
    with pytest.raises(UserError, match="either a mesh or a pipeline"):
        TrainConfig(pipeline=2, mesh="model=2")
