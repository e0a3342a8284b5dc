"""Export to int8 TFLite with a KV cache and generate with LiteRT: no TensorFlow on the device.

python examples/05_export_and_generate.py [--quick]
"""

import sys
import tempfile

import tf_gptopt as tgo

quick = "--quick" in sys.argv
steps = 40 if quick else 1000
folder = tempfile.mkdtemp()

# On the machine that trains
documents = tgo.load_corpus()[: 60 if quick else None]
tokenizer = tgo.train_tokenizer((document.text for document in documents), vocab_size=1024)
tgo.write_dataset(documents, tokenizer, folder, sequence_length=128)
dataset = tgo.TokenDataset.load(folder)
model = tgo.GPTModel(tokenizer.vocab_size, 96, 2, 4, max_sequence_length=128)
model.compile(tgo.adamw(steps=steps, learning_rate=2e-3), loss=tgo.NextTokenLoss())
model.fit(dataset.batches("train", 8), steps_per_epoch=steps)
info = tgo.export_tflite(
    model, f"{folder}/edge/model.tflite", tgo.QuantConfig("int8"), tokenizer=tokenizer
)
print(f"{info.path}: {info.bytes:,} bytes")

# On the device, which needs no TensorFlow (README.md has the lines that install tf-gptopt there):
# copy the file, whose tokenizer is inside
from tf_gptopt.tflite.runtime import TFLiteGPT  # noqa: E402  (this is where the device starts)

gpt = TFLiteGPT(f"{folder}/edge/model.tflite", threads=2)
print(gpt.generate("import os\n", max_new_tokens=40))
for piece in gpt.stream("def main(", max_new_tokens=40, temperature=0.8, top_p=0.95, seed=1):
    print(piece, end="", flush=True)
print()
