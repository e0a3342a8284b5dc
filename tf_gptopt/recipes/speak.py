"""Let any model complete a prompt, piece by piece: a .tflite file or a stage's folder."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

from tf_gptopt._errors import UserError
from tf_gptopt._startup import load_tensorflow
from tf_gptopt.models.choosing import SamplingOptions, read_options
from tf_gptopt.recipes.places import speaking_place

EXAMPLE = Path("saved_models") / "example"
# Small models repeat themselves when they are greedy
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 40}


def stream_completion(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] | None = None,
    threads: int | None = None,
    weight_cache: str | Path | None = None,
    draft: str | Path | None = None,
    overflow: str = "stop",
    keep: int = 0,
    **options: Unpack[SamplingOptions],
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as they are generated.

    Args:
        path: a .tflite file, a folder with model.tflite (LiteRT alone is loaded), a folder with
            Keras weights (TensorFlow is loaded), or a run's folder.
        prompt: the text to complete.
        max_new_tokens: at most so many; default as many as the context has room for.
        seed: makes the draws repeatable.
        stop: strings that end the text.
        threads: processor threads; default all.
        weight_cache: of a .tflite file: a folder for packed weights, see `TFLiteGPT`.
        draft: `"lookup"` or a small .tflite file that guesses ahead, see `Conversation.generate`.
        overflow, keep: of a .tflite file: what happens when the context is full, see
            `Conversation.generate`.
        **options: how tokens are chosen, see `models.choosing.SamplingOptions`; default greedy.

    Raises:
        UserError: when there is no model at `path`, no tokenizer beside it, or for an impossible
            option.
    """
    path = speaking_place(path)
    if not path.exists():
        raise UserError(
            f"There is no model at {path}. Name a .tflite file or a stage's folder, such as "
            "saved_models/python/export."
        )
    read_options(options)  # a mistake shows before a model is loaded
    if path.is_file():
        from tf_gptopt.tflite.runtime import TFLiteGPT

        yield from TFLiteGPT(path, threads=threads, weight_cache=weight_cache).stream(
            prompt,
            max_new_tokens,
            seed=seed,
            stop=stop,
            draft=draft,
            overflow=overflow,
            keep=keep,
            **options,
        )
        return
    if draft is not None or weight_cache is not None or overflow != "stop" or keep:
        raise UserError(
            "Drafts, a weight cache and a sliding context are for .tflite files, and "
            f"{path} holds Keras weights. Export them first."
        )
    load_tensorflow()
    from tf_gptopt.models import checkpoints, generation

    if threads is not None:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
    model = checkpoints.load_checkpoint(path)
    yield from generation.stream(model, prompt, max_new_tokens, seed=seed, stop=stop, **options)


def read_biases(words: Sequence[str]) -> dict[int, float]:
    """`{token id: number}` from words such as `"13:-2.5"`."""
    biases = {}
    for word in words:
        token, _, value = word.partition(":")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise UserError(
                f"--logit-bias takes token ids and numbers as in 13:-2.5. Received: {word!r}."
            ) from None
    return biases


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
