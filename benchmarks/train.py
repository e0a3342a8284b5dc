"""Training speed against torch.compile, keras-nlp and tfmot, in turn, each in a process of its own.

    python benchmarks/train.py                     # every contest, some twenty minutes on two cores
    python benchmarks/train.py base prune          # two of them
    python benchmarks/train.py --quick             # a smoke test: small shapes, few steps

Contests (`SHAPES`, `CONTESTS`):

- base: 13.9 million parameters, 8 sequences of 256 tokens;
- gpt2: GPT-2's 124 million, 4 sequences of 256 tokens;
- long: as base, 2 sequences of 1,024 tokens;
- distill: as base, from a teacher of the same size, against the same in torch;
- prune: as base, against tfmot's own wrapper on the same model and against not pruning;
- qat, qat-int4, qat-static: as base, against not quantizing.

A rival counts with the faster of float32 and bfloat16 on this processor; what it reached in the
other is kept too. Then all of them stay alive and take turns of a few steps, so that other work on
the machine hits them alike; what counts is the median of the rounds' ratios. Needs the extra
`bench`. Results go to benchmarks/results/train.json, contest by contest, those of each
processor under names of their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import RESULTS, machine, on_this_processor, spread
from benchmarks.contestants import HOUSES, QAT, Turns
from tf_gptopt._files import read_json, write_json

BASE = {"vocab": 8192, "width": 384, "layers": 6, "heads": 6, "time": 256, "batch": 8}
GPT2 = {"vocab": 50257, "width": 768, "layers": 12, "heads": 12, "time": 256, "batch": 4}
LONG = {**BASE, "time": 1024, "batch": 2}
QUICK = {"vocab": 512, "width": 64, "layers": 2, "heads": 2, "time": 64, "batch": 4}
BOTH = ("float32", "bfloat16")
PEERS = {"torch": BOTH, "keras-nlp": BOTH}
# contest -> shape, task, rivals and the precisions that each may choose from
CONTESTS: dict[str, tuple[dict[str, int], str, dict[str, tuple[str, ...]]]] = {
    "base": (BASE, "train", PEERS),
    "gpt2": (GPT2, "train", PEERS),
    "long": (LONG, "train", PEERS),
    "distill": (BASE, "distill", {"torch": BOTH, "ours, not distilling": ("auto",)}),
    "prune": (BASE, "prune", {"tfmot": ("float32",), "ours, not pruning": ("auto",)}),
    **{name: (BASE, name, {"ours, not quantizing": ("auto",)}) for name in QAT},
}


class Contestant:
    """A process that trains when told to."""

    def __init__(self, house: str, precision: str, shape: dict[str, int], task: str) -> None:
        self.name = house if precision == "auto" else f"{house} {precision}"
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        arguments = (house, precision, shape, task, end)
        self._process = context.Process(target=_live, args=arguments)
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


def _live(house: str, precision: str, shape: dict[str, int], task: str, pipe: Connection) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    house, _, without = house.partition(", not ")
    HOUSES[house](shape, precision, "train" if without else task, Turns(pipe))


def faster(
    house: str, precisions: tuple[str, ...], shape: dict[str, int], task: str
) -> tuple[Contestant | None, dict[str, float]]:
    """`house` in the precision that is faster here, alive, and the speed of each."""
    best, speeds = None, {}
    for precision in precisions:
        try:
            contestant = Contestant(house, precision, shape, task)
            speeds[precision] = round(contestant.speed(2), 1)
        except RuntimeError as error:
            print(f"  {error}")
            continue
        print(f"  {contestant.name:20} {speeds[precision]:8,.0f} tokens/s in two steps")
        if best is None or speeds[precision] >= max(speeds.values()):
            best, contestant = contestant, best
        if contestant:
            contestant.close()
    return best, speeds


def compete(name: str, quick: bool, rounds: int, steps: int) -> dict[str, Any]:
    """All of a contest in turns of `steps` steps; median speeds and ratios."""
    shape, task, rivals = CONTESTS[name]
    shape = QUICK if quick else shape
    print(f"{name}: {task} {shape}")
    ours = Contestant("ours", "auto", shape, task)
    ours_alone = ours.speed(2)
    precisions, playing = {}, [ours]
    for house, choice in rivals.items():
        contestant, precisions[house] = faster(house, choice, shape, task)
        playing += [contestant] if contestant else []
    speeds: dict[str, list[float]] = {contestant.name: [] for contestant in playing}
    cpu: dict[str, list[float]] = {contestant.name: [] for contestant in playing}
    for turn in range(rounds):
        for contestant in playing[turn % len(playing) :] + playing[: turn % len(playing)]:
            speeds[contestant.name].append(contestant.speed(steps))
            cpu[contestant.name] += contestant.facts["processor"]
        print("  " + "   ".join(f"{name} {values[-1]:,.0f}" for name, values in speeds.items()))
    outcome: dict[str, Any] = {"shape": shape, "task": task, "precisions": precisions}
    outcome |= {"contestants": {}, "ratios": {}}
    bfloat16 = [speed["bfloat16"] for speed in precisions.values() if "bfloat16" in speed]
    if bfloat16:
        outcome["ratio_to_faster_bfloat16"] = round(ours_alone / max(bfloat16), 2)
    for contestant in playing:
        facts, name = contestant.facts, contestant.name
        contestant.close()
        outcome["contestants"][name] = {
            "tokens_per_second": spread(speeds[name], 0),
            "processor_seconds_per_step": round(statistics.median(cpu[name]), 3),
            "peak_rss_mb": round(facts["mb"]),
            **{key: facts.get(key) for key in ("precision", "parameters", "loss")},
        }
        if contestant is not ours:
            pairs = zip(speeds[ours.name], speeds[name], strict=True)
            outcome["ratios"][name] = spread([a / b for a, b in pairs], 3)
    report(outcome)
    return outcome


def report(outcome: dict[str, Any]) -> None:
    for name, facts in outcome["contestants"].items():
        print(
            f"  {name:20} {facts['tokens_per_second']['median']:8,.0f} tokens/s  "
            f"{facts['processor_seconds_per_step']:6.3f} CPU s a step  "
            f"{facts['peak_rss_mb']:6,} MB  {facts['parameters']:,} parameters"
        )
    for name, ratio in outcome["ratios"].items():
        print(f"  ours is {ratio['median']:.2f} x {name} ({ratio['min']:.2f} - {ratio['max']:.2f})")
    if "ratio_to_faster_bfloat16" in outcome:
        print(f"  and {outcome['ratio_to_faster_bfloat16']:.2f} x the faster bfloat16 rival")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contests", nargs="*", default=[*CONTESTS], metavar="CONTEST")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it works")
    parser.add_argument("--rounds", type=int, help="default 7, quick 2")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    arguments = parser.parse_args()
    unknown = set(arguments.contests) - set(CONTESTS)
    if unknown:
        parser.error(f"no contest {', '.join(unknown)}; there are {', '.join(CONTESTS)}")
    path = RESULTS / "train.json"
    for name in arguments.contests:
        rounds = arguments.rounds or (2 if arguments.quick else 7)
        outcome = compete(name, arguments.quick, rounds, arguments.steps)
        if not arguments.quick:
            results = read_json(path) if path.exists() else {}
            found = {on_this_processor(name): {"machine": machine(), **outcome}}
            write_json(path, {**results, **found})
            print(f"  written to {path}")


if __name__ == "__main__":
    main()
