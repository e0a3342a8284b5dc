# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From text to a small GPT that runs on the edge
#
# Runs on Colab (CPU, GPU or TPU: *Runtime > Change runtime type*) and on any machine, in a few
# minutes. It trains a GPT on Python's standard library, distills it into half its depth, prunes
# half of the weights, trains on the int8 grid, and exports a TFLite file with a KV cache.

# %%
import importlib.util
import os
from pathlib import Path

if importlib.util.find_spec("tf_gptopt") is None:  # a fresh Colab
    wheels = sorted(map(str, Path().glob("tf_gptopt-*.whl")))
    if not wheels:
        raise SystemExit(
            "No package index has tf-gptopt. Make its wheel in a copy of the repository, with "
            "`pip wheel --no-deps --wheel-dir dist .`, upload dist/tf_gptopt-*.whl here (the "
            "folder sign on the left) and run this cell again."
        )
    # %pip install -q {wheels[-1]}

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tf_keras as keras

import tf_gptopt as tgo

STEPS = int(os.environ.get("QUICKSTART_STEPS", "300"))  # raise it on a GPU

# %% [markdown]
# ## Text to tokens
# No download: the corpus is the source code of the Python that runs this notebook. Name files or
# folders in `load_corpus([...])` to use your own text, in any language.

# %%
documents = tgo.load_corpus()[:150]
tokenizer = tgo.train_tokenizer((document.text for document in documents), vocab_size=2048)
tgo.write_dataset(documents, tokenizer, "dataset", sequence_length=128)
dataset = tgo.TokenDataset.load("dataset")
print(f"{len(documents)} documents, {dataset.num_tokens('train'):,} training tokens")

# %% [markdown]
# ## Train, the Keras way
# `choose_strategy` finds the TPU or the GPUs and says why; `choose_precision` picks the policy.

# %%
strategy, why = tgo.choose_strategy("auto")
print(why)
policy, why = tgo.choose_precision("auto")
print(f"{policy}: {why}")
keras.mixed_precision.set_global_policy(policy)

with strategy.scope():
    teacher = tgo.GPTModel(tokenizer.vocab_size, 128, 4, 4, max_sequence_length=128)
    teacher.compile(tgo.adamw(steps=STEPS, learning_rate=2e-3), loss=tgo.NextTokenLoss())
teacher.tokenizer = tokenizer
teacher.fit(dataset.batches("train", 8), steps_per_epoch=STEPS)

# %% [markdown]
# ## Distill
# The student starts as two of the teacher's four blocks and learns from its soft labels.

# %%
with strategy.scope():
    student = tgo.shrink(teacher, layers=2)
    distiller = tgo.Distiller(student=student, teacher=teacher, temperature=2.0, alpha=0.5)
    distiller.compile(tgo.adamw(steps=STEPS // 2), loss=tgo.NextTokenLoss())
distiller.fit(dataset.batches("train", 8), steps_per_epoch=STEPS // 2)

# %% [markdown]
# ## Prune and quantize
# Both through tfmot; what one stage promises, the next one keeps.

# %%
config = tgo.PruneConfig(sparsity=0.5, end_step=STEPS // 4, frequency=5)
with strategy.scope():
    sparse = tgo.prune(distiller.student, config)
    sparse.compile(tgo.adamw(steps=STEPS // 3, learning_rate=5e-4), loss=tgo.NextTokenLoss())
sparse.fit(
    dataset.batches("train", 8),
    steps_per_epoch=STEPS // 3,
    callbacks=tgo.pruning_callbacks(sparse),
)
sparse = tgo.strip_pruning(sparse)

with strategy.scope():
    aware = tgo.quantize_aware(sparse, tgo.QuantConfig("int8"))
    aware.compile(tgo.adamw(steps=STEPS // 4, learning_rate=2e-4), loss=tgo.NextTokenLoss())
aware.fit(dataset.batches("train", 8), steps_per_epoch=STEPS // 4)
final = tgo.strip_quantization(aware)

# %% [markdown]
# ## Export, and let it speak
# The file runs with `ai-edge-litert`, `numpy` and `tokenizers`, without TensorFlow.

# %%
info = tgo.export_tflite(final, "edge/model.tflite", tgo.QuantConfig("int8"), tokenizer=tokenizer)
print(f"{info.bytes:,} bytes")
gpt = tgo.TFLiteGPT("edge/model.tflite")
print(gpt.generate("def __init__(self", max_new_tokens=40))

# %% [markdown]
# ## What it cost
# Quality, size and speed side by side, on text that no model was trained on.

# %%
from tf_gptopt.evaluation.report import rich_table

report = tgo.evaluate(
    [
        tgo.Candidate("teacher", teacher),
        tgo.Candidate("student", student, "teacher"),
        tgo.Candidate("final", final, "student"),
        tgo.Candidate("int8 file", "edge/model.tflite", "student"),
    ],
    dataset,
    tokens=4096,
)
import rich

rich.print(rich_table(report))
print(report.why)
