"""Who decodes in benchmarks/decode.py, each in a process of its own, and the files they load: the
same random weights in every format."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BLOCKS = {"attn_qkv": "qkv", "attn_output": "proj", "ffn_up": "fc", "ffn_down": "out"}


class Engine:
    """Reads ids after earlier ones: `read` gives the last's logits, `reset` forgets all."""

    def measure(self, prompt: np.ndarray, count: int) -> tuple[float, float, np.ndarray]:
        """Seconds of reading a prompt, median seconds of a token after it, the prompt's logits."""
        self.reset()
        start = time.perf_counter()
        logits = self.read(prompt)
        token = int(logits.argmax())
        seconds, first = [time.perf_counter() - start], np.array(logits)
        for _ in range(count):
            start = time.perf_counter()
            token = int(self.read(np.array([token])).argmax())
            seconds.append(time.perf_counter() - start)
        # the first token may find the cache moved and its signature not ready yet
        return seconds[0], statistics.median(seconds[2:] or seconds[-1:]), first


class Ours(Engine):
    """`TFLiteGPT`, as a user has it."""

    def __init__(self, folder: Path, file: str, threads: int, weight_cache: bool) -> None:
        from tf_gptopt.tflite.runtime import TFLiteGPT

        kept = folder / "weight_cache" if weight_cache else None
        self._model = TFLiteGPT(folder / file, threads=threads, weight_cache=kept)

    def read(self, ids: np.ndarray) -> np.ndarray:
        return self._model.prefill(ids)

    def reset(self) -> None:
        self._model.reset()


class LlamaCpp(Engine):
    """llama.cpp through its C functions, without the Python class around them.

    Flash attention, its default on a CPU, takes nearly twice as long as none at position 1,000 of
    GPT-2 on a Xeon: it is measured with and without, and the better one counts.
    """

    def __init__(self, folder: Path, file: str, threads: int, weight_cache: bool) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # C keeps it
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(folder / file).encode(), llama_cpp.llama_model_default_params()
        )
        self._threads = threads
        self._context = self._new_context(llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def _new_context(self, flash_attention: int) -> Any:
        options = self._lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 1024
        options.n_threads = options.n_threads_batch = self._threads
        options.flash_attn_type = flash_attention
        return self._lib.llama_init_from_model(self._model, options)

    @functools.cached_property  # `load_once` wants the default alone
    def _contexts(self) -> tuple[Any, Any]:
        return self._context, self._new_context(self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED)

    def measure(self, prompt: np.ndarray, count: int) -> tuple[float, float, np.ndarray]:
        found = []
        for context in self._contexts:
            self._context = context
            found.append(super().measure(prompt, count))
        prefills, tokens, logits = zip(*found, strict=True)
        return min(prefills), min(tokens), logits[0]

    def read(self, ids: np.ndarray) -> np.ndarray:
        tokens = (self._lib.llama_token * len(ids))(*ids.tolist())
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._vocab_size,))

    def reset(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)


class CTranslate2:
    """Its `Generator`, which decodes whole texts: `measure` takes the first token's time off."""

    def __init__(self, folder: Path, file: str, threads: int, weight_cache: bool) -> None:
        import ctranslate2

        self._generator = ctranslate2.Generator(
            str(folder / file), compute_type="int8", intra_threads=threads, inter_threads=1
        )

    def measure(self, prompt: np.ndarray, count: int) -> tuple[float, float, None]:
        first = self._seconds(prompt, 1)
        return first, (self._seconds(prompt, 1 + count) - first) / max(count, 1), None

    def _seconds(self, prompt: np.ndarray, count: int) -> float:
        start = time.perf_counter()
        (result,) = self._generator.generate_batch(
            [[f"t{token}" for token in prompt]],
            max_length=count,
            min_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        assert len(result.sequences_ids[0]) == count
        return time.perf_counter() - start


ENGINES = {engine.__name__: engine for engine in (Ours, LlamaCpp, CTranslate2)}


def serve(pipe: Any, kind: str, *args: Any) -> None:
    """An engine's process: measures what it is asked to until the pipe closes."""
    engine = ENGINES[kind](*args)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(engine.measure(*pipe.recv()))


@contextlib.contextmanager
def start(kind: str, *args: Any) -> Iterator[Any]:
    """`measure(prompt, count)` of an engine in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    pipe, other = spawn.Pipe()
    process = spawn.Process(target=serve, args=(other, kind, *args), daemon=True)
    process.start()
    other.close()

    def ask(prompt: np.ndarray, count: int) -> tuple[float, float, np.ndarray | None]:
        try:
            pipe.send((prompt, count))
            return pipe.recv()
        except (EOFError, BrokenPipeError):
            process.join()
            # https://github.com/ggml-org/llama.cpp/pull/26954
            raise RuntimeError(
                f"The process of {kind} ended with {process.exitcode} ({args[1]}). Where that is "
                "-4, an illegal instruction: GCC 12 makes one of llama.cpp's code for AMX. Build "
                "it with CMAKE_ARGS=\"-DCMAKE_CXX_FLAGS='-fno-dse -fno-tree-dse'\" pip install "
                "--force-reinstall --no-deps --no-cache-dir llama-cpp-python."
            ) from None

    try:
        yield ask
    finally:
        pipe.close()
        process.join(10)


def load_once(kind: str, *args: Any) -> dict[str, float]:
    """In a fresh process: milliseconds to a first token after a prompt of 32, and memory then."""
    engine_class = ENGINES[kind]
    __import__({"Ours": "tf_gptopt.tflite.runtime", "LlamaCpp": "llama_cpp"}[kind])
    start = time.perf_counter()
    engine = engine_class(*args)
    token = int(engine.read(np.arange(32)).argmax())
    seconds = time.perf_counter() - start
    for _ in range(32):
        token = int(engine.read(np.array([token])).argmax())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    megabytes = {name: int(status[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")}
    return {
        "first_token_ms": 1000 * seconds,
        "resident_mb": megabytes["VmRSS"],
        "anonymous_mb": megabytes["RssAnon"],
    }


# The files


def write_gguf(path: Path, config: Any, weights: dict[str, np.ndarray], kind: str = "Q8_0") -> None:
    """The weights as a llama.cpp file (it has no tokenizer: ids are enough)."""
    import gguf

    dtype = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_sequence_length)
    writer.add_embedding_length(config.embedding_dim)
    writer.add_feed_forward_length(config.intermediate_dim)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def matrix(name: str, rows: np.ndarray) -> None:
        integers = gguf.quants.quantize(np.ascontiguousarray(rows), dtype)
        writer.add_tensor(name, integers, raw_dtype=dtype)

    def norm(name: str, source: str) -> None:
        writer.add_tensor(f"{name}.weight", weights[f"{source}/gamma"])
        writer.add_tensor(f"{name}.bias", weights[f"{source}/beta"])

    matrix("token_embd.weight", weights["token_embedding/embeddings"])
    writer.add_tensor("position_embd.weight", weights["position_embedding/embeddings"])
    norm("output_norm", "final_norm")
    for i in range(config.num_layers):
        norm(f"blk.{i}.attn_norm", f"block_{i}_attention_norm")
        norm(f"blk.{i}.ffn_norm", f"block_{i}_mlp_norm")
        for theirs, ours in BLOCKS.items():
            matrix(f"blk.{i}.{theirs}.weight", weights[f"block_{i}_{ours}/kernel"].T)
            writer.add_tensor(f"blk.{i}.{theirs}.bias", weights[f"block_{i}_{ours}/bias"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_ctranslate2(folder: Path, config: Any, weights: dict[str, np.ndarray]) -> None:
    """The weights as a CTranslate2 folder, whose tokens are called t0, t1, ..."""
    from ctranslate2.specs import common_spec, transformer_spec

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        pre_norm=True,
        activation=common_spec.Activation.GELUTanh,
    )
    decoder = spec.decoder

    def norm(target: Any, source: str) -> None:
        target.gamma, target.beta = (weights[f"{source}/{name}"] for name in ("gamma", "beta"))

    def linear(target: Any, source: str) -> None:
        target.weight = np.ascontiguousarray(weights[f"{source}/kernel"].T)
        target.bias = weights[f"{source}/bias"]

    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["token_embedding/embeddings"]
    decoder.position_encodings.encodings = weights["position_embedding/embeddings"]
    decoder.projection.weight = decoder.embeddings.weight
    norm(decoder.layer_norm, "final_norm")
    for i, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"block_{i}_attention_norm")
        linear(layer.self_attention.linear[0], f"block_{i}_qkv")
        linear(layer.self_attention.linear[1], f"block_{i}_proj")
        norm(layer.ffn.layer_norm, f"block_{i}_mlp_norm")
        linear(layer.ffn.linear_0, f"block_{i}_fc")
        linear(layer.ffn.linear_1, f"block_{i}_out")
    spec.register_vocabulary([f"t{token}" for token in range(config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "t0"
    spec.validate()
    spec.optimize(quantization="int8")
    folder.mkdir(exist_ok=True)
    spec.save(str(folder))


def prepare(folder: Path, preset: str) -> tuple[dict[str, Any], Any]:
    """Write every engine's files with the same random weights; returns what they weigh, and the
    model's `GPTConfig`."""
    from tf_gptopt._keras import keras
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.models.checkpoints import named_weights
    from tf_gptopt.models.config import PRESETS
    from tf_gptopt.models.gpt import GPTModel
    from tf_gptopt.tflite.convert import export_tflite

    done = folder / "sizes.json"
    if done.is_file():
        return json.loads(done.read_text()), PRESETS[preset]
    keras.utils.set_random_seed(0)
    model = GPTModel.from_preset(preset)
    rng = np.random.default_rng(0)
    for weight in model.weights:  # biases and LayerNorms as in a trained model: not 0 and 1
        if len(weight.shape) == 1:
            weight.assign_add(rng.normal(0.0, 0.02, weight.shape))
    sizes = {}
    for name in ("int8", "int8-float-cache", "int4", "int4-float-cache"):
        scheme = QuantConfig.from_recipe(name.removesuffix("-float-cache"))
        if name.endswith("-float-cache"):  # the default is an int8 one
            scheme = dataclasses.replace(scheme, kv_cache="float32")
        info = export_tflite(model, folder / f"{name}.tflite", scheme)
        sizes[name] = {"bytes": info.bytes, "per_parameter": round(info.bytes_per_parameter, 4)}
    weights = named_weights(model)
    for kind in ("Q8_0", "Q4_0"):
        write_gguf(folder / f"{kind}.gguf", model.config, weights, kind)
        sizes[f"llama.cpp {kind}"] = {"bytes": os.path.getsize(folder / f"{kind}.gguf")}
    write_ctranslate2(folder / "ctranslate2", model.config, weights)
    sizes["parameters"] = info.parameters
    short = GPTModel.from_preset(preset, max_sequence_length=128)
    short.set_weights(
        [old[: new.shape[0]] for old, new in zip(model.get_weights(), short.weights, strict=True)]
    )
    export_tflite(short, folder / "int8-128.tflite")
    done.write_text(json.dumps(sizes))
    return sizes, model.config
