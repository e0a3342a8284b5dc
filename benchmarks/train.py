"""Training speed against torch.compile and keras-nlp, in turn, each in a process of its own.

    python benchmarks/train.py             # about four minutes on two cores
    python benchmarks/train.py --quick     # a smoke test: small shape, few steps

The shape is 13.9 million parameters (vocabulary 8192, width 384, 6 layers, 6 heads) on batches of 8
sequences of 256 tokens; AdamW with gradients clipped to 1, no dropout, random tokens. The rivals:

- torch: a nanoGPT-style model, `torch.compile`, fused attention, cross-entropy and AdamW, in
  float32 and under bfloat16 autocast;
- keras-nlp: `GPT2CausalLM.fit` with Keras's defaults, float32 and mixed_bfloat16.

Each rival counts with the faster of its two precisions on this processor. Then all of them stay
alive and take turns of a few steps, so that other work on the machine hits them alike; what counts
is the median of the rounds' ratios. Needs the extra `bench`. Results go to
benchmarks/results/train.json.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import spread, write_result

FULL = {"vocab": 8192, "width": 384, "layers": 6, "heads": 6, "time": 256, "batch": 8}
QUICK = {"vocab": 512, "width": 64, "layers": 2, "heads": 2, "time": 64, "batch": 4}
RIVALS = {"torch": ("float32", "bfloat16"), "keras-nlp": ("float32", "bfloat16")}
WARM_UP = 2  # steps that trace and compile
ENDLESS = 1_000_000  # steps; the parent says when to stop


class Turns:
    """In a contestant's process: `done` is called after each step, and waits after a turn."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._left = WARM_UP
        self._marks = [self._now()]

    def done(self, loss: float, **facts: Any) -> None:
        self._marks.append(self._now())
        self._left -= 1
        if self._left:
            return
        wall, processor = (
            [b - a for a, b in itertools.pairwise(times)]
            for times in zip(*self._marks, strict=True)
        )
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._pipe.send({"wall": wall, "processor": processor, "mb": memory, "loss": loss, **facts})
        self._left = self._pipe.recv()
        if not self._left:
            os._exit(0)
        self._marks = [self._now()]

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


# Contestants


def ours(shape: dict[str, int], precision: str, turns: Turns) -> None:
    """`fit` of this package, as its recipes call it."""
    import tensorflow as tf

    from tf_gptopt._keras import keras
    from tf_gptopt.models.gpt import GPTModel
    from tf_gptopt.training.config import TrainConfig
    from tf_gptopt.training.precision import choose_precision
    from tf_gptopt.training.trainer import fit

    class Random:
        sequence_length = shape["time"]

        def batches(self, split: str, batch_size: int, **_: int) -> tf.data.Dataset:
            ids = tf.constant(random_tokens(shape), tf.int32)
            return tf.data.Dataset.from_tensors((ids[:, :-1], ids[:, 1:])).repeat()

    class Ticks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            turns.done(float(logs["loss"]), parameters=model.count_params(), precision=policy)

    policy, _ = choose_precision()
    keras.mixed_precision.set_global_policy(policy)
    keras.utils.set_random_seed(0)
    model = GPTModel(
        shape["vocab"],
        shape["width"],
        shape["layers"],
        shape["heads"],
        max_sequence_length=shape["time"],
    )
    config = TrainConfig(ENDLESS, shape["batch"], learning_rate=3e-4)
    fit(model, Random(), config, None, [Ticks()], lambda report: None)


def torch(shape: dict[str, int], precision: str, turns: Turns) -> None:
    """nanoGPT's model and step in PyTorch."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    vocab, width, heads, length = (shape[key] for key in ("vocab", "width", "heads", "time"))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, t, _ = x.shape
            q, k, v = (
                part.view(b, t, heads, width // heads).transpose(1, 2)
                for part in self.qkv(self.norm_1(x)).split(width, dim=2)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(y.transpose(1, 2).reshape(b, t, width))
            return x + self.out(F.gelu(self.fc(self.norm_2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
            self.blocks = nn.ModuleList(Block() for _ in range(shape["layers"]))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=0.02)
            self.head.weight = self.tokens.weight

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(self.head(self.norm(x)).view(-1, vocab), labels.view(-1))

    torch.manual_seed(0)
    model = GPT()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model)
    data = torch.tensor(random_tokens(shape))
    ids, labels = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    parameters = sum(p.numel() for p in model.parameters())
    while True:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = compiled(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.done(loss.item(), parameters=parameters, precision=precision)


def keras_nlp(shape: dict[str, int], precision: str, turns: Turns) -> None:
    """keras-nlp's GPT-2 with its own compile and fit, on the TensorFlow backend."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import keras_nlp
    import numpy as np
    import tensorflow as tf

    if precision == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    keras.utils.set_random_seed(0)
    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size=shape["vocab"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        hidden_dim=shape["width"],
        intermediate_dim=4 * shape["width"],
        dropout=0.0,
        max_sequence_length=shape["time"],
    )
    model = keras_nlp.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(
        keras.optimizers.AdamW(3e-4, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    ids = np.asarray(random_tokens(shape), "int32")
    inputs = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, :-1])}
    data = tf.data.Dataset.from_tensors((inputs, ids[:, 1:])).repeat()

    class Ticks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            turns.done(float(logs["loss"]), parameters=model.count_params(), precision=precision)

    model.fit(data, steps_per_epoch=ENDLESS, epochs=1, verbose=0, callbacks=[Ticks()])


def random_tokens(shape: dict[str, int]) -> Any:
    import numpy as np

    size = (shape["batch"], shape["time"] + 1)
    return np.random.default_rng(0).integers(0, shape["vocab"], size)


# The contest


class Contestant:
    """A process that trains when told to."""

    def __init__(self, house: str, precision: str, shape: dict[str, int]) -> None:
        self.name = f"{house} {precision}"
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_live, args=(house, precision, shape, end))
        self._process.start()
        end.close()
        self.facts = self._receive()  # of the warm-up
        self.tokens = shape["batch"] * shape["time"]

    def speed(self, steps: int) -> float:
        """Tokens a second of the median of `steps` steps, taken now."""
        self._pipe.send(steps)
        self.facts = self._receive()
        return self.tokens / statistics.median(self.facts["wall"])

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(0)
        self._process.join()

    def _receive(self) -> dict[str, Any]:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended; its message is above") from None


def _live(house: str, precision: str, shape: dict[str, int], pipe: Connection) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    {"ours": ours, "torch": torch, "keras-nlp": keras_nlp}[house](shape, precision, Turns(pipe))


def faster(house: str, shape: dict[str, int]) -> tuple[Contestant | None, dict[str, float]]:
    """`house` in the precision that is faster here, alive, and the speed of each."""
    best, speeds = None, {}
    for precision in RIVALS[house]:
        try:
            contestant = Contestant(house, precision, shape)
            speeds[precision] = contestant.speed(2)
        except RuntimeError as error:
            print(f"  {error}")
            continue
        print(f"  {contestant.name:20} {speeds[precision]:8,.0f} tokens/s in two steps")
        if best is None or speeds[precision] > max(speeds.values(), default=0) - 1e-9:
            best, contestant = contestant, best
        if contestant:
            contestant.close()
    return best, speeds


def compete(shape: dict[str, int], rounds: int, steps: int) -> dict[str, Any]:
    """All in turns of `steps` steps; median speeds and ratios."""
    precisions, playing = {}, [Contestant("ours", "auto", shape)]
    for house in RIVALS:
        contestant, precisions[house] = faster(house, shape)
        playing += [contestant] if contestant else []
    speeds: dict[str, list[float]] = {contestant.name: [] for contestant in playing}
    cpu: dict[str, list[float]] = {contestant.name: [] for contestant in playing}
    for turn in range(rounds):
        for contestant in playing[turn % len(playing) :] + playing[: turn % len(playing)]:
            speeds[contestant.name].append(contestant.speed(steps))
            cpu[contestant.name] += contestant.facts["processor"]
        print("  " + "   ".join(f"{name} {values[-1]:,.0f}" for name, values in speeds.items()))
    outcome: dict[str, Any] = {"precisions": precisions, "contestants": {}, "ratios": {}}
    for contestant in playing:
        facts, name = contestant.facts, contestant.name
        contestant.close()
        outcome["contestants"][name] = {
            "tokens_per_second": spread(speeds[name], 0),
            "processor_seconds_per_step": round(statistics.median(cpu[name]), 3),
            "peak_rss_mb": round(facts["mb"]),
            **{key: facts[key] for key in ("precision", "parameters", "loss")},
        }
        if name != "ours auto":
            pairs = zip(speeds["ours auto"], speeds[name], strict=True)
            outcome["ratios"][name] = spread([a / b for a, b in pairs], 3)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--rounds", type=int, help="default 9, quick 2")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    arguments = parser.parse_args()
    shape = QUICK if arguments.quick else FULL
    print(f"training {shape}")
    outcome = compete(shape, arguments.rounds or (2 if arguments.quick else 9), arguments.steps)
    for name, facts in outcome["contestants"].items():
        print(
            f"{name:20} {facts['tokens_per_second']['median']:8,.0f} tokens/s  "
            f"{facts['processor_seconds_per_step']:6.3f} CPU s a step  "
            f"{facts['peak_rss_mb']:6,} MB  {facts['parameters']:,} parameters"
        )
    for name, ratio in outcome["ratios"].items():
        print(f"ours is {ratio['median']:.2f} x {name} ({ratio['min']:.2f} - {ratio['max']:.2f})")
    if not arguments.quick:
        print(f"written to {write_result('train', {'shape': shape, **outcome})}")


if __name__ == "__main__":
    main()
