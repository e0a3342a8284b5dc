"""Several conversations over one file: what they remember, fork, do at once, and never mix up."""

from __future__ import annotations

import contextlib
import itertools
import linecache
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT

CONTEXT = 96


def some_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 300, count).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture
def gpt(folder, tiny_model, tiny_tokenizer):
    """A fresh runtime over one float32 file of a GPT with the tiny tokenizer's 300 tokens."""
    path = folder / "float.tflite"
    if not path.is_file():
        model = tiny_model(vocab_size=300, max_sequence_length=CONTEXT)
        export_tflite(model, path, QuantConfig("float32"), tiny_tokenizer)
    return TFLiteGPT(path, threads=1)


@pytest.fixture
def small_cache(folder, tiny_model):
    """The same of integers, with an int8 cache."""
    path = folder / "int8.tflite"
    if not path.is_file():
        model = tiny_model(vocab_size=300, max_sequence_length=CONTEXT)
        # activations that are not rounded: nothing hides a mistake
        export_tflite(model, path, QuantConfig(activations="float", kv_cache="int8"))
    return TFLiteGPT(path, threads=1)


def alone(conversation, prompt, count, **options):
    """What a conversation without a memory says."""
    return conversation.new_conversation().generate(prompt, count, **options)


# Prefix reuse


def test_a_chat_reads_each_turn_once(gpt, monkeypatch):
    """What a turn reads is what is new in it, and it says what it would say without a memory."""
    read = []
    whole = type(gpt._program).read

    def counting(program, cache, ids):
        read.append(len(ids))
        return whole(program, cache, ids)

    chat = some_ids(20)
    for turn in range(4):
        expected = alone(gpt, chat, 6)
        with monkeypatch.context() as patch:
            patch.setattr(type(gpt._program), "read", counting)
            said = gpt.generate(chat, 6)
        assert said == expected
        # before this turn: all but the last token said, and that one is read now
        assert gpt.reused == (len(chat) - 7 - 1 if turn else 0)
        assert read == [8 if turn else 20, *[1] * 5]
        assert gpt._cache.tokens[: gpt.length].tolist() == said[:-1]
        read.clear()
        chat = said + some_ids(7, seed=turn)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_what_was_there_never_changes_what_comes(gpt, data):
    """Any prompts after one another, with beginnings in common or none, and any calls between."""
    one = gpt.new_conversation()
    texts = [some_ids(CONTEXT, seed) for seed in (1, 2)]
    for _ in range(data.draw(st.integers(2, 4))):
        first, second = texts if data.draw(st.booleans()) else texts[::-1]
        cut, end = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 90))
        prompt = (first[:cut] + second)[:end]
        kind = data.draw(st.sampled_from(["generate", "prefill", "score", "logits", "sample"]))
        expected = gpt.new_conversation()
        if kind == "generate":
            assert one.generate(prompt, 3) == expected.generate(prompt, 3)
        elif kind == "sample":
            options = {"temperature": 1.0, "top_k": 9, "repetition_penalty": 1.3, "seed": cut}
            assert one.generate(prompt, 3, **options) == expected.generate(prompt, 3, **options)
        elif kind == "score":
            ours, theirs = one.score(second[:5], prompt), expected.score(second[:5], prompt)
            np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-3)
        elif kind == "logits":
            np.testing.assert_allclose(one.logits(prompt), expected.logits(prompt), atol=1e-3)
        elif one.length + len(prompt) <= CONTEXT:
            expected.prefill(one._cache.tokens[: one.length].tolist() + prompt)
            one.prefill(prompt)
        check_memory(one)


def check_memory(one):
    """The cache holds what its tokens say: reading on gives what a fresh cache gives."""
    if 0 < one.length < CONTEXT:
        fresh = one.new_conversation()
        fresh.prefill(one._cache.tokens[: one.length])
        np.testing.assert_allclose(one.fork().decode(5), fresh.decode(5), atol=1e-3)


def test_greedy_text_is_the_same_with_and_without_a_memory(gpt, small_cache):
    for runtime in (gpt, small_cache):
        shared = some_ids(30)
        for seed in range(12):
            prompt = shared + some_ids(1 + seed, seed)
            assert runtime.generate(prompt, 10) == alone(runtime, prompt, 10)
            assert runtime.reused == (30 if seed else 0)


def test_scores_after_one_prompt_read_it_once(gpt):
    prompt = some_ids(40)
    for seed in range(3):
        text = some_ids(5, seed)
        score = gpt.score(text, prompt)
        assert gpt.reused == (39 if seed else 0)  # its last token's logits are needed again
        expected = gpt.new_conversation().score(text, prompt).log_probs
        np.testing.assert_allclose(score.log_probs, expected, atol=1e-4)
    assert gpt.length == 44


# Forks


def test_forks_go_their_own_ways(gpt, small_cache):
    for runtime in (gpt, small_cache):
        prompt = some_ids(50)
        runtime.prefill(prompt)
        forks = [runtime.fork() for _ in range(3)]
        for i, fork in enumerate(forks):
            says = prompt + some_ids(3, seed=i)
            assert fork.generate(says, 8) == alone(runtime, says, 8)
            assert (fork.reused, fork.length) == (50, 60)
        assert runtime.length == 50
        runtime.reset()
        for i, fork in enumerate(forks):
            assert fork._cache.tokens[50:53].tolist() == some_ids(3, seed=i)
            check_memory(fork)
    assert gpt.new_conversation().fork().generate([1, 2], 2) == alone(gpt, [1, 2], 2)  # of nothing


# Interruptions


class Interrupted(BaseException):
    pass


def strike(line, call):
    """Run `call`, and interrupt it before that line of the runtime's code, as Ctrl-C may; returns
    whether it came so far."""
    left = line

    def trace(frame, event, _):
        nonlocal left
        code = frame.f_code
        if "/tf_gptopt/tflite/" not in code.co_filename or code.co_name == "__del__":
            return None
        left -= event == "line"
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if left < 0 and not source.startswith("with "):  # no signal comes between `with` and exit
            sys.settrace(None)
            raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def test_after_an_interruption_anywhere_the_memory_is_right(gpt, small_cache):
    """Before any line: while it grows, shrinks, reads a long text in pieces, generates."""
    long, short = some_ids(80), some_ids(40, seed=1)

    def generate():  # from 14 tokens to 65, beyond the first capacity
        one.generate(long[:63], 3)

    def shrink():  # back below it
        one.generate([*long[:20], *short[:9]], 2)

    def read():
        one.prefill(short)

    for runtime in (gpt, small_cache):
        for call in (generate, shrink, read):
            for line in itertools.count(0, 5):
                one = runtime.new_conversation()
                one.prefill(long[:70] if call is shrink else long[:14])
                before = one.length
                if not strike(line, call):
                    break
                assert call is not read or one.length in (0, before, before + 40)
                check_memory(one)
            assert line > 20
        assert one.generate(long, 9) == alone(runtime, long, 9)


def test_an_error_in_the_middle_leaves_the_memory_right(gpt):
    calls = []

    def sampler(logits, rng):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("mine")
        return logits.argmax(-1)

    with pytest.raises(RuntimeError, match="mine"):
        gpt.generate(some_ids(20), 9, sampler=sampler)
    assert gpt.length == 23
    check_memory(gpt)
    assert gpt.generate(some_ids(20), 9) == alone(gpt, some_ids(20), 9)


# Several at once


def test_threads_with_conversations_of_their_own_do_not_mix(gpt):
    """Eight threads generate, score and decode in turn over one file: all as if alone."""
    jobs = {seed: some_ids(5 + 9 * seed, seed) for seed in range(8)}
    conversations = {seed: gpt.new_conversation() for seed in jobs}

    def work(conversation, seed):
        options = {"temperature": 1.0, "seed": seed} if seed % 2 else {}
        ids = conversation.generate(jobs[seed], 15, **options)
        text = "".join(conversation.stream(jobs[seed][:9], 9))
        score = conversation.score(jobs[seed]).total
        return ids, text, score, conversation.decode(7)

    expected = {seed: work(gpt.new_conversation(), seed) for seed in jobs}
    start, results = threading.Barrier(len(jobs)), {}

    def run(seed):
        start.wait()
        results[seed] = [work(conversations[seed], seed) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, (ids, text, score, logits) in expected.items():
        for result in results[seed]:
            assert result[:2] == (ids, text)
            assert result[2] == pytest.approx(score, abs=1e-3)
            np.testing.assert_allclose(result[3], logits, atol=1e-3)


def test_one_conversation_in_two_threads_says_so(gpt):
    errors, inside, go_on = [], threading.Event(), threading.Event()

    def slow(logits, rng):  # a thread is in the middle of a step
        inside.set()
        go_on.wait(10)
        return logits.argmax(-1)

    def other():
        inside.wait(10)
        for call in (
            lambda: gpt.generate([1], 2),
            lambda: next(gpt.stream([1], 2)),
            lambda: gpt.prefill([1]),
            lambda: gpt.decode(1),
            lambda: gpt.logits([1]),
            lambda: gpt.score([1, 2]),
            gpt.reset,
            gpt.fork,
        ):
            with pytest.raises(UserError, match=r"in use: another thread.*new_conversation\(\)"):
                call()
            errors.append(1)
        go_on.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert gpt.generate([1, 2, 3], 4, sampler=slow) == alone(gpt, [1, 2, 3], 4)
    thread.join()
    assert len(errors) == 8


def test_a_stream_whose_conversation_was_used_cannot_go_on(gpt):
    whole = "".join(gpt.new_conversation().stream("import os", 12))
    for use in (
        lambda: gpt.decode(3),
        lambda: gpt.generate([1, 2], 3),
        lambda: gpt.score([1, 2, 3]),
        lambda: next(gpt.stream([1, 2], 3)),
        gpt.reset,
    ):
        stream = gpt.stream("import os", 12)
        first = next(stream)
        use()
        with pytest.raises(UserError, match=r"the stream cannot go on.*new_conversation\(\)"):
            list(stream)
    stream = gpt.stream("import os", 12)
    first = next(stream)
    fork = gpt.fork()  # looks, and changes nothing
    fork.decode(3)
    assert gpt.length > 0
    assert first + "".join(stream) == whole


def test_a_stream_that_is_left_blocks_nothing(gpt):
    expected = gpt.generate("import os", 12)
    left = gpt.stream("import os", 12)
    next(left)
    assert gpt.generate("import os", 12) == expected
    with contextlib.closing(gpt.stream("import os", 12)) as closed:
        next(closed)
    check_memory(gpt)
    assert gpt.generate("import os", 12) == expected


def test_the_turns_cost_microseconds(gpt):
    turns = gpt._turns
    start = time.perf_counter()
    for _ in range(2000):
        with turns.take():
            pass
    assert (time.perf_counter() - start) / 2000 < 50e-6


# Batches


def test_a_batch_is_each_prompt_by_itself(gpt):
    shared = some_ids(30)
    prompts = [shared + some_ids(4, seed) for seed in range(3)]
    assert gpt.generate(prompts, 5) == [alone(gpt, prompt, 5) for prompt in prompts]
    assert gpt.finish_reason == ["length"] * 3
    assert gpt.reused == 30
    texts = ["import os", "import sys", "def "]
    assert gpt.generate(texts, 5) == [alone(gpt, text, 5) for text in texts]
    assert gpt.generate(["import os"], 5) == [alone(gpt, "import os", 5)]
    assert gpt.generate(np.array(prompts), 5) == gpt.generate(prompts, 5)
    mixed = gpt.generate((texts[0], [1, 2]), 3)
    assert mixed == [alone(gpt, texts[0], 3), alone(gpt, [1, 2], 3)]
    ends = gpt.generate([some_ids(CONTEXT - 2), [1]], 5)
    assert [len(ids) for ids in ends] == [CONTEXT, 6]
    assert gpt.finish_reason == ["context", "length"]


def test_a_batch_draws_as_that_of_keras(folder, gpt, tiny_model):
    model = tiny_model(vocab_size=300, max_sequence_length=CONTEXT)
    prompts = [[1, 2, 3], [4, 5], [1, 2, 3]]
    options = {"temperature": 1.2, "top_k": 30, "seed": 11}
    ours = gpt.generate(prompts, 9, **options)
    gpt.reset()
    assert ours == model.generate(prompts, max_new_tokens=9, stop_at_eot=False, **options)
    assert ours[0] != ours[2]  # numbers of their own
    assert gpt.generate(prompts[:2], 9, **options) == ours[:2]
    assert gpt.generate(prompts[0], 9, **options) == ours[0]


def test_a_prompt_that_is_wrong_is_named_before_any_work(gpt):
    for prompts, says in [
        ([[1, 2], [1, 300]], "Prompt 1: Token id 300"),
        ([[1, 2], []], "Prompt 1: A prompt is text or"),
        ([[1], 2], "Prompt 1: A prompt is text or"),
        (["import", some_ids(97)], "Prompt 1: 97 tokens do not fit"),
        ([[[1]]], "Prompt 0: A prompt is text or"),
        ([None, [1]], "Prompt 0: A prompt is text or"),
    ]:
        with pytest.raises(UserError, match=says):
            gpt.generate(prompts, 3)
        assert gpt.length == 0
    with pytest.raises(UserError, match="text or a list"):
        gpt.generate([], 3)


def test_the_last_piece_is_given_once(gpt, tiny_tokenizer):
    """The token that ends a text is no text: what came before it is not said again."""
    (letter,) = tiny_tokenizer.encode("a")
    tokens = iter([letter, letter, tiny_tokenizer.eot_id])
    pieces = list(gpt.stream("import os", 12, sampler=lambda logits, rng: [next(tokens)]))
    assert pieces == ["a", "a"]
    assert gpt.finish_reason == "eot"
    at_once = {tiny_tokenizer.eot_id: 1e4}
    assert gpt.generate("import os", 12, logit_bias=at_once) == "import os"
