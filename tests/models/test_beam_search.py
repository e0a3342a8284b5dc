"""Beam search finds what an exhaustive search and `transformers` find."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.models.checkpoints import load_checkpoint
from tf_gptopt.models.generation import generate
from tf_gptopt.models.sampling import log_softmax


def beams(num_beams: int, length_penalty: float = 1.0) -> dict[str, Any]:
    return {"name": "beam", "num_beams": num_beams, "length_penalty": length_penalty}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random `transformers` GPT-2, and the same weights as a `GPTModel`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 100}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    folder: Path = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return theirs, load_checkpoint(folder)


@pytest.mark.parametrize(("num_beams", "length_penalty"), [(2, 0.0), (5, 1.0), (3, 2.0)])
def test_it_equals_transformers(both: Any, num_beams: int, length_penalty: float) -> None:
    import torch

    theirs, ours = both
    prompts = np.random.default_rng(num_beams).integers(0, 60, (4, 5))
    lengths, stop = set(), None
    for _ in range(2):
        expected = theirs.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(4, 5, dtype=torch.int64),
            num_beams=num_beams,
            length_penalty=length_penalty,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=60,
        )
        found = generate(
            ours,
            prompts.tolist(),
            max_new_tokens=12,
            sampler=beams(num_beams, length_penalty),
            stop=stop,
        )
        lengths |= {len(row) for row in found}
        padded = [row + [60] * (expected.shape[1] - len(row)) for row in found]
        assert padded == expected.tolist()
        stop = sorted({row[-3] for row in found[:2]})  # the second time, tokens that do come
    assert len(lengths) > 1  # some ended early, others did not


def test_enough_beams_find_the_likeliest_completion_of_all(tiny_model: Any) -> None:
    model = tiny_model(vocab_size=6, num_layers=1)
    prompt = [1, 2]
    likeliest, best = -np.inf, None
    rows = np.array([[*prompt, *new] for new in itertools.product(range(6), repeat=3)])
    log_probs = log_softmax(model(rows).numpy())
    for row, scores in zip(rows.tolist(), log_probs, strict=True):
        score = sum(scores[at - 1, row[at]] for at in range(2, 5))
        if score > likeliest:
            likeliest, best = score, row
    assert generate(model, prompt, max_new_tokens=3, sampler=beams(36)) == best


def test_a_batch_is_each_prompt_alone_and_one_beam_is_greedy(tiny_model: Any) -> None:
    model = tiny_model(max_sequence_length=80)  # the cache grows on the way
    prompts = [[1], [7, 8, 9, 10], list(range(60)), [60] * 63, [2] * 75]
    options = {"max_new_tokens": 8, "sampler": beams(3), "stop": [3, 4, 5]}
    together = generate(model, prompts, **options)
    assert together == [generate(model, prompt, **options) for prompt in prompts]

    options = {"max_length": 75, "repetition_penalty": 1.3, "logit_bias": {4: -float("inf")}}
    found = generate(model, prompts, sampler=beams(1), **options)
    assert found == generate(model, prompts, **options)


def test_a_completion_ends_at_a_stop_string(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model(vocab_size=300, num_layers=1)
    model.tokenizer = tiny_tokenizer
    prompt = tiny_tokenizer.encode("import").tolist()
    options = {"max_new_tokens": 15, "stop_at_eot": False, "sampler": beams(1)}
    whole = tiny_tokenizer.decode(generate(model, prompt, **options)[len(prompt) :])
    stop = whole[3:6]
    found = generate(model, prompt, stop=stop, **options)
    assert len(found) < len(prompt) + 15
    assert stop in tiny_tokenizer.decode(found[len(prompt) :])
    as_text = generate(model, "import", stop=stop, **options)
    assert as_text == "import" + whole[: whole.index(stop)]


def test_a_narrow_vocabulary_and_everything_forbidden(tiny_model: Any) -> None:
    model = tiny_model(vocab_size=3, num_layers=1)
    only = {0: -float("inf"), 1: -float("inf")}
    found = generate(model, [1], max_new_tokens=4, sampler=beams(5), logit_bias=only)
    assert found == [1, 2, 2, 2, 2]
    with pytest.raises(UserError, match="leave no token to choose"):
        generate(model, [1], sampler="beam", logit_bias=only | {2: -float("inf")})
    model.compile(sampler="beam")
    assert len(model.generate([1], max_new_tokens=4)) == 5
