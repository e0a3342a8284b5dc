"""Prune half of the weights, then train on the int8 grid; each stage keeps what the last promised.

Each stage trains on, and so does the dense model beside it: what a technique costs is the
difference to the dense model after as many steps.

python examples/03_prune_and_quantize.py [--quick]
"""

import sys
import tempfile

import tf_gptopt as tgo

quick = "--quick" in sys.argv
steps = 20 if quick else 600

documents = tgo.load_corpus()[: 60 if quick else None]
tokenizer = tgo.train_tokenizer((document.text for document in documents), vocab_size=1024)
folder = tempfile.mkdtemp()
tgo.write_dataset(documents, tokenizer, folder, sequence_length=64)
dataset = tgo.TokenDataset.load(folder)


def fit(model, learning_rate, callbacks=()):
    optimizer = tgo.adamw(steps=steps, learning_rate=learning_rate)
    model.compile(optimizer, loss=tgo.NextTokenLoss())
    train = dataset.batches("train", 8)
    model.fit(train, steps_per_epoch=steps, callbacks=list(callbacks), verbose=0)
    return model.evaluate(dataset.batches("valid", 8, max_batches=8), verbose=0)


dense = tgo.GPTModel(tokenizer.vocab_size, 64, 2, 4, max_sequence_length=64)
print(f"dense            {steps:>5} steps  loss {fit(dense, 2e-3):.3f}")

# tfmot's wrappers and schedule around the Dense layers of every block
sparse = tgo.prune(dense, tgo.PruneConfig(sparsity=0.5, end_step=steps // 2, frequency=2))
loss = fit(sparse, 1e-3, tgo.pruning_callbacks(sparse))
print(f"dense, goes on   {2 * steps:>5} steps  loss {fit(dense, 1e-3):.3f}")
sparse = tgo.strip_pruning(sparse)
zeros = float((sparse.get_layer("block_0_fc").kernel.numpy() == 0).mean())
print(f"pruned           {2 * steps:>5} steps  loss {loss:.3f}, zeros {zeros:.1%}")

# tfmot's fake quantization with one scale per output channel; zeros stay zero
aware = tgo.quantize_aware(sparse, tgo.QuantConfig("int8"))
loss = fit(aware, 5e-4)
final = tgo.strip_quantization(aware)
zeros = float((final.get_layer("block_0_fc").kernel.numpy() == 0).mean())
print(f"dense, goes on   {3 * steps:>5} steps  loss {fit(dense, 5e-4):.3f}")
print(f"int8-aware       {3 * steps:>5} steps  loss {loss:.3f}, zeros {zeros:.1%}")

info = tgo.export_tflite(final, f"{folder}/model.tflite", tgo.QuantConfig("int8"))
print(f"model.tflite  {info.bytes:,} bytes for {final.count_params():,} parameters")
if quick:
    print(f"{steps} steps show that it runs; what it costs shows without --quick")
