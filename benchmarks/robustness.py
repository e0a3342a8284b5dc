"""What comes in damaged, and what goes on for long.

    python benchmarks/robustness.py --files 10000
    python benchmarks/robustness.py --soak 200000

`--files`: mutated .tflite files (bits flipped, cut short, ranges copied elsewhere or zeroed)
through the loader and a short generation, in child processes, so that a crash is one of the
figures. Half of them have the checksum as it was, and each must be refused. The others have it
sealed anew, as somebody would who means harm: LiteRT sees them then.

`--soak`: a mix of all that conversations do (chats, slides, forks, batches, scores, streams left in
the middle) over one loaded file; memory and the time of a token must stay flat.

Results go to benchmarks/results/robustness.json, each part beside the other.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import RESULTS, write_result
from tf_gptopt._clock import clock
from tf_gptopt._errors import UserError
from tf_gptopt.tflite.runtime import TFLiteGPT

EXAMPLE = Path(__file__).resolve().parents[1] / "saved_models" / "example" / "model.tflite"
MUTATIONS = ("bits", "cut", "copied range", "zeroed range")
BATCH = 250  # files to a process
PATIENCE = 20  # seconds for one file, then it counts as hung
PROMPT = [1, 2, 3]
PART = 10_000  # tokens to a line of the soak


# Mutated files


def write_bases(folder: Path) -> list[Path]:
    """Small files of each kind of weights and cache."""
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.models.checkpoints import weight_shapes
    from tf_gptopt.models.config import GPTConfig
    from tf_gptopt.tflite.convert import build_tflite

    config = GPTConfig(61, 32, 2, 2, max_sequence_length=32)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(name.endswith("gamma"), 0.2, shape).astype(np.float32)
        for name, shape in weight_shapes(config).items()
    }
    paths = []
    for quant in (
        QuantConfig("float32"),
        QuantConfig("int8"),
        QuantConfig("int4"),
        QuantConfig(kv_cache="int8"),
    ):
        data, _ = build_tflite(config, weights, quant)
        paths.append(folder / f"{quant.name}.tflite")
        paths[-1].write_bytes(data)
    return paths


def mutate(content: bytes, index: int) -> tuple[bytes, str]:
    """The mutation of this index, and what it is; odd ones have the checksum sealed anew."""
    from tf_gptopt.tflite.metadata import seal

    rng = np.random.default_rng(index)
    kind = MUTATIONS[index // 2 % len(MUTATIONS)]
    data = bytearray(content)
    while data == content:
        size = int(min(len(data), 2 ** rng.uniform(0, 12)))
        at, source = rng.integers(0, len(data) - size + 1, 2).tolist()
        if kind == "bits":
            for bit in rng.integers(0, 8 * len(data), rng.integers(1, 9)).tolist():
                data[bit // 8] ^= 1 << bit % 8
        elif kind == "cut":
            del data[int(len(data) * rng.random()) :]
        elif kind == "zeroed range":
            data[at : at + size] = bytes(size)
        else:
            data[at : at + size] = data[source : source + size]
    checksum = "as it was"
    if index % 2:
        try:
            seal(data)
            checksum = "sealed anew"
        except Exception:  # the place of the checksum is not to be found any more
            checksum = "lost"
    return bytes(data), f"{kind}, checksum {checksum}"


def try_one(path: Path, expected: list[int]) -> str:
    """Load a file and let it speak: what became of it."""
    try:
        gpt = TFLiteGPT(path, threads=1)
        said = gpt.generate(PROMPT, 20)
        finite = np.isfinite(gpt.logits(PROMPT)).all()
    except UserError:
        return "refused"
    except Exception as error:
        return f"unclear {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return "ran alike" if said == expected and finite else "ran otherwise"


def child(folder: str, count: int) -> None:
    """Print `index outcome` for each file. The files are tried in forks of this process, which has
    loaded all but LiteRT's environment: after a crash the next one takes over at once."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what LiteRT says of damaged files
    bases = sorted(Path(folder).glob("*.tflite"))
    reached = mmap.mmap(-1, 8)  # shared with the forks: the file at work
    index = 0
    while index < count:
        if not (process := os.fork()):
            _try_files(bases, index, min(count, index + BATCH), reached)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        index = int.from_bytes(reached[:8])
        if status:
            code = os.waitstatus_to_exitcode(status)
            hung = code == -signal.SIGALRM
            print(index, "hung" if hung else f"crashed ({code})", flush=True)
            index += 1


def _try_files(bases: list[Path], start: int, end: int, reached: mmap.mmap) -> None:
    expected = [TFLiteGPT(base, threads=1).generate(PROMPT, 20) for base in bases]
    contents = [base.read_bytes() for base in bases]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.tflite"
        for index in range(start, end):
            reached[:8] = index.to_bytes(8)
            signal.alarm(PATIENCE)
            which = _base_of(index, bases)
            path.unlink(missing_ok=True)  # a file in use is never written over
            path.write_bytes(mutate(contents[which], index)[0])
            print(index, try_one(path, expected[which]), flush=True)
        reached[:8] = end.to_bytes(8)


def _base_of(index: int, bases: list[Path]) -> int:
    return index // (2 * len(MUTATIONS)) % len(bases)


def outcomes(folder: Path, count: int) -> Iterator[tuple[int, str]]:
    """`(index, outcome)` of each file, from a child."""
    arguments = [sys.executable, __file__, "--child", str(folder), str(count)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            index, _, outcome = line.strip().partition(" ")
            yield int(index), outcome


def run_files(count: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Try `count` mutated files; the figures by kind of mutation and outcome."""
    table: dict[str, collections.Counter[str]] = {}
    notable = []
    start = last = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        bases = sorted(write_bases(Path(name)))
        contents = [base.read_bytes() for base in bases]
        for index, outcome in outcomes(Path(name), count):
            which = _base_of(index, bases)
            kind = mutate(contents[which], index)[1]
            short = outcome.partition(":")[0]
            table.setdefault(kind, collections.Counter())[short] += 1
            if short not in ("refused", "ran alike", "ran otherwise"):
                notable.append(f"{index} ({bases[which].stem}, {kind}): {outcome}")
                say(notable[-1])
            if time.monotonic() - last > 10 or index + 1 == count:
                last = time.monotonic()
                rate = (index + 1) / (last - start)
                left = clock((count - index - 1) / rate)
                say(f"{index + 1:,} of {count:,} files, {rate:.0f} a second, {left} left")
    total = sum(table.values(), collections.Counter())
    if sum(total.values()) != count:
        raise RuntimeError(f"The child ended after {sum(total.values())} of {count} files.")
    return {
        "files": count,
        "bases": [base.stem for base in bases],
        "total": dict(total),
        "by_mutation": {kind: dict(table[kind]) for kind in sorted(table)},
        "notable": notable[:100],
        "seconds": round(time.monotonic() - start),
    }


# The soak


def run_soak(model: Path, tokens: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Generate that many tokens in every way; memory and speed after each part."""
    gpt = TFLiteGPT(model, threads=1)
    rng = np.random.default_rng(0)
    parts: list[dict[str, float]] = []
    times: list[float] = []
    done, part = 0, max(1, min(PART, tokens // 2))
    start = time.monotonic()
    probe = gpt.new_conversation()
    for count in _usage(gpt, rng):
        done += count
        probe.reset()
        probe.prefill(PROMPT)
        for token in range(20):
            before = time.perf_counter()
            probe.decode(token)
            times.append(time.perf_counter() - before)
        done += 20
        if done >= part * (len(parts) + 1):
            parts.append(
                {
                    "tokens": done,
                    "rss_mb": round(_resident() / 1e6, 2),
                    "token_ms": round(1000 * statistics.median(times), 4),
                }
            )
            times.clear()
            rate = done / (time.monotonic() - start)
            left = clock(max(0, tokens - done) / rate)
            say(
                f"{done:9,} tokens  {parts[-1]['rss_mb']:8.1f} MB  {parts[-1]['token_ms']:.3f} ms "
                f"a token  ({rate:.0f} tokens a second, {left} left)"
            )
        if done >= tokens:
            break
    # what a first use takes (signatures made ready, the allocator's pools) is not a leak
    first, last = parts[0], parts[-1]
    return {
        "model": model.name,
        "tokens": done,
        "rss_growth_mb": round(last["rss_mb"] - first["rss_mb"], 2),
        "token_time_ratio": round(last["token_ms"] / first["token_ms"], 3),
        "parts": parts,
        "seconds": round(time.monotonic() - start),
    }


def _usage(gpt: TFLiteGPT, rng: np.random.Generator) -> Iterator[int]:
    """Use conversations for ever; the tokens generated (or scored) each time."""
    context, vocab = gpt.config.max_sequence_length, gpt.config.vocab_size
    never = {} if gpt.eot_id is None else {gpt.eot_id: -float("inf")}
    options = {"temperature": 1.0, "top_k": 20, "logit_bias": never}

    def some(most: int) -> list[int]:
        return rng.integers(0, vocab, rng.integers(1, most + 1)).tolist()

    chat = gpt.new_conversation()
    said: list[int] = []
    while True:
        seed = int(rng.integers(2**31))
        # a chat that grows beyond the context
        said = [*said, *some(9)] if len(said) < 4 * context else some(9)
        said = chat.generate(said, 40, overflow="slide", keep=4, seed=seed, **options)
        yield 40
        # forks of it
        for i in range(2):
            fork = chat.fork()
            way = [*said[: context // 2], i]
            yield len(fork.generate(way, 20, seed=seed, **options)) - len(way)
        # a batch with a common beginning
        shared = some(context // 2)
        batch = gpt.generate(
            [[*shared, i] for i in range(3)], 20, seed=seed, repetition_penalty=1.2, **options
        )
        yield sum(len(row) - len(shared) - 1 for row in batch)
        # scores
        yield len(gpt.score(some(20), shared).token_ids)
        # a stream that is left in the middle, and a conversation that is dropped, full
        if gpt.eot_id is not None:
            next(gpt.stream(shared, 20, seed=seed, **options))
            yield 1
        fresh = gpt.new_conversation()
        yield len(fresh.generate(shared, **options)) - len(shared)


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=0, help="mutated files to try")
    parser.add_argument("--soak", type=int, default=0, help="tokens to generate")
    parser.add_argument("--model", type=Path, default=EXAMPLE, help="the soak's .tflite file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child[0], int(given.child[1]))
        return
    earlier = RESULTS / "robustness.json"
    result = json.loads(earlier.read_text("utf-8")) if earlier.is_file() else {}
    result.pop("machine", None)
    try:
        if given.files:
            result["files"] = run_files(given.files)
            print(json.dumps(result["files"]["by_mutation"], indent=2))
            print(f"In all: {result['files']['total']}")
        if given.soak:
            result["soak"] = run_soak(given.model, given.soak)
    except KeyboardInterrupt:
        sys.exit("Interrupted: nothing was written.")
    print(f"written to {write_result('robustness', result)}")


if __name__ == "__main__":
    main()
