"""generate: what goes in and comes out, and that the cache changes the speed alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt._tokenizer import Tokenizer
from tf_gptopt.models.generation import generate
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.sampling import get_sampler

Build = Callable[..., GPTModel]


def uncached_greedy(model: GPTModel, prompt: list[int], length: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < length:
        ids.append(int(np.argmax(model(np.array([ids]))[0, -1])))
    return ids


@pytest.fixture
def talker(tiny_model: Build, tiny_tokenizer: Tokenizer) -> GPTModel:
    model = tiny_model(vocab_size=300)
    model.tokenizer = tiny_tokenizer
    return model


# The tokens


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_embeddings": False},
        {"num_heads": (1, 2), "head_dim": 6, "intermediate_dim": (9, 40)},
    ],
)
def test_greedy_equals_the_uncached_loop_to_the_end(
    tiny_model: Build, shape: dict[str, Any]
) -> None:
    model = tiny_model(max_sequence_length=70, **shape)  # beyond the first cache of 64
    prompt = [5, 4, 3]
    found = generate(model, prompt)
    assert len(found) == 70
    assert found == uncached_greedy(model, prompt, 70)


def test_the_cache_grows_over_several_sizes(tiny_model: Build) -> None:
    model = tiny_model(max_sequence_length=300)
    prompt = list(np.random.default_rng(0).integers(0, 61, 120))
    found = generate(model, prompt, max_new_tokens=20)  # 128 tokens lie in between
    assert found == uncached_greedy(model, prompt, 140)
    long = generate(model, found * 2, max_length=281)
    assert long == uncached_greedy(model, found * 2, 281)


def test_a_batch_of_ragged_prompts_is_each_alone(tiny_model: Build) -> None:
    model = tiny_model(max_sequence_length=80)
    prompts = [[1], [7, 8, 9, 10], list(range(60)), [60] * 63]
    together = generate(model, prompts, max_length=75)
    assert together == [generate(model, prompt, max_length=75) for prompt in prompts]
    assert [row[: len(p)] for row, p in zip(together, prompts, strict=True)] == prompts
    more = generate(model, prompts, max_new_tokens=5)
    assert [len(row) for row in more] == [6, 9, 65, 68]


def test_it_sees_new_weights_and_is_traced_once(tiny_model: Build) -> None:
    model = tiny_model(seed=0)
    first = generate(model, [1, 2], max_length=9)
    model.set_weights(tiny_model(seed=1).get_weights())
    assert generate(model, [1, 2], max_length=9) == uncached_greedy(model, [1, 2], 9) != first
    generate(model, [[1] * 9, [2]], max_length=12)
    model.generate(np.ones((5, 3), np.int64), 32)
    assert model.__dict__["_cached_step"].experimental_get_tracing_count() == 1


def test_generating_leaves_the_model_savable(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model(num_layers=1)
    expected = generate(model, [1, 2], max_length=6)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert generate(loaded, [1, 2], max_length=6) == expected
    assert generate(copy.deepcopy(model), [1, 2], max_length=6) == expected


def test_samplers_and_seeds(tiny_model: Build) -> None:
    model = tiny_model()
    prompts = [[1, 2], [3]]

    def draw(sampler: Any, seed: int | None) -> list[list[int]]:
        return generate(model, prompts, max_length=20, sampler=sampler, seed=seed)

    assert draw("random", 1) == draw("random", 1) != draw("random", 2)
    assert draw("random", None) != draw("random", None)
    assert draw({"name": "top_k", "k": 1}, 3) == draw("greedy", 4)
    assert draw(get_sampler({"name": "top_p", "p": 1e-9}), 3) == draw("greedy", 4)
    hot = draw({"name": "random", "temperature": 1e-4}, 5)
    assert hot == draw("greedy", None)

    model.compile(sampler={"name": "top_k", "k": 5})
    assert draw(None, 7) == draw({"name": "top_k", "k": 5}, 7) != draw("greedy", 7)
    with pytest.raises(UserError, match="Did you mean 'greedy'"):
        draw("gredy", 1)


def test_penalties_see_prompt_and_completion(tiny_model: Build) -> None:
    model = tiny_model()
    prompts = [[1, 2, 3], [7]]
    never_twice = generate(model, prompts, max_new_tokens=25, presence_penalty=1e4)
    said = [row[len(prompt) :] for row, prompt in zip(never_twice, prompts, strict=True)]
    assert [len(set(row)) for row in said] == [25, 25]  # as the prompt did not say them
    assert generate(model, [1, 2], max_new_tokens=1, presence_penalty=1e4) == generate(
        model, [1, 2], max_new_tokens=1
    )
    held = generate(model, prompts, max_new_tokens=9, repetition_penalty=1e-4)
    positive = [row for row in held if len(set(row)) <= 3]  # the prompt's tokens, magnified
    assert positive
    near = generate(model, [1], max_new_tokens=9, presence_penalty=1e4, penalty_window=2)
    assert all(len(set(near[at : at + 3])) == 3 for at in range(1, 8))
    assert len(set(near[1:])) < 9
    assert generate(model, [1], max_new_tokens=4, logit_bias={9: 1e4}) == [1, 9, 9, 9, 9]
    forbidden = {token: -float("inf") for token in range(61) if token not in (8, 9)}
    drawn = generate(model, [1], max_new_tokens=20, top_p=0.99, seed=0, logit_bias=forbidden)
    assert set(drawn[1:]) == {8, 9}
    with pytest.raises(UserError, match="leave no token to choose"):
        generate(model, [1], logit_bias=forbidden | {8: -float("inf"), 9: -float("inf")})
    with pytest.raises(UserError, match="Did you mean 'repetition_penalty'"):
        generate(model, [1], repetition_penality=1.1)


def test_a_row_says_the_same_whatever_the_other_rows_are(tiny_model: Build) -> None:
    model = tiny_model()
    options = {"max_length": 20, "temperature": 1.5, "repetition_penalty": 1.2, "seed": 3}
    alone = generate(model, [[1, 2]], **options)
    others = generate(model, [[1, 2], [3], [4] * 15, [1, 2]], **options)
    assert others[0] == alone[0] != others[3]
    assert others[:2] == generate(model, [[1, 2], [3]], **options)


# What goes in and comes out


def test_kinds_of_ids(tiny_model: Build) -> None:
    model = tiny_model()
    expected = uncached_greedy(model, [1, 2, 3], 8)
    assert generate(model, [1, 2, 3], 8) == expected
    assert generate(model, (1, 2, 3), 8) == expected
    assert generate(model, [[1, 2, 3]], 8) == [expected]
    assert generate(model, [np.array([1, 2, 3])], 8) == [expected]
    for one in (np.array([1, 2, 3]), tf.constant([1, 2, 3])):
        found = generate(model, one, 8)
        assert (found.dtype, found.tolist()) == (np.int32, expected)
    found = generate(model, np.array([[1, 2, 3], [4, 5, 6]], np.uint8), 8)
    assert found.shape == (2, 8)
    assert found.tolist() == [expected, uncached_greedy(model, [4, 5, 6], 8)]
    assert generate(model, [1, 2, 3], 3) == [1, 2, 3]


def test_stop_ids(tiny_model: Build) -> None:
    model = tiny_model()
    full = generate(model, [1, 2, 3])
    new = full[3:]
    cut = full[: 3 + new.index(new[4]) + 1]
    assert generate(model, [1, 2, 3], stop=new[4]) == cut
    assert generate(model, [1, 2, 3], stop=[new[4]]) == cut
    both = np.array([[1, 2, 3], [9, 9, 9]])
    rows = generate(model, both, stop=[new[4]])
    assert rows[0, : len(cut)].tolist() == cut
    assert (rows[0, len(cut) :] == cut[-1]).all()  # an array is filled up with the last token


def test_strings(talker: GPTModel) -> None:
    tokenizer = talker.tokenizer
    prompt = "def test(self):"
    ids = tokenizer.encode(prompt)
    found = talker.generate(prompt, max_new_tokens=8, stop_at_eot=False)
    assert found.startswith(prompt)
    assert found == tokenizer.decode(uncached_greedy(talker, ids, len(ids) + 8))
    assert talker.generate([prompt, "import os"], max_new_tokens=8, stop_at_eot=False) == [
        found,
        talker.generate("import os", max_new_tokens=8, stop_at_eot=False),
    ]


def test_a_stop_string_may_span_tokens(talker: GPTModel) -> None:
    full = talker.generate("import", max_length=30, stop_at_eot=False)
    new = full.removeprefix("import")
    stop = new[3:9]
    assert len(talker.tokenizer.encode(stop)) > 1
    found = talker.generate("import", max_length=30, stop_at_eot=False, stop=["never", stop])
    assert found == "import" + new[: new.index(stop)]
    ids = talker.tokenizer.encode("import")
    by_id = talker.generate(ids, max_length=30, stop_at_eot=False, stop=stop)
    assert stop in talker.tokenizer.decode(by_id)
    assert len(by_id) < 30


def test_end_of_text(talker: GPTModel) -> None:
    eot = talker.tokenizer.eot_id
    prompt = talker.tokenizer.encode("import os").tolist()
    table = talker.get_layer("token_embedding").embeddings

    def always(token: int) -> None:  # the final norm gives one vector, which likes one token
        talker.get_layer("final_norm").gamma.assign(np.zeros(24))
        talker.get_layer("final_norm").beta.assign(table[token] * 100)
        table.assign(table / tf.norm(table, axis=1, keepdims=True))

    always(eot)
    assert talker.generate("import os") == "import os"
    assert talker.generate(prompt) == [*prompt, eot]
    assert talker.generate(prompt, max_new_tokens=3, stop_at_eot=False) == [*prompt, *[eot] * 3]


# What cannot work


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "is empty"),
        ([[1], []], {}, "Prompt 1 is empty"),
        (np.zeros((0, 3), int), {}, "no prompts"),
        ([1] * 33, {}, "33 tokens long and the model's context is 32"),
        ([1, 61], {}, "token id 61, outside the vocabulary of 61"),
        ([[1], [2, -1]], {}, "Prompt 1 has token id -1"),
        ([1.0, 2.0], {}, r"must be integers\. Received: float64"),
        ([[1, 2], [0.5]], {}, "must be integers"),
        (np.ones((1, 2, 3), int), {}, r"shape \(1, 2, 3\)"),
        (7, {}, r"shape \(\)"),
        ([[[1]], [[2]]], {}, "one list"),
        ("text", {}, "no tokenizer"),
        (["a", "b"], {}, "no tokenizer"),
        ([1], {"stop": "x"}, "Stop strings need a tokenizer"),
        ([1, 2, 3], {"max_length": 2}, "a prompt alone has 3"),
        ([1], {"max_length": 33}, "exceeds the model's context of 32"),
        ([1], {"max_new_tokens": 0}, "must be positive"),
        ([1], {"max_new_tokens": 2.5}, r"max_new_tokens must be positive.*=2\.5"),
        ([1], {"max_new_tokens": "3"}, "max_new_tokens must be positive.*='3'"),
        ([1], {"max_new_tokens": True}, "max_new_tokens must be positive"),
        ([1], {"max_length": 9.0}, "max_length must be positive"),
        ([1], {"max_length": "9"}, "max_length must be positive"),
        ([1], {"stop": 1.5}, r"one or more strings or token ids. Received: stop=1\.5"),
        ([1], {"stop": [True]}, "one or more strings or token ids"),
        ([1], {"stop": np.array(2.0)}, "one or more strings or token ids"),
        ([1], {"penalty_window": 0}, "penalty_window must be a positive integer"),
        ([1], {"max_length": 9, "max_new_tokens": 3}, "not both"),
    ],
)
def test_impossible_requests(
    tiny_model: Build, inputs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(tiny_model(num_layers=1), inputs, **options)


def test_numbers_of_numpy_are_numbers(tiny_model: Build) -> None:
    model = tiny_model()
    expected = generate(model, [1, 2], max_new_tokens=3)
    assert generate(model, [1, 2], max_new_tokens=np.int64(3)) == expected
    assert generate(model, [1, 2], max_length=np.int32(5)) == expected
    assert generate(model, [1, 2], max_new_tokens=10**12) == generate(model, [1, 2])
    end = expected[2]
    for stop in (np.int64(end), np.array(end), np.array([end]), [np.int32(end)]):
        assert generate(model, [1, 2], stop=stop) == [1, 2, end]


def test_impossible_texts(talker: GPTModel) -> None:
    with pytest.raises(UserError, match=r"is empty.*endoftext"):
        talker.generate("")
    with pytest.raises(UserError, match="context is 32"):
        talker.generate("abc" * 100)
    with pytest.raises(UserError, match="empty stop string"):
        talker.generate("a", stop="")


# Speed


def test_a_token_costs_less_than_a_forward_pass() -> None:
    model = GPTModel.from_preset("mini")
    ids = np.random.default_rng(0).integers(0, 4096, 216)
    forward = tf.function(model, input_signature=[tf.TensorSpec([None, None], tf.int32)])
    forward(ids[None].astype(np.int32))
    generate(model, ids[:3], max_new_tokens=2)

    started = time.process_time()  # of this process: other work on the machine does not count
    tokens = 20
    for n in range(tokens):
        np.argmax(forward(np.resize(ids, (1, 216 + n)).astype(np.int32))[0, -1])
    uncached = time.process_time() - started
    started = time.process_time()
    generate(model, ids[:210], max_new_tokens=tokens)
    cached = time.process_time() - started
    print(f"CPU ms a token: {uncached / tokens * 1e3:.1f} uncached, {cached / tokens * 1e3:.1f}")
    assert cached < uncached / 2


def test_stream_says_what_generate_says(tiny_model, tiny_tokenizer):
    from tf_gptopt.models.generation import generate, stream

    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    options = {"max_new_tokens": 12, "sampler": "random", "seed": 4}
    whole = generate(model, "ab", **options)
    pieces = list(stream(model, "ab", **options))
    assert "ab" + "".join(pieces) == whole
    assert len(pieces) > 1
    assert "ab" + "".join(stream(model, "ab", presence_penalty=2.0)) == generate(
        model, "ab", presence_penalty=2.0
    )
    with pytest.raises(UserError, match="Beam search"):
        next(stream(model, "ab", sampler="beam"))
