"""How fast the files of benchmarks/quality.py decode, in processes that know nothing of TensorFlow:
its many objects make Python's garbage collector a part of every token."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import in_a_child
from tf_gptopt._files import read_json, write_json
from tf_gptopt.evaluation.speed import measure_speed
from tf_gptopt.tflite.metadata import read_metadata
from tf_gptopt.tflite.runtime import TFLiteGPT

if TYPE_CHECKING:
    from benchmarks.quality_bounds import Rows
    from benchmarks.quality_lab import Lab

ROUNDS, TOKENS = 12, 60


def time_decoding(lab: Lab, rows: Rows) -> None:
    """Adds `decode` (tokens per second, on one thread: a second one gains models of this size 4%)
    and `decode_ratio` (to the parent's int8 file, in turns) to the rows. Files of one shape and
    scheme take the same time, whatever their weights are, so each is timed once and kept."""
    if "parent" not in rows:
        return
    path = lab.folder / "decoding.json"
    timed = read_json(path) if path.is_file() else {}
    for name, row in rows.items():
        file, parent = (lab.folder / run / "model.tflite" for run in (name, "parent"))
        about = read_metadata(file, verify=False)
        shape = f"{about['gpt']} {about['quantization']}"
        if shape not in timed:
            timed[shape] = in_a_child(__file__, str(file), str(parent))
            write_json(path, timed)
        row.update(timed[shape])


def time_pair(file: str, parent: str) -> dict[str, float]:
    pair = [TFLiteGPT(path, threads=1) for path in (file, parent)]
    rounds = []
    for number in range(ROUNDS):
        order = (0, 1) if number % 2 else (1, 0)  # the second of two is some percent slower
        rates = {each: measure_speed(pair[each], tokens=TOKENS).decode for each in order}
        rounds.append((rates[0], rates[1]))
    return {
        "decode": round(statistics.median(ours for ours, _ in rounds)),
        "decode_ratio": round(statistics.median(ours / theirs for ours, theirs in rounds), 3),
    }


if __name__ == "__main__":
    print(json.dumps(time_pair(*json.loads(sys.argv[2]))))
