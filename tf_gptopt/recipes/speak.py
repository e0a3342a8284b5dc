"""Let any model complete a prompt, piece by piece: a .tflite file or a stage's folder."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._startup import load_tensorflow
from tf_gptopt.models.sampling import make_sampler

EXAMPLE = Path("saved_models") / "example"
# Small models repeat themselves when they are greedy
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 40}


def stream_completion(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] | None = None,
    threads: int | None = None,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as they are generated.

    Args:
        path: a .tflite file, a folder with model.tflite (LiteRT alone is loaded) or a folder with
            Keras weights (TensorFlow is loaded).
        prompt: the text to complete.
        max_new_tokens: at most so many; default as many as the context has room for.
        temperature: 0 is greedy; default 1 where `top_k` or `top_p` is given, else 0.
        top_k: draw from the k most likely tokens.
        top_p: draw from the most likely tokens that together reach this probability.
        seed: makes the draws repeatable.
        stop: strings that end the text.
        threads: processor threads; default all.

    Raises:
        UserError: when there is no model at `path`, or no tokenizer beside it.
    """
    path = Path(path)
    if (path / "model.tflite").is_file():
        path = path / "model.tflite"
    if not path.exists():
        raise UserError(
            f"There is no model at {path}. Name a .tflite file or a stage's folder, such as "
            "saved_models/python/export."
        )
    sampler = make_sampler(temperature, top_k, top_p)
    options: dict[str, Any] = {"sampler": sampler, "seed": seed, "stop": stop}
    if path.is_file():
        from tf_gptopt.tflite.runtime import TFLiteGPT

        yield from TFLiteGPT(path, threads=threads).stream(prompt, max_new_tokens, **options)
        return
    load_tensorflow()
    from tf_gptopt.models import checkpoints, generation

    if threads is not None:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
    model = checkpoints.load_checkpoint(path)
    yield from generation.stream(model, prompt, max_new_tokens, **options)


def say(prompt: str, pieces: Iterator[str]) -> None:
    """Print a prompt and what follows it, as it comes."""
    sys.stdout.write(prompt + next(pieces, ""))  # a mistake shows before anything is printed
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def example_model() -> Path:
    """The small model that ships with the project: beside the sources, or where pip put it."""
    installed = Path(sysconfig.get_path("data")) / "share" / "tf-gptopt" / "example"
    for folder in (EXAMPLE, Path(__file__).parents[2] / EXAMPLE, installed):
        if (folder / "model.tflite").is_file():
            return folder
    raise UserError(
        "The example model is not installed. Name a model: tf-gptopt generate MODEL ..."
    )
