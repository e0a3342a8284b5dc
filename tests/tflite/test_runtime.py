"""The runtime generates what the model says, as text too, and says why it stops or refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.tflite.runtime import TFLiteGPT

# Invariant 3: the file generates what Keras does, up to the first near-tie


@pytest.mark.parametrize(("scheme", "tie"), [("float32", 1e-3), ("int8", 0.3)])
def test_greedy_generation_is_that_of_keras(exported, scheme, tie, some_ids):
    model, runtime = exported(scheme, max_sequence_length=100)
    prompt = some_ids(7).tolist()
    ours = runtime.generate(prompt, 80)
    keras = model.generate(prompt, max_new_tokens=80)
    assert len(ours) == len(keras) == 87
    for position in range(7, 87):
        if ours[position] != keras[position]:
            logits = model(np.array([keras[:position]]))[0, -1].numpy()
            gap = logits[keras[position]] - logits[ours[position]]
            assert gap < tie, f"at {position} {gap:.3f} apart"
            break
    else:
        return
    assert position > 8


def test_a_seed_repeats_what_is_drawn(exported):
    _, runtime = exported("float32")
    draws = [runtime.generate([1, 2], 20, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    assert runtime.generate([1, 2], 20, top_k=1) == runtime.generate([1, 2], 20)
    named = runtime.generate([1, 2], 20, sampler={"name": "top_k", "k": 5}, seed=3)
    assert named == runtime.generate([1, 2], 20, top_k=5, seed=3)


def test_generation_ends_where_the_context_does(exported, some_ids):
    _, runtime = exported("float32")
    assert len(runtime.generate(some_ids(30))) == 32
    assert runtime.finish_reason == "context"
    assert len(runtime.generate(some_ids(30), 99)) == 32
    assert runtime.finish_reason == "context"
    assert len(runtime.generate(some_ids(30), 1)) == 31
    assert runtime.finish_reason == "length"
    assert len(runtime.generate(some_ids(32), 5)) == 32
    assert runtime.finish_reason == "context"
    assert runtime.generate(some_ids(3), 0) == some_ids(3).tolist()
    assert runtime.finish_reason == "length"


# Text


def test_text_in_text_out(speaking):
    text = speaking.generate("import os", 12)
    ids = speaking.tokenizer.encode("import os").tolist()
    assert text.startswith("import os")
    assert text == speaking.tokenizer.decode(speaking.generate(ids, 12))
    assert speaking.finish_reason == "length"


def test_pieces_join_to_the_text(speaking):
    pieces = list(speaking.stream("import os", 15, temperature=1.5, seed=5))
    whole = speaking.generate("import os", 15, temperature=1.5, seed=5)
    assert "import os" + "".join(pieces) == whole
    assert len(pieces) > 3


def test_stop_strings_end_the_text(speaking):
    whole = speaking.generate("import os", 15)[len("import os") :]
    stop = whole[4:6]
    assert speaking.generate("import os", 15, stop=stop) == "import os" + whole[: whole.index(stop)]
    assert speaking.finish_reason == "stop"
    ids = speaking.generate(speaking.tokenizer.encode("import os"), 15, stop=[stop, "never"])
    assert stop in speaking.tokenizer.decode(ids)
    assert speaking.finish_reason == "stop"


def test_the_end_of_text_token_ends_the_text(exported, tiny_tokenizer, tiny_model):
    model = tiny_model(vocab_size=300, tie_embeddings=False)
    head = model.base_layer("token_logits").kernel
    _, runtime = exported("float32", model=model, tokenizer=tiny_tokenizer)
    third = runtime.generate([5, 6], 3)[-1]
    kernel = head.numpy()  # exchange the third token's logit with end-of-text's
    kernel[:, [third, tiny_tokenizer.eot_id]] = kernel[:, [tiny_tokenizer.eot_id, third]]
    head.assign(kernel)
    _, runtime = exported("float32", model=model, tokenizer=tiny_tokenizer)
    ids = runtime.generate([5, 6], 20)
    assert ids[-1] == runtime.eot_id == tiny_tokenizer.eot_id
    assert len(ids) <= 5
    assert runtime.finish_reason == "eot"
    assert "endoftext" not in "".join(runtime.stream([5, 6], 20))


# Mistakes


def test_prompts_that_cannot_be_read_are_refused(exported, some_ids):
    _, runtime = exported("float32")
    for prompt, says in [
        (some_ids(33), "33 tokens do not fit: the model's context is 32 tokens"),
        ([], "at least one token id"),
        ([[[1, 2]]], "at least one token id"),
        ([1.5], "at least one token id"),
        ([1, 61], "Token id 61 is outside the vocabulary of 61"),
        ([-1], "Token id -1"),
        ([True], "at least one token id"),
    ]:
        for call in (runtime.generate, runtime.prefill, runtime.logits):
            with pytest.raises(UserError, match=says):
                call(prompt)


def test_decoding_past_the_context_is_refused_and_changes_nothing(exported, some_ids):
    _, runtime = exported("float32")
    ids = some_ids(32)
    runtime.prefill(ids[:31])
    with pytest.raises(UserError, match="of which 31 are used"):
        runtime.prefill([1, 2])
    last = runtime.decode(ids[31])
    with pytest.raises(UserError, match="1 tokens do not fit"):
        runtime.decode(1)
    np.testing.assert_allclose(last, runtime.logits(ids)[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": -1}, "must not be negative"),
        ({"temperature": -0.5}, "above 0"),
        ({"temperature": 0, "top_k": 5}, "have no effect"),
        ({"sampler": "gredy"}, "Did you mean 'greedy'"),
        ({"sampler": "greedy", "top_k": 3}, "not both"),
    ],
)
def test_impossible_numbers_are_refused(exported, options, says):
    _, runtime = exported("float32")
    with pytest.raises(UserError, match=says):
        runtime.generate([1], **options)


def test_threads_must_be_positive(exported):
    _, runtime = exported("float32")
    with pytest.raises(UserError, match="threads must be a positive integer"):
        TFLiteGPT(runtime.path, threads=0)


def test_text_without_a_tokenizer_is_refused(exported):
    _, runtime = exported("float32")
    with pytest.raises(UserError, match=r"no tokenizer\.json beside"):
        runtime.generate("text")
    with pytest.raises(UserError, match=r"no tokenizer\.json beside"):
        runtime.generate([1], stop="x")


def test_another_tokenizer_is_refused(speaking, tmp_path):
    from tf_gptopt.data.tokenizer import train_tokenizer

    other = train_tokenizer(["some other text, and more of it, " * 9], 280)
    with pytest.raises(UserError, match="fingerprint"):
        TFLiteGPT(speaking.path, tokenizer=other)
    other.save(tmp_path)
    # the file carries its own: what lies beside it has no say
    assert TFLiteGPT(speaking.path).generate("text", 3) == speaking.generate("text", 3)
    larger = train_tokenizer([Path(__file__).read_text()], 400)
    speaking.metadata["tokenizer"] = None  # as of a file that was exported without one
    with pytest.raises(UserError, match="only 300"):
        speaking._vocabulary._check(larger)
