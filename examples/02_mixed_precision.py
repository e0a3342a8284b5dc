"""Half the bits in the arithmetic, float32 in the weights: Keras's dtype policies.

python examples/02_mixed_precision.py [--quick] [mixed_bfloat16 | mixed_float16 | float32]
"""

import sys
import tempfile
import time

import tf_keras as keras

import tf_gptopt as tgo

quick = "--quick" in sys.argv
asked = [word for word in sys.argv[1:] if not word.startswith("--")]
steps = 10 if quick else 500

policy, why = tgo.choose_precision("auto")
print(f"this machine would take {policy}: {why}")
policies = asked or ["float32", "mixed_bfloat16", "mixed_float16"]

documents = tgo.load_corpus()[: 60 if quick else None]
tokenizer = tgo.train_tokenizer((document.text for document in documents), vocab_size=1024)
folder = tempfile.mkdtemp()
tgo.write_dataset(documents, tokenizer, folder, sequence_length=64)
dataset = tgo.TokenDataset.load(folder)

for policy in policies:
    keras.mixed_precision.set_global_policy(policy)
    keras.utils.set_random_seed(0)
    model = tgo.GPTModel(tokenizer.vocab_size, 64, 2, 4, max_sequence_length=64)
    # compile wraps the optimizer in a LossScaleOptimizer under mixed_float16
    model.compile(tgo.adamw(steps=steps), loss=tgo.NextTokenLoss())
    model.fit(dataset.batches("train", 8), steps_per_epoch=2, verbose=0)  # traces the step
    began = time.perf_counter()
    history = model.fit(dataset.batches("train", 8), steps_per_epoch=steps, verbose=0)
    rate = steps * 8 * 64 / (time.perf_counter() - began)
    print(f"{policy:>15}  loss {history.history['loss'][-1]:.3f}  {rate:,.0f} tokens/s")
