"""Tokenizers of every kind in models and files: what is said is what the tokens say together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tf_gptopt._errors import UserError
from tf_gptopt._tokenizer import Tokenizer
from tf_gptopt.models.checkpoints import load_checkpoint, save_checkpoint
from tf_gptopt.models.generation import stream
from tf_gptopt.tflite.bundle import read_files
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT


def scripted(tokens: list[int]) -> Callable[..., np.ndarray]:
    """A sampler that says these."""
    script: Iterator[int] = iter(tokens)
    return lambda logits, rng: np.array([next(script)] * len(logits))


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Tokenizer:
    return Tokenizer.load(llama_folder)


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    words = ["[UNK]", "the", "quick", "##est", "fox", ".", "[SEP]", "##es"]
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return Tokenizer(backend.to_str(), "[SEP]")


@pytest.fixture
def both(exported: Any) -> Callable[[Tokenizer], tuple[Any, TFLiteGPT]]:
    def build(tokenizer: Tokenizer, **shape: Any) -> tuple[Any, TFLiteGPT]:
        size = {"vocab_size": tokenizer.vocab_size, "num_layers": 1, **shape}
        model, file = exported("float32", tokenizer=tokenizer, **size)
        model.tokenizer = tokenizer
        return model, file

    return build


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("llama", "hello you, world\n你! how are you"),  # 你 and the break are bytes
        ("wordpiece", "the quickest foxes."),
    ],
)
def test_completions_hold_every_space_and_character(
    request: pytest.FixtureRequest, both: Any, kind: str, text: str
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids, start = tokenizer.encode_prompt(text).tolist(), len(tokenizer.bos_ids)
    prompts = [tokenizer.decode(ids[start:end]) for end in range(start + 1, len(ids) - 3)]
    prompt = next(p for p in prompts if tokenizer.encode_prompt(p).tolist() == ids[: start + 1])
    completion = text[len(prompt) :]
    before, tokens = ids[: start + 1], ids[start + 1 :]
    model, file = both(tokenizer)
    new = {"max_new_tokens": len(tokens)}
    for gpt in (model, file):
        assert gpt.generate(prompt, **new, sampler=scripted(tokens)) == prompt + completion
        assert gpt.generate(before, **new, sampler=scripted(tokens)) == ids
    for pieces in (
        list(stream(model, prompt, **new, sampler=scripted(tokens))),
        list(file.stream(prompt, **new, sampler=scripted(tokens))),
    ):
        assert "".join(pieces) == completion
        assert len(pieces) > 2
    stop = completion[len(completion) // 3 :][:3]  # reaches over tokens
    for gpt in (model, file):
        said = gpt.generate(prompt, **new, stop=stop, sampler=scripted(tokens))
        assert said == prompt + completion[: completion.find(stop)]
    beam = {"sampler": {"name": "beam", "num_beams": 2}, "max_new_tokens": 4}
    beam["logit_bias"] = dict.fromkeys(tokens, 1e3)
    said = tokenizer.decode(model.generate(before, **beam))[len(tokenizer.decode(before)) :]
    assert model.generate(prompt, **beam) == prompt + said
    assert said[2:4] not in model.generate(prompt, **beam, stop=said[2:4])[len(prompt) :]


def test_a_text_begins_with_what_the_post_processor_says(both: Any, llama: Tokenizer) -> None:
    model, file = both(llama)
    ids = llama.encode_prompt("hello").tolist()
    assert ids[0] == 1
    text = llama.decode(model.generate(ids, max_new_tokens=6)[len(ids) :])
    for gpt in (model, file):
        assert gpt.generate("hello", max_new_tokens=6).endswith(text)
        assert gpt.generate("<s>hello", max_new_tokens=6).endswith(text)  # once is enough


def test_any_of_several_ends_stops_a_text(exported: Any, tiny_tokenizer: Tokenizer) -> None:
    several = Tokenizer(tiny_tokenizer._json, eot_ids=[70, 71])
    model, file = exported("float32", vocab_size=300, num_layers=1, tokenizer=several)
    model.tokenizer = several
    for gpt in (model, file):
        for end in (tiny_tokenizer.eot_id, 70, 71):
            script = scripted([80, end, 81, 82])
            assert gpt.generate([5], max_new_tokens=4, sampler=script) == [5, 80, end]
            said = gpt.generate("a", max_new_tokens=4, sampler=scripted([80, end, 81, 82]))
            assert said == "a" + tiny_tokenizer.decode([80])
    assert file.finish_reason == "eot"
    assert (file.eot_id, file.eot_ids) == (0, (0, 70, 71))
    again = TFLiteGPT(file.path, threads=1, tokenizer=tiny_tokenizer)  # which knows one of them
    assert again.generate([5], 4, sampler=scripted([80, 71, 81])) == [5, 80, 71]


@pytest.mark.parametrize("vocab_size", [304, 320])
def test_rows_without_a_token_are_never_said(exported: Any, vocab_size: int) -> None:
    table = {chr(97 + i): i for i in range(26)} | {"<|endoftext|>": 30}  # no tokens 26 to 29
    tokenizer = Tokenizer(Backend(models.WordLevel(table, "a")).to_str())
    model, file = exported(
        "float32", vocab_size=vocab_size, num_layers=1, embedding_dim=8, num_heads=1
    )
    model.tokenizer = tokenizer
    export_tflite(model, file.path, tokenizer=tokenizer, check=False)
    file = TFLiteGPT(file.path, threads=1)
    options = ({"temperature": 9.0}, {"temperature": 9.0, "min_p": 1e-9}, {"top_k": 300}, {})
    for gpt in (file, model):  # the file's tokenizer is not read yet
        for seed, option in enumerate(options):
            ids = gpt.generate([1, 2], max_new_tokens=30, seed=seed, **option)
            assert not {*range(26, 30), *range(31, vocab_size)} & set(ids)
        assert gpt.generate("a", max_new_tokens=9, temperature=9.0, seed=1)
    beams = model.generate([1], max_new_tokens=9, sampler="beam", repetition_penalty=50.0)
    assert max(beams) <= 30
    assert tokenizer.decode([26, 1, 45, 319]) == "b"  # whoever draws one anyway reads on


# Folders


def test_a_folder_without_tokenizer_json_has_its_tokenizer(
    tiny_model: Any, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model(vocab_size=300, num_layers=1)
    save_checkpoint(model, tmp_path, format="huggingface")
    tiny_tokenizer.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    loaded = load_checkpoint(tmp_path)
    assert loaded.tokenizer.encode("hello").tolist() == tiny_tokenizer.encode("hello").tolist()
    assert loaded.tokenizer.eot_ids == (0, 7, 9)
    save_checkpoint(loaded, tmp_path / "theirs", format="huggingface")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["eos_token_id"] == [0, 7, 9]
    save_checkpoint(loaded, tmp_path / "ours")
    for saved in ("theirs", "ours"):
        assert load_checkpoint(tmp_path / saved).tokenizer.eot_ids == (0, 7, 9)
    (tmp_path / "ours" / "tokenizer.json").unlink()  # vocab.json may cut text otherwise
    with pytest.raises(UserError, match=r"saved with a tokenizer\.json, and it is not there"):
        load_checkpoint(tmp_path / "ours")


def test_a_tokenizer_of_transformers_is_taken_everywhere(
    tiny_model: Any, llama_folder: Path, llama: Tokenizer, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "llama"
    shutil.copytree(llama_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = tiny_model(vocab_size=llama.vocab_size, num_layers=1)
    model.tokenizer = theirs
    said = model.generate("hello", max_new_tokens=5)
    assert model.tokenizer.eot_token == "</s>"

    path = tmp_path / "out" / "model.tflite"
    model.tokenizer = None
    export_tflite(model, path, tokenizer=theirs, check=False)
    assert read_files(path)["chat_template.jinja"] == b"{{ messages }}"
    assert (path.parent / "chat_template.jinja").is_file()
    given = TFLiteGPT(path, threads=1, tokenizer=theirs)
    for gpt in (TFLiteGPT(path, threads=1), given):
        assert gpt.generate("hello", 5)[:8] == said[:8]
        assert (gpt.eot_id, gpt.tokenizer.chat_template) == (2, "{{ messages }}")
        assert gpt.generate([5], 4, sampler=scripted([80, 2, 81])) == [5, 80, 2]
    export_tflite(model, path, tokenizer=llama, check=False)  # the same, as its files have it
    assert TFLiteGPT(path, threads=1, tokenizer=theirs).eot_id == 2
    fewer = Backend.from_str(llama._json)
    fewer.add_tokens(["<extra>"])
    with pytest.raises(UserError, match="belongs to another model"):
        TFLiteGPT(path, threads=1, tokenizer=fewer)
    with pytest.raises(UserError, match="is not the one that"):
        TFLiteGPT(path, threads=1, tokenizer=Backend.from_str(tiny_tokenizer._json))


def test_the_end_of_text_that_a_file_knows_ends_it_whoever_encodes(speaking: Any) -> None:
    class Plain:
        """What has no more than is asked for."""

        def encode(self, text: str) -> list[int]:
            return [5, 6]

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(97 + i % 26) for i in ids)

    gpt = TFLiteGPT(speaking.path, threads=1, tokenizer=Plain())
    assert gpt.eot_id == 0
    assert gpt.generate("x", 5, sampler=scripted([3, 0, 4])) == "xd"
