"""int8 decoding on the CPU against llama.cpp Q8_0: the same random weights, in turn, in one run.

    pip install '.[bench]'
    python benchmarks/decode.py [--threads 2] [--rounds 9] [--positions 512 1000]

The model has GPT-2's 124 M shape and a context of 1,024. Each engine lives in a process of its own
and they work in turn, so that other work on the machine hits both; what counts is the median of the
rounds' ratios. Tokens are chosen greedily, and the choice is part of the time. Before anything is
timed, both engines' logits for the same prompt are compared: they run the same model.

What was learned on the way, for whoever wants more (AVX-512 VNNI, 124 M parameters, one thread):

- The weights are the cost: reading 124 MB takes 8 of a token's 9 ms at positions below 64. All
  element-wise operations of twelve blocks together (LayerNorm, GELU, additions) take 0.01 ms.
- XNNPACK packs a product's right-hand operand on every call where it is no constant. For the cache
  that costs 0.8 ms a token at capacity 128 and 17 at 1,024: hence signatures for many capacities.
  Done for 512 kB of heads at a time the copies stay in the second-level cache (17 -> 12 ms at
  1,024). Keys stored transposed pack 3% faster; the cache as left operand needs no packing and is
  no faster; a float16 cache takes 30% less, but is refused by processors without float16 products.
- Host buffers are flat, and the reshape of a cache input is a copy: a sixth of attention's time.
- Without a weight cache each signature packs the weights for itself: twelve signatures took 1.5 GB
  and 9 s to load, and with one in memory 0.2 GB and 0.7 s. In a file it loads in 0.02 s and is some
  percent faster to read, since the file's pages are huge ones (`--weight-cache FOLDER`).
- Both engines' threads wait actively for each other. Other work on the machine slows llama.cpp's
  more (to 4 tokens a second): only an idle machine gives numbers to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import spread, write_result

CONTEXT = 1024
PROMPT = 32
DECODED = 96  # tokens after a short prompt: positions 32 to 128


class Ours:
    """`TFLiteGPT`, as a user has it."""

    def __init__(self, folder: str, threads: int, weight_cache: str | None) -> None:
        from tf_gptopt.tflite.runtime import TFLiteGPT

        path = Path(folder) / "model.tflite"
        self._model = TFLiteGPT(path, threads=threads, weight_cache=weight_cache)

    def read(self, ids: np.ndarray) -> np.ndarray:
        return self._model.prefill(ids)

    def reset(self) -> None:
        self._model.reset()


class LlamaCpp:
    """llama.cpp through its C functions, without the Python class around them."""

    def __init__(self, folder: str, threads: int, weight_cache: str | None) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # C keeps it
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(Path(folder) / "model.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = CONTEXT
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def read(self, ids: np.ndarray) -> np.ndarray:
        tokens = (self._lib.llama_token * len(ids))(*ids.tolist())
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._vocab_size,))

    def reset(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)


def serve(pipe: Any, engine_class: type, *args: Any) -> None:
    """An engine's process: measures what it is asked to until the pipe closes."""
    engine = engine_class(*args)
    with contextlib.suppress(EOFError):
        while True:
            prompt, count = pipe.recv()
            engine.reset()
            start = time.perf_counter()
            logits = engine.read(prompt)
            token = int(logits.argmax())
            prefill = time.perf_counter() - start
            first = np.array(logits)
            start = time.perf_counter()
            for _ in range(count):
                token = int(engine.read(np.array([token])).argmax())
            pipe.send((prefill, (time.perf_counter() - start) / max(count, 1), first))


@contextlib.contextmanager
def engine(engine_class: type, *args: Any) -> Iterator[Any]:
    """`measure(prompt, count) -> (prefill seconds, seconds a token, logits after the prompt)`."""
    spawn = multiprocessing.get_context("spawn")
    pipe, other = spawn.Pipe()
    process = spawn.Process(target=serve, args=(other, engine_class, *args), daemon=True)
    process.start()
    other.close()

    def measure(prompt: np.ndarray, count: int) -> tuple[float, float, np.ndarray]:
        pipe.send((prompt, count))
        return pipe.recv()

    try:
        yield measure
    finally:
        pipe.close()
        process.join(10)


def write_gguf(path: Path, config: Any, weights: dict[str, np.ndarray]) -> None:
    """The same weights as a Q8_0 file for llama.cpp (it has no tokenizer: ids are enough)."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_sequence_length)
    writer.add_embedding_length(config.embedding_dim)
    writer.add_feed_forward_length(config.intermediate_dim)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def matrix(name: str, rows: np.ndarray) -> None:
        writer.add_tensor(
            name, gguf.quants.quantize(np.ascontiguousarray(rows), kind), raw_dtype=kind
        )

    def norm(name: str, source: str) -> None:
        writer.add_tensor(f"{name}.weight", weights[f"{source}/gamma"])
        writer.add_tensor(f"{name}.bias", weights[f"{source}/beta"])

    matrix("token_embd.weight", weights["token_embedding/embeddings"])
    writer.add_tensor("position_embd.weight", weights["position_embedding/embeddings"])
    norm("output_norm", "final_norm")
    dense = {"attn_qkv": "qkv", "attn_output": "proj", "ffn_up": "fc", "ffn_down": "out"}
    for i in range(config.num_layers):
        norm(f"blk.{i}.attn_norm", f"block_{i}_attention_norm")
        norm(f"blk.{i}.ffn_norm", f"block_{i}_mlp_norm")
        for theirs, ours in dense.items():
            matrix(f"blk.{i}.{theirs}.weight", weights[f"block_{i}_{ours}/kernel"].T)
            writer.add_tensor(f"blk.{i}.{theirs}.bias", weights[f"block_{i}_{ours}/bias"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(folder: Path) -> dict[str, Any]:
    """Write both files with the same random weights; returns what ours weighs."""
    from tf_gptopt._keras import keras
    from tf_gptopt.models.checkpoints import named_weights
    from tf_gptopt.models.gpt import GPTModel
    from tf_gptopt.tflite.convert import export_tflite

    keras.utils.set_random_seed(0)
    model = GPTModel.from_preset("gpt2")
    rng = np.random.default_rng(0)
    for weight in model.weights:  # biases and LayerNorms as in a trained model: not 0 and 1
        if len(weight.shape) == 1:
            weight.assign_add(rng.normal(0.0, 0.02, weight.shape))
    info = export_tflite(model, folder / "model.tflite")
    write_gguf(folder / "model.gguf", model.config, named_weights(model))
    theirs = (folder / "model.gguf").stat().st_size
    return {
        "parameters": info.parameters,
        "bytes": info.bytes,
        "bytes_per_parameter": round(info.bytes_per_parameter, 4),
        "llama_cpp_bytes": theirs,
    }


def compare(
    ours: Any, theirs: Any, rounds: int, positions: list[int], vocab_size: int = 50257
) -> dict[str, Any]:
    """Medians of `rounds` pairs: ours, theirs and the ratio of their speeds."""
    rng = np.random.default_rng(0)
    rates: dict[str, tuple[list[float], list[float]]] = {}

    def add(name: str, tokens: int, seconds: tuple[float, float]) -> None:
        pair = rates.setdefault(name, ([], []))
        for found, each in zip(pair, seconds, strict=True):
            found.append(tokens / each)

    cases = [(PROMPT, DECODED), *((p, min(64, CONTEXT - p)) for p in positions)]
    correlation = 0.0
    for i in range(rounds + 1):
        for length, count in cases:
            prompt = rng.integers(0, vocab_size, length)
            engines = (ours, theirs) if i % 2 else (theirs, ours)
            results = [measure(prompt, count) for measure in engines][:: 1 if i % 2 else -1]
            if i == 0:  # warm-up, and the proof that both run the same model
                correlation = float(np.corrcoef(results[0][2], results[1][2])[0, 1])
                if correlation < 0.99:
                    raise RuntimeError(f"The engines disagree: correlation {correlation:.3f}.")
                continue
            add(f"prefill {length}", length, (results[0][0], results[1][0]))
            add(f"decode {length}-{length + count}", 1, (results[0][1], results[1][1]))
    return {
        "correlation_of_logits": round(correlation, 4),
        **{
            name: {
                "ours_tokens_per_second": spread(mine),
                "llama_cpp_tokens_per_second": spread(other),
                "ratio": spread([a / b for a, b in zip(mine, other, strict=True)], 3),
            }
            for name, (mine, other) in rates.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--positions", type=int, nargs="*", default=[], help="also decode here")
    parser.add_argument("--weight-cache", metavar="FOLDER", help="see TFLiteGPT")
    parser.add_argument("--folder", type=Path, help="keep the models here (default: temporary)")
    options = parser.parse_args()

    load = round(os.getloadavg()[0], 1)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # TensorFlow ends with it
            size = pool.apply(prepare, (folder,))
        args = (str(folder), options.threads, options.weight_cache)
        ours = stack.enter_context(engine(Ours, *args))
        theirs = stack.enter_context(engine(LlamaCpp, *args))
        measured = compare(ours, theirs, options.rounds, options.positions)

    print(f"{'':18}{'ours':>8} {'llama.cpp Q8_0':>15}  tokens/s, {options.threads} threads")
    for name, row in measured.items():
        if isinstance(row, dict):
            mine, other = (row[f"{who}_tokens_per_second"] for who in ("ours", "llama_cpp"))
            print(
                f"{name:18}{mine['median']:8} {other['median']:15}  {row['ratio']['median']:.2f}x"
            )
    print(
        f"file: {size['bytes'] / 1e6:.1f} MB, {size['bytes_per_parameter']} bytes a parameter "
        f"(llama.cpp {size['llama_cpp_bytes'] / 1e6:.1f} MB)"
    )
    settings = {
        "threads": options.threads,
        "rounds": options.rounds,
        "weight_cache": options.weight_cache is not None,
        "load_before": load,
    }
    path = write_result("decode", {"settings": settings, "size": size, "measured": measured})
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
