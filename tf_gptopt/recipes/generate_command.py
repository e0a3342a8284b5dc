"""`tf-gptopt generate`: what a model says after a prompt. A .tflite file needs no TensorFlow."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from tf_gptopt._errors import UserError
from tf_gptopt._options import Options
from tf_gptopt.recipes import speak


def generate_command(options: Options, argv: list[str]) -> int:
    """Parse, complete, print as it comes."""
    options.add(
        "words", nargs="*", default=[], metavar="[MODEL] PROMPT",
        help="the two below, without their names",
    )  # fmt: skip
    options.add(
        "--model", default=None,
        help="a .tflite file, or a stage's or a run's folder (default: the example model)",
    )  # fmt: skip
    options.add("--prompt", default=None, help="the text to complete; - reads it from stdin")
    options.add("--max-new-tokens", type=int, default=100, help="how many tokens to write")
    options.add(
        "--temperature", type=float, default=None,
        help="0 is greedy; default 1 beside the next three, and without them 0.7 with top-k 40",
    )  # fmt: skip
    options.add("--top-k", type=int, default=None, help="sample among the k likeliest")
    options.add("--top-p", type=float, default=None, help="sample among the likeliest share p")
    options.add(
        "--min-p", type=float, default=None,
        help="sample among those at least this many times as likely as the likeliest, e.g. 0.05",
    )  # fmt: skip
    for name, text in {
        "repetition": "divides what speaks for a token of prompt or completion, e.g. 1.2",
        "frequency": "taken from a logit each time the completion holds the token, e.g. 0.5",
        "presence": "taken once from the logit of every token of the completion",
    }.items():
        options.add(f"--{name}-penalty", type=float, default=None, help=text)
    options.add(
        "--penalty-window", type=int, default=None,
        help="how many last tokens the penalties look at (default: as many as the context)",
    )  # fmt: skip
    options.add(
        "--logit-bias", nargs="*", default=[], metavar="ID:VALUE",
        help="added to a token's logit, e.g. 13:-2.5; ID:-inf forbids it",
    )  # fmt: skip
    options.add("--seed", type=int, default=None, help="makes sampling repeatable")
    options.add(
        "--stop", nargs="*", default=[],
        help=r"strings that end the completion; \n is a line end, \t a tab, \\ a backslash",
    )  # fmt: skip
    options.add("--threads", type=int, default=None, help="processor threads (default: all)")
    options.add(
        "--weight-cache", default=None, metavar="FOLDER",
        help="keep packed weights there: the next start takes a fraction of the time (.tflite)",
    )  # fmt: skip
    options.add(
        "--draft", default=None, metavar="lookup|FILE",
        help="guess tokens ahead: a small .tflite of the same tokenizer, or text that repeats",
    )  # fmt: skip
    options.add(
        "--overflow", default="stop", metavar="stop|slide",
        help="when the context is full: end, or forget the oldest tokens and go on (.tflite)",
    )  # fmt: skip
    options.add("--keep", type=int, default=0, help="first tokens that a slide never forgets")
    given, _ = options.parse(argv)
    model, prompt = _model_and_prompt(given.words, given.model, given.prompt)
    prompt = _read_stdin() if prompt == "-" else prompt
    path = Path(model) if model is not None else speak.example_model()
    numbers = {name: given[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    if not any(value is not None for value in numbers.values()):
        numbers = speak.SAMPLING
    pieces = speak.stream_completion(
        path,
        prompt,
        max_new_tokens=given.max_new_tokens,
        seed=given.seed,
        stop=[_unescaped(text) for text in given.stop] or None,
        threads=given.threads,
        weight_cache=given.weight_cache,
        draft=given.draft,
        overflow=given.overflow,
        keep=given.keep,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        penalty_window=given.penalty_window,
        presence_penalty=given.presence_penalty,
        logit_bias=speak.read_biases(given.logit_bias),
        **numbers,
    )
    speak.say(prompt, pieces)
    return 0


def _model_and_prompt(
    words: list[str], model: str | None, prompt: str | None
) -> tuple[str | None, str]:
    """Both, from their options and from words without a name: a model and a prompt, or one of them
    where the other has its option; a word alone is a prompt for the example model."""
    words = list(words)
    if prompt is None and words:
        prompt = words.pop()
        if model is None and not words and _names_a_model(prompt):
            raise UserError(
                f'{prompt} is a model. Give a prompt as well: tf-gptopt generate {prompt} "def '
                f'main(". (To complete the text {prompt!r} itself, say --prompt {prompt}.)'
            )
    if model is None and words:
        model = words.pop()
    if words:
        raise UserError(
            "generate takes one model and one prompt. Received also: "
            f"{' '.join(words)!r}. Put quotes around the prompt."
        )
    if prompt is None:
        raise UserError('Give a prompt: tf-gptopt generate [MODEL] "def main("')
    return model, prompt


def _names_a_model(word: str) -> bool:
    return word.endswith(".tflite") or os.path.exists(word)


def _read_stdin() -> str:
    """The prompt on standard input, without the line end that `echo` puts behind it."""
    raw = sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The prompt on standard input is not UTF-8 text: byte 0x{raw[error.start]:02x} at "
            f"offset {error.start}."
        ) from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise UserError("There is no prompt on standard input, which - reads it from.")
    return text


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def _unescaped(text: str) -> str:
    """`\\n` and the like as what they stand for: a shell hands two characters over."""
    return re.sub(r"\\([ntr\\])", lambda found: _ESCAPES[found[1]], text)
