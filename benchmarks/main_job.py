"""The main job, timed: `tf-gptopt run` in a process of its own, its report and its minutes.

    python benchmarks/main_job.py [RECIPE] [--keep DIR]

Writes benchmarks/results/main_job.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import machine, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="default")
    parser.add_argument("--keep", default=None, help="the run's folder (default: thrown away)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(given.keep or folder)
        facts = machine()  # the load before our own
        began = time.perf_counter()
        command = [sys.executable, "-m", "tf_gptopt", "run", given.recipe, "--out", str(out)]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        stages = {
            path.parent.name: json.loads(path.read_text())["seconds"]
            for path in sorted(out.glob("*/metrics.json"))
        }
        write_result(
            "main_job",
            {
                "machine": facts,
                "recipe": json.loads((out / "recipe.json").read_text()),
                "seconds": round(seconds, 1),
                "stage_seconds": stages,
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
                "report": json.loads((out / "report.json").read_text()),
            },
        )


if __name__ == "__main__":
    main()
