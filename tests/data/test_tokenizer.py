# ruff: noqa: RUF001 - Chinese has its own commas
"""Byte-level BPE: nothing is lost, the files are everybody's, and all readers agree on the ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.data.corpus import load_corpus, split_text
from tf_gptopt.data.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer

CHINESE = "关关雎鸠，在河之洲。窈窕淑女，君子好逑。\n参差荇菜，左右流之。\n\n求之不得，寤寐思服。"
ENGLISH = (
    "Well, Prince, so Genoa and Lucca are now just family estates; I warn you, don't—you'll see!"
)
CODE = """
class Buffer:
    def __init__(self, size=4096):\n\t\tself.size = size  # bytes

    def read(self, n):
        if n < 0 or not self.data:
            raise ValueError(f"bad n: {n!r}")
        return self.data[:n]\n\n\n
"""
ODD = [
    "",
    " ",
    "\n",
    "  x\t\t y  \n\n   z\r\n\r\n  ",
    "a\u00a0b\u3000c\u2009d\u202fe\u2003f\x0bg\x0ch\x1ci\u0085j\u2028k",
    "            12345 0x7f ½ ४५ ١٢ ４五",
    "'start' don't I'LL we've 's 't",
    "👩‍👩‍👧‍👦 🇩🇪👍🏽 ❤️ ☃ 🙂🙂",
    "é e\u0301 हिन्दी ไทย 한국어 العربية Привет",
    "\x00\x01\x7f\ufeff\ufffd\U0010ffff",
    "Ġ Ċ ĠĊ ६ Ĵ <| |endoftext|>",
    f"{END_OF_TEXT}one{END_OF_TEXT}{END_OF_TEXT}\ntwo {END_OF_TEXT} ",
    ")" * 300 + "=" * 100 + " " * 300,
]
TEXTS = [CODE, ENGLISH, CHINESE, *ODD]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Code, English and Chinese in parts that all earn tokens, and frequent emoji."""
    code = [document.text for document in load_corpus() if document.name.startswith("json/")]
    return [
        *code,
        *[ENGLISH * 40, CHINESE * 100, CODE * 100, "🙂 👍🏽\n" * 300, "Привет, мир! " * 99],
    ]


@pytest.fixture(scope="module")
def tokenizer(corpus: list[str]) -> Tokenizer:
    return train_tokenizer(corpus, 1500)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text.encode())


@settings(max_examples=200)
@given(text=st.text(alphabet=st.characters(codec="utf-8")) | st.sampled_from(TEXTS))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_do_not_depend_on_where_the_text_is_cut(
    tokenizer: Tokenizer, corpus: list[str]
) -> None:
    """Uncut, as keras-nlp merges it; at each space, as tokenizer.json says; finer, as trained."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(json.loads(tokenizer._json)))
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = level
    run = r"[\p{L}\p{M}]+|\p{N}|[^\s\p{L}\p{M}\p{N}]+"
    finer = tokenizers.Regex(rf"\s+(?:{run})?|{run}")
    uncut = [backend.encode(text).ids for text in [*corpus, *TEXTS]]
    split = tokenizers.pre_tokenizers.Split(finer, "isolated")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    assert uncut == [backend.encode(text).ids for text in [*corpus, *TEXTS]]
    assert uncut == [ids.tolist() for ids in tokenizer.encode_batch([*corpus, *TEXTS])]


def test_tokens_hold_whole_characters_or_a_part_of_one(tokenizer: Tokenizer) -> None:
    for i in range(1, tokenizer.vocab_size):
        token = tokenizer.decode([i])
        assert "\ufffd" not in token or len(token) == 1, (i, token)


def test_prompt_may_end_where_people_end_it(tokenizer: Tokenizer) -> None:
    """The ids of a prompt are the first ids of the text that goes on from there."""
    whole = "    def read(self, n):\n        return self.data[:n]\n"
    ids = tokenizer.encode(whole).tolist()
    for prompt in (
        "    def read(",
        "    def read(self, n):",
        "    def read(self, n):\n        ",
        "    def read(self, n):\n        return self.",
    ):
        prefix = tokenizer.encode(prompt).tolist()
        assert prefix == ids[: len(prefix)], prompt


def test_huggingface_agrees(tokenizer: Tokenizer, folder: Path, corpus: list[str]) -> None:
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*TEXTS, *corpus]:
        assert other.encode(text).ids == tokenizer.encode(text).tolist()
        assert other.decode(other.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_agrees(tokenizer: Tokenizer, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(folder)
    assert other.eos_token_id == tokenizer.eot_id
    assert len(other) == tokenizer.vocab_size
    for text in TEXTS:
        assert other(text).input_ids == tokenizer.encode(text).tolist()
        assert other.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def keras_tokenizer(folder: Path):
    keras_nlp = pytest.importorskip("keras_nlp")
    return keras_nlp.tokenizers.BytePairTokenizer(
        vocabulary=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unsplittable_tokens=[END_OF_TEXT],  # without it keras-nlp spells the token out
    )


def test_keras_nlp_agrees(tokenizer: Tokenizer, corpus: list[str], keras_tokenizer) -> None:
    assert keras_tokenizer.vocabulary_size() == tokenizer.vocab_size
    texts = [*TEXTS, *corpus]
    for text, ids in zip(texts, keras_tokenizer(texts), strict=True):
        assert list(ids) == tokenizer.encode(text).tolist()
    for text in filter(None, TEXTS):
        assert keras_tokenizer.detokenize(tokenizer.encode(text).tolist()) == text


def test_keras_nlp_in_a_graph_cuts_by_its_own_rule(
    tokenizer: Tokenizer, corpus: list[str], keras_tokenizer
) -> None:
    """Inside tf.data keras-nlp splits the last space of a row from the rest, so indented code gets
    other ids there (of the same text). Chinese and prose agree."""
    import tensorflow as tf

    texts = [CHINESE, ENGLISH, CODE]
    rows = tf.data.Dataset.from_tensor_slices(texts).map(keras_tokenizer)
    chinese, english, code = (row.tolist() for row in rows.as_numpy_iterator())
    assert chinese == tokenizer.encode(CHINESE).tolist()
    assert english == tokenizer.encode(ENGLISH).tolist()
    assert code != tokenizer.encode(CODE).tolist()
    assert tokenizer.decode(code) == CODE


def test_real_texts_agree(shared_data: Path, tmp_path: Path) -> None:
    keras_nlp = pytest.importorskip("keras_nlp")
    texts = []
    for name in ("chinese/zh_classics_simplified.txt", "gutenberg/gutenberg_novels.txt"):
        text = (shared_data / name).read_text("utf-8")[:400_000]
        texts.extend(split_text(text, 20_000))
    ours = train_tokenizer(texts, 4096)
    assert ours.vocab_size == 4096
    ours.save(tmp_path)
    theirs = keras_nlp.tokenizers.BytePairTokenizer(
        vocabulary=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt")
    )
    for text, a, b in zip(texts, ours.encode_batch(texts), theirs(texts), strict=True):
        assert a.tolist() == list(b)
        assert ours.decode(a) == text
    tokens = sum(map(len, ours.encode_batch(texts)))
    assert sum(len(text.encode()) for text in texts) / tokens > 2.7


def test_batches_are_the_same_as_single_texts(tokenizer: Tokenizer) -> None:
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_training_is_deterministic(
    corpus: list[str], tokenizer: Tokenizer, tmp_path: Path, run_child: Callable[..., str]
) -> None:
    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    code = f"""
        import json
        from tf_gptopt.data.tokenizer import train_tokenizer
        trained = train_tokenizer(json.load(open({str(tmp_path / "corpus.json")!r})), 1500)
        trained.save({str(tmp_path / "again")!r})
    """
    run_child(code, devices=0, PYTHONHASHSEED="77", RAYON_NUM_THREADS="1")
    tokenizer.save(tmp_path / "first")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        first, again = (tmp_path / run / name for run in ("first", "again"))
        assert first.read_bytes() == again.read_bytes(), name


def test_fingerprint_is_of_the_content(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    loaded = Tokenizer.load(folder)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.eot_id, loaded.vocab_size) == (tokenizer.eot_id, 1500) == (0, 1500)
    content = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))  # no white space, escapes
    reformatted = Tokenizer.load(tmp_path)
    assert reformatted.fingerprint == tokenizer.fingerprint
    reformatted.save(tmp_path / "copy")  # kept as it was read
    saved = (tmp_path / "copy" / "tokenizer.json").read_bytes()
    assert saved == (tmp_path / "tokenizer.json").read_bytes()
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).fingerprint != tokenizer.fingerprint


def test_a_small_corpus_gives_an_honest_smaller_vocabulary() -> None:
    tokenizer = train_tokenizer(["ab ab ab cd"], 5000)
    assert tokenizer.vocab_size == 257 + 2  # "ab" and " ab"; what occurs once is not merged
    assert train_tokenizer(["x"], 257).vocab_size == 257
    assert (
        train_tokenizer(["字" * 9], 258).decode(train_tokenizer(["字" * 9], 258).encode("字"))
        == "字"
    )


@given(st.lists(st.text(alphabet="ab 字é🙂\n0.", max_size=40)), st.integers(257, 330))
@settings(max_examples=60, deadline=None)
def test_any_corpus_trains(texts: list[str], vocab_size: int) -> None:
    if not any(texts):
        with pytest.raises(UserError, match="no text"):
            train_tokenizer(texts, vocab_size)
        return
    tokenizer = train_tokenizer(texts, vocab_size)
    assert 257 <= tokenizer.vocab_size <= vocab_size
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text


def test_separators_in_the_corpus_are_not_learned() -> None:
    tokenizer = train_tokenizer([f"one{END_OF_TEXT}two" * 20], 400)
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    assert pieces[0] == END_OF_TEXT
    assert not any("endo" in piece or "<|" in piece for piece in pieces[1:])
    assert tokenizer.encode(f"one{END_OF_TEXT}two").tolist()[1] == tokenizer.eot_id == 0


def test_bad_training_input() -> None:
    with pytest.raises(UserError, match=r"at least 257.*vocab_size=256"):
        train_tokenizer(["text"], 256)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 300)
    with pytest.raises(UserError, match="surrogate"):
        train_tokenizer(["fine", "a\ud800b"], 300)


def test_bad_ids_and_texts(tokenizer: Tokenizer) -> None:
    for bad in (-1, 1.5, True, "5", np.float32(5), None):
        with pytest.raises(UserError, match="a list of integers of 0 or more"):
            tokenizer.decode([5, bad])
    with pytest.raises(UserError, match="a list of integers of 0 or more"):
        tokenizer.decode(np.array([5.0]))
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800b")
    assert tokenizer.decode(np.array([], np.int32)) == ""


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no tokenizer in"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="There is no tokenizer in"):
        Tokenizer.load(tmp_path / "absent")
    file = tmp_path / "tokenizer.json"
    file.write_text('{"version": "1.0", "model"')
    with pytest.raises(UserError, match=r"tokenizer.json is not valid JSON"):
        Tokenizer.load(tmp_path)
    file.write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=r"tokenizer.json: This is not a tokenizer.json"):
        Tokenizer.load(file)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    with pytest.raises(UserError, match=r"merges.txt, line 2: two tokens"):
        Tokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(UserError, match="do not belong together"):
        Tokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text('["a", "b", "ab"]')
    with pytest.raises(UserError, match="must map tokens to ids"):
        Tokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "absent.txt")


def test_gpt2_files(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "gpt2_bpe"
    gpt2 = Tokenizer.from_gpt2_files(source / "encoder.json", source / "vocab.bpe")
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    # As OpenAI's encoder.py has it
    assert gpt2.encode("Hello world, it's 12345").tolist() == [
        15496,
        995,
        11,
        340,
        338,
        17031,
        2231,
    ]
    reference = tokenizers.ByteLevelBPETokenizer(
        str(source / "encoder.json"), str(source / "vocab.bpe")
    )
    for text in TEXTS:
        assert gpt2.decode(gpt2.encode(text)) == text
        if END_OF_TEXT not in text:
            assert gpt2.encode(text).tolist() == reference.encode(text).ids
    assert Tokenizer.load(source).fingerprint == gpt2.fingerprint
    gpt2.save(tmp_path)
    again = Tokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert again.fingerprint == Tokenizer.load(tmp_path).fingerprint == gpt2.fingerprint


def test_a_foreign_tokenizer_json(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "gpt" / "chemts_gpt2_0.5m"
    smiles = Tokenizer.load(source)
    assert (smiles.vocab_size, smiles.eot_id, smiles.eot_token) == (66, 14, "<EOS>")
    ids = smiles.encode("C")
    assert ids.tolist() == [17]  # no BOS, no EOS: nothing is added
    assert smiles.decode(ids) == "C"
    with pytest.raises(UserError, match="may lack characters"):
        smiles.encode("漢")
    smiles.save(tmp_path)
    assert not (tmp_path / "vocab.json").exists()  # not a byte-level BPE
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.eot_id) == (smiles.fingerprint, 14)


def test_where_the_end_of_text_token_is_named(folder: Path, tmp_path: Path) -> None:
    content = (folder / "tokenizer.json").read_text().replace(END_OF_TEXT, "</s>")
    (tmp_path / "tokenizer.json").write_text(content)
    assert Tokenizer.load(tmp_path).eot_id is None
    settings = tmp_path / "special_tokens_map.json"
    settings.write_text('{"eos_token": {"content": "</s>"}}')
    assert Tokenizer.load(tmp_path).eot_id == 0
    settings.rename(tmp_path / "tokenizer_config.json")
    assert Tokenizer.load(tmp_path).eot_token == "</s>"


def test_truncation_and_padding_of_a_file_are_ignored(folder: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode(CODE)) == CODE


@pytest.mark.parametrize("text", ["one text, whose characters are no texts", b"bytes"])
def test_one_text_is_not_several(text: str | bytes) -> None:
    with pytest.raises(UserError, match=r"train_tokenizer\(\[text\], vocab_size\)"):
        train_tokenizer(text, 300)
