"""What tests of several rooms share. Nothing here imports TensorFlow before a test asks for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # small models: a GPU would only be slower
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so does a shell with what it starts with &
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real texts and models that lie beside the repository; tests skip without them."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}")
    return folder


@pytest.fixture(autouse=True)
def default_dtype_policy() -> Any:
    """A test that sets a mixed precision policy does not hand it to the next."""
    yield
    if "tf_keras" in sys.modules:
        sys.modules["tf_keras"].mixed_precision.set_global_policy("float32")


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """`tiny_model(seed=0, **GPTModel's arguments)`: small, and no weight at its initial 0 or 1."""

    def build(seed: int = 0, **overrides: Any) -> Any:
        import numpy as np

        from tf_gptopt.models.gpt import GPTModel

        shape = {
            "vocab_size": 61,
            "embedding_dim": 24,
            "num_layers": 2,
            "num_heads": 3,
            "max_sequence_length": 32,
        }
        model = GPTModel(**{**shape, **overrides})
        rng = np.random.default_rng(seed)
        for weight in model.weights:
            noise = rng.normal(0.0, 0.2, weight.shape)
            weight.assign(noise + 1.0 if "gamma" in weight.name else noise)
        return model

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE of 300 tokens with `<|endoftext|>`, trained on this file's own text."""
    from tokenizers import ByteLevelBPETokenizer

    from tf_gptopt._tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [Path(__file__).read_text()], 300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    trained.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of Llama's kind: byte fallback, spaces as a sign of their own, `<s>` first."""
    import json

    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    folder = tmp_path_factory.mktemp("llama")
    texts = ["hello world, how are you user assistant", "the quick brown fox"] * 9
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    settings["bos_token"] = "<s>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def run_child() -> Callable[..., str]:
    """`run_child(code, devices=2)`: runs code in a fresh Python and returns what it printed.

    With `devices`, TensorFlow starts there with that many logical CPU devices; with `devices=0` the
    child imports nothing before the code.
    """

    def run(code: str, devices: int = 2, timeout: float = 300, **environment: str) -> str:
        prelude = f"""
            import tensorflow as tf
            tf.config.set_logical_device_configuration(
                tf.config.list_physical_devices("CPU")[0],
                [tf.config.LogicalDeviceConfiguration()] * {devices},
            )
        """
        script = (textwrap.dedent(prelude) if devices else "") + textwrap.dedent(code)
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        child = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert child.returncode == 0, f"exit {child.returncode}\n{child.stdout}\n{child.stderr}"
        return child.stdout

    return run
