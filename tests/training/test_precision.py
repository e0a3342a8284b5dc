"""The precision in use: Keras's policy and the rewrite of graphs go on, and off, together."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.quantization.qat import quantize_aware
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training import precision
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.precision import choose_precision, model_policies, rewriting, use_precision
from tf_gptopt.training.trainer import fit


class Counting:
    sequence_length = 8

    def batches(self, split, batch_size, seed=0, start_step=0):
        ids = (np.arange(batch_size)[:, None] * 5 + np.arange(9)) % 29
        return tf.data.Dataset.from_tensors((ids[:, :-1], ids[:, 1:])).repeat()


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    use_precision("float32")


def build(**options):
    keras.utils.set_random_seed(0)
    return GPTModel(29, 16, 1, 2, max_sequence_length=8, **options)


CONFIG = TrainConfig(steps=6, batch_size=4, learning_rate=1e-2)


def trained(name="auto"):
    model = build()
    fit(model, Counting(), dataclasses.replace(CONFIG, precision=name), None, [], lambda report: 0)
    return model.get_weights()


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_policy_and_rewrite_are_set_together():
    assert use_precision("graph_bfloat16")[0] == "graph_bfloat16"
    assert keras.mixed_precision.global_policy().name == "float32"
    assert precision.compute_dtype(build()) == "bfloat16"
    assert use_precision("mixed_float16")[0] == "mixed_float16"
    assert keras.mixed_precision.global_policy().name == "mixed_float16"
    assert precision.compute_dtype(build()) == "float16"
    assert use_precision("float32")[0] == "float32"
    assert precision.compute_dtype(build()) == "float32"


def nodes_that_run(model):
    """`(operation, dtype)` of each node of a training step, as TensorFlow optimized it."""
    from tensorflow.python.eager import context

    data = next(iter(Counting().batches("train", 4)))
    context.enable_run_metadata()
    try:
        model.train_on_batch(*data)
        graphs = [g.post_optimization_graph for g in context.export_run_metadata().function_graphs]
    finally:
        context.disable_run_metadata()
    parts = [part for g in graphs for part in (g, *g.library.function)]
    nodes = [n for part in parts for n in getattr(part, "node", None) or part.node_def]
    return [(n.op, tf.dtypes.as_dtype(n.attr["T"].type)) for n in nodes if n.attr["T"].type]


def test_the_graph_that_runs_multiplies_bfloat16_and_updates_float32():
    model = build()
    model.compile(adamw(steps=10), loss=NextTokenLoss())
    products = ("MatMul", "BatchMatMul")
    for name, dtype in (("graph_bfloat16", tf.bfloat16), ("float32", tf.float32)):
        use_precision(name)
        nodes = nodes_that_run(model)  # the same function, and another graph of it each time
        dtypes = [d for op, d in nodes if op.removeprefix("_Mkl").startswith(products)]
        assert dtypes.count(dtype) >= 12  # four Dense and the logits, forward and twice backward
        updates = {d for op, d in nodes if op == "ResourceApplyAdam"}
        assert updates == {tf.float32}


def test_fit_switches_for_its_own_time():
    plain = trained("float32")
    rewritten = trained("graph_bfloat16")
    assert precision.compute_dtype(build()) == "float32"
    assert not equal(plain, rewritten)
    use_precision("graph_bfloat16")
    assert equal(trained("auto"), rewritten)
    assert equal(trained("float32"), plain)
    with rewriting("float32"):
        assert equal(trained("auto"), plain)


def test_auto_on_a_cpu_with_bfloat16_units(monkeypatch):
    monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx512_bf16"})
    name, why = use_precision("auto")
    assert name == "graph_bfloat16"
    assert "avx512_bf16" in why
    assert "rewriting" in why
    assert choose_precision("auto")[0] == "mixed_bfloat16"  # a policy, for Keras
    assert choose_precision("graph_bfloat16")[0] == "float32"
    monkeypatch.setattr(precision, "cpu_flags", set)
    name, why = use_precision("auto")
    assert (name, why) == ("float32", "this CPU has no bfloat16 units")
    assert precision.compute_dtype(build()) == "float32"


def test_without_onednn_nothing_is_rewritten_and_it_says_so(run_child):
    code = """
        from tf_gptopt._errors import UserError
        from tf_gptopt.training import precision
        try:
            precision.use_precision("graph_bfloat16")
        except UserError as error:
            print(error)
        precision.cpu_flags = lambda: {"amx_bf16"}
        print(precision.use_precision("auto"))
    """
    said = run_child(code, devices=1, TF_ENABLE_ONEDNN_OPTS="0")
    assert "needs a CPU alone, and oneDNN" in said
    assert "('mixed_bfloat16', 'this CPU multiplies bfloat16 (amx_bf16)')" in said


def test_a_model_of_another_policy_is_refused():
    use_precision("mixed_bfloat16")
    model = build(tie_embeddings=False)
    for other in (model, quantize_aware(model)):  # float32 parts of it do not make it float32
        assert model_policies(other) == {"mixed_bfloat16"}
        for name in ("float32", "graph_bfloat16"):
            config = dataclasses.replace(CONFIG, precision=name)
            with pytest.raises(UserError, match=f"use_precision..{name}"):
                fit(other, Counting(), config)


def test_replicas_rewrite_and_wait_for_a_plateau_alike(run_child):
    printed = run_child(
        """
        from tf_gptopt._keras import keras
        from tf_gptopt.models.gpt import GPTModel
        from tf_gptopt.training.config import TrainConfig
        from tf_gptopt.training.schedules import schedule_of
        from tf_gptopt.training.trainer import fit

        class Noise:
            sequence_length = 8

            def batches(self, split, batch_size, seed=0, start_step=0):
                def batch(step):
                    seeds = [seed, step]
                    ids = tf.random.stateless_uniform([4, 9], seeds, maxval=31, dtype="int32")
                    return ids[:, :-1], ids[:, 1:]
                return tf.data.Dataset.range(start_step, 2**40).map(batch)

        def train(strategy, precision):
            keras.utils.set_random_seed(0)
            with strategy.scope():
                model = GPTModel(31, 16, 1, 2, max_sequence_length=8)
            config = TrainConfig(
                50, 4, schedule="plateau", plateau_patience=4, precision=precision
            )
            reports = []
            loss = fit(model, Noise(), config, None, [], reports.append)["loss"]
            scale = schedule_of(model.optimizer).scale
            local = [float(x) for x in strategy.experimental_local_results(scale)]
            return loss, local, reports[-1].mfu

        two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        loss, scales, mfu = train(two, "float32")
        assert len(scales) == 2 and scales[0] == scales[1] < 1.0, scales
        assert mfu > 0.0
        rewritten, _, _ = train(two, "graph_bfloat16")
        assert 1e-7 < abs(rewritten - loss) < 5e-3, (rewritten, loss)
        print("alike")
        """
    )
    assert "alike" in printed
