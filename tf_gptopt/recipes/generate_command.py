"""`tf-gptopt generate`: what a model says after a prompt. A .tflite file needs no TensorFlow."""

from __future__ import annotations

from pathlib import Path

from tf_gptopt._errors import UserError
from tf_gptopt._options import Options
from tf_gptopt.recipes import speak


def generate_command(options: Options, argv: list[str]) -> int:
    """Parse, complete, print as it comes."""
    options.add("model", nargs="?", help="a .tflite file or a folder (default: the example model)")
    options.add("prompt", nargs="?", help="the text to complete")
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
        "frequency": "taken from a logit each time prompt or completion hold the token, e.g. 0.5",
        "presence": "taken once from the logit of every token of prompt or completion",
    }.items():
        options.add(f"--{name}-penalty", type=float, default=None, help=text)
    options.add(
        "--logit-bias", nargs="*", default=[], metavar="ID:VALUE",
        help="added to a token's logit, e.g. 13:-2.5; ID:-inf forbids it",
    )  # fmt: skip
    options.add("--seed", type=int, default=None, help="makes sampling repeatable")
    options.add("--stop", nargs="*", default=[], help="strings that end the completion")
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
    model, prompt = given.model, given.prompt
    if prompt is None:  # one argument: a prompt for the example model
        model, prompt = None, model
    if prompt is None:
        raise UserError('Give a prompt: tf-gptopt generate [MODEL] "def main("')
    path = Path(model) if model is not None else speak.example_model()
    numbers = {name: given[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    if not any(value is not None for value in numbers.values()):
        numbers = speak.SAMPLING
    pieces = speak.stream_completion(
        path,
        prompt,
        max_new_tokens=given.max_new_tokens,
        seed=given.seed,
        stop=given.stop or None,
        threads=given.threads,
        weight_cache=given.weight_cache,
        draft=given.draft,
        overflow=given.overflow,
        keep=given.keep,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        logit_bias=speak.read_biases(given.logit_bias),
        **numbers,
    )
    speak.say(prompt, pieces)
    return 0
