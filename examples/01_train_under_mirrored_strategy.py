"""Train a GPT with `model.fit` on every GPU of the machine (or on one CPU): the Keras way.

python examples/01_train_under_mirrored_strategy.py [--quick]
"""

import sys
import tempfile

import tf_gptopt as tgo

quick = "--quick" in sys.argv
steps = 20 if quick else 1000

# Text -> tokenizer -> packed token ids. The default corpus is Python's own standard library.
documents = tgo.load_corpus()[: 60 if quick else None]
tokenizer = tgo.train_tokenizer((document.text for document in documents), vocab_size=1024)
folder = tempfile.mkdtemp()
tgo.write_dataset(documents, tokenizer, folder, sequence_length=128)
dataset = tgo.TokenDataset.load(folder)

# One replica per GPU; choose_strategy("auto") would also find a TPU or a cluster
strategy, why = tgo.choose_strategy("mirrored")
print(f"{type(strategy).__name__}: {why}")

with strategy.scope():
    model = tgo.GPTModel(
        vocab_size=tokenizer.vocab_size,
        embedding_dim=128,
        num_layers=4,
        num_heads=4,
        max_sequence_length=128,
        dropout=0.1,
    )
    model.compile(tgo.adamw(steps=steps), loss=tgo.NextTokenLoss())
model.tokenizer = tokenizer

batch_size = 8 * strategy.num_replicas_in_sync
model.fit(dataset.batches("train", batch_size), steps_per_epoch=steps // 2, epochs=2)
print("validation loss", model.evaluate(dataset.batches("valid", 8), verbose=0))
print(model.generate("def __init__(self", max_length=64))
