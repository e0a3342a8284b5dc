"""One device, two and four mirrored ones: the same loss curve, and the same bytes on each replica.

The tolerance: N devices take sums in another order, so gradients differ by float32's rounding, 1e-7
of their size. Adam divides a gradient by its own size, which can turn the rounding of a gradient
near zero into a fraction of the learning rate for that one weight. Measured are differences of at
most 1.3e-7 of the loss; 1e-5 is allowed, a thousandth of what one wrong microbatch would make.
"""

import json

import numpy as np

CODE = """
import json
import numpy as np
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, sparsity
from tf_gptopt.compression.quantization.qat import quantize_aware
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.trainer import fit

class Padded:
    sequence_length = 8
    def batches(self, split, batch_size, seed=0, start_step=0):
        def batch(step):
            shape = [batch_size, 9]
            ids = tf.random.stateless_uniform(shape, [seed, step], maxval=41, dtype=tf.int32)
            keep = tf.random.stateless_uniform([batch_size, 8], [seed + 1, step]) < 0.6
            whole = tf.range(batch_size)[:, None] < 3  # of the first microbatch or replica
            return ids[:, :-1], tf.where(keep | whole, ids[:, 1:], -1)
        return tf.data.Dataset.range(start_step, 2**40).map(batch)

def gpt():
    return GPTModel(41, 16, 1, 2, max_sequence_length=8)

def train(strategy, kind):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = student = gpt()
        if kind == "quantized":
            model = student = quantize_aware(student)
        if kind == "pruned and distilled":
            schedule = PruneConfig(sparsity=0.5, end_step=4, frequency=2, min_weights=1)
            student = prune(student, schedule)
            model = Distiller(student=student, teacher=gpt())
    losses, report = [], lambda progress: losses.append(progress.loss)
    config = TrainConfig(
        6, 16, log_every=1, learning_rate=1e-2, clip_norm=0.5, warmup_steps=2,
        accumulate=2 if kind == "pruned and distilled" else 1,
    )
    fit(model, Padded(), config, None, [], report)
    variables = student.weights + model.optimizer._momentums + model.optimizer._velocities
    check_equal_bytes(strategy, variables)
    assert model.optimizer.iterations.numpy() == 6
    if kind == "pruned and distilled":  # masks step once an update
        assert student.get_layer("prune_low_magnitude_block_0_fc").steps_done == 6
        assert sparsity(student)["block_0_fc"] == 0.5
    if kind == "plain":
        check_skip(strategy, model, variables)
    return losses

def check_equal_bytes(strategy, variables):
    for variable in variables:
        first, *others = strategy.experimental_local_results(variable)
        assert len(others) == strategy.num_replicas_in_sync - 1
        for other in others:
            assert other.numpy().tobytes() == first.numpy().tobytes(), variable.name

def check_skip(strategy, model, variables):
    # a weight that is no number, on the last replica alone
    before = [variable.numpy() for variable in variables]
    inputs, labels = next(iter(Padded().batches("train", 16)))
    weights = np.ones(16, "float32")
    weights[-1] = np.nan
    model.fit(tf.data.Dataset.from_tensors((inputs, labels, weights)), verbose=0)
    check_equal_bytes(strategy, variables)
    for variable, value in zip(variables, before):
        np.testing.assert_array_equal(variable.numpy(), value)
    optimizer = model.optimizer
    assert (optimizer.iterations.numpy(), optimizer.skipped.numpy()) == (6, 1)

one, many = tf.distribute.get_strategy(), tf.distribute.MirroredStrategy()
assert many.num_replicas_in_sync == len(tf.config.list_logical_devices("CPU"))
alone = {kind: train(one, kind) for kind in ALONE}
print("end", json.dumps([alone, {kind: train(many, kind) for kind in MANY}]))
"""

PLAIN, SPARSE, QUANTIZED = "plain", "pruned and distilled", "quantized"


def curves(run_child, devices, alone, many):
    lists = f"ALONE, MANY = {alone}, {many}\n"
    return json.loads(run_child(lists + CODE, devices=devices).splitlines()[-1][len("end ") :])


def test_two_and_four_devices_train_as_one(run_child):
    one, two = curves(run_child, 2, [PLAIN, SPARSE, QUANTIZED], [PLAIN, SPARSE])
    _, four = curves(run_child, 4, [], [SPARSE, QUANTIZED])
    for kind, losses in (*two.items(), *four.items()):
        assert max(losses) - min(losses) > 1e-3  # updates change the loss by more than is allowed
        np.testing.assert_allclose(losses, one[kind], rtol=1e-5, err_msg=kind)
