"""Run by CI where TensorFlow is not installed: the edge runtime needs LiteRT, numpy, tokenizers.

python tests/edge_environment.py [FOLDER_WITH_MODEL]
"""

import importlib.util
import sys
from pathlib import Path

assert importlib.util.find_spec("tensorflow") is None, "this is a test of life without TensorFlow"
assert importlib.util.find_spec("tf_keras") is None

from tf_gptopt.tflite.inspecting import inspect_tflite  # noqa: E402
from tf_gptopt.tflite.runtime import TFLiteGPT  # noqa: E402

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("saved_models") / "example"
gpt = TFLiteGPT(folder / "model.tflite")
text = gpt.generate("def __init__(self", max_new_tokens=20)
assert text.startswith("def __init__(self")
assert len(text) > len("def __init__(self")
pieces = gpt.stream("import ", max_new_tokens=20, temperature=0.8, top_p=0.95, seed=1)
print(text, "".join(pieces), sep="\n")
prompt, count = "import os\nimport", 24
plain = gpt.new_conversation().generate(prompt, count)
assert gpt.generate(prompt, count, draft="lookup") == plain
assert gpt.generate(prompt, count) == plain
assert gpt.reused > 0
assert inspect_tflite(folder / "model.tflite", run=False).checksum == "ok"

loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"tensorflow", "keras", "torch"})
assert not loaded, loaded
print("the edge runtime works without TensorFlow")
