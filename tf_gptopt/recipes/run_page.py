"""A run's report.md: what was measured, the text, each stage, and what the file says of a text that
it has not seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from tf_gptopt._clock import clock
from tf_gptopt._files import read_json
from tf_gptopt._tokenizer import Tokenizer
from tf_gptopt.recipes.loss_log import FILE as LOSSES

_PROMPT, _MORE = 16, 80  # tokens of a held-out text: its beginning, and what follows


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt, what the file says after it, and what the held-out text says, if it is of one."""

    prompt: str
    said: str = ""
    following: str | None = None


def held_out_sample(dataset_folder: Path) -> Sample:
    """The beginning of the first held-out document that is long enough."""
    from tf_gptopt.data.dataset import TokenDataset

    dataset, tokenizer = TokenDataset.load(dataset_folder), Tokenizer.load(dataset_folder)
    tokens, eot = np.asarray(dataset.tokens("valid")), dataset.info.eot_id
    ends = np.append(np.flatnonzero(tokens == eot), len(tokens))
    begins = np.append(0, ends[:-1] + 1)
    enough = np.flatnonzero(ends - begins > 2 * _PROMPT)
    which = int(enough[0]) if len(enough) else int(np.argmax(ends - begins))
    document = tokens[begins[which] : ends[which]][: _PROMPT + _MORE].tolist()
    size = min(_PROMPT, max(1, len(document) // 2))
    while size > 1 and tokenizer.decode(document[:size]).endswith("\ufffd"):
        size -= 1  # a character is not cut
    return Sample(tokenizer.decode(document[:size]), following=tokenizer.decode(document[size:]))


def run_page(out: Path, sample: Sample) -> str:
    """report.md of the run in `out`, whose stages are finished."""
    stages = {path.parent.name: read_json(path) for path in out.glob("*/metrics.json")}
    parts = [(out / "evaluate" / "report.md").read_text("utf-8")]
    parts += [_text(stages), _stages(stages, out), _sample(sample)]
    return "\n".join(parts)


def _text(stages: dict[str, Any]) -> str:
    corpus, data = stages["tokenizer"], stages["dataset"]
    train, valid = data["train"], data["valid"]
    ratio = (train["text_bytes"] + valid["text_bytes"]) / (train["tokens"] + valid["tokens"])
    return (
        f"## The text\n\n{corpus['documents']:,} documents of {corpus['characters']:,} characters: "
        f"{train['documents']:,} with {train['tokens']:,} tokens to train on, "
        f"{valid['documents']:,} with {valid['tokens']:,} held out "
        f"({valid['tokens'] / (train['tokens'] + valid['tokens']):.1%}). The vocabulary has "
        f"{data['vocab_size']:,} entries, and a token is {ratio:.2f} bytes of text.\n"
    )


def _stages(stages: dict[str, Any], out: Path) -> str:
    """A row for each stage, in the order in which they ended."""
    rows = [
        "## The stages\n",
        "| stage | time | steps | tokens | passes over the text | last loss | losses |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    order = sorted(stages, key=lambda name: (out / name / "metrics.json").stat().st_mtime_ns)
    for name in order:
        found = stages[name]
        cells = [name, clock(max(found["seconds"], found.get("training_seconds", 0)))]
        if "steps" in found:
            passes = found["tokens"] / stages["dataset"]["train"]["tokens"]
            cells += [f"{found['steps']:,}", f"{found['tokens']:,}", f"{passes:.2f}"]
            cells += [f"{found['loss']:.4f}"]
        cells += [""] * (6 - len(cells))
        file = f"{name}/{LOSSES}"
        cells.append(f"[{LOSSES}]({file})" if (out / file).is_file() else "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def _sample(sample: Sample) -> str:
    is_held_out = sample.following is not None
    whose = "the beginning of a text that was held out" if is_held_out else "the recipe's prompt"
    parts = [f"## What it says\n\nexport/model.tflite, after {whose}:\n"]
    parts += [_fenced(sample.prompt), "says\n", _fenced(sample.said)]
    if is_held_out:
        parts += ["where the text goes on\n", _fenced(sample.following)]
    return "\n".join(parts)


def _fenced(text: str) -> str:
    fence = "~~~"
    while fence in text:
        fence += "~"
    return f"{fence}text\n{text}\n{fence}\n"
