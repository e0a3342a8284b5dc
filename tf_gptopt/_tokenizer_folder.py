"""A tokenizer's folder as Hugging Face's libraries write it, old layouts and new. No TensorFlow.

```
tokenizer.json                              all of it
vocab.json, merges.txt                      or a byte-level BPE (encoder.json, vocab.bpe: OpenAI's)
vocab.txt                                   or a WordPiece, as Chinese GPT-2s have it
added_tokens.json, special_tokens_map.json  what the last two do not hold
tokenizer_config.json                       settings, names of special tokens, a chat template
chat_template.jinja                         or the template here
generation_config.json, config.json         the ids that end a text
```
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tf_gptopt._errors import UserError
from tf_gptopt._files import read_json
from tf_gptopt._folder import settled

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
END_OF_TEXT = "<|endoftext|>"

_BPE_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_WORDPIECE_FILE = "vocab.txt"
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# the classes whose rules for cutting text are those that their files leave out
_BPE_CLASSES = ("GPT2Tokenizer", "CodeGenTokenizer", "RobertaTokenizer", "BartTokenizer")
_WORDPIECE_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_NAMED += ("mask_token", "additional_special_tokens", "extra_special_tokens")
_BERT = ("unk", "cls", "sep", "pad", "mask")
_SAVE = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Args:
        content: the text of a tokenizer.json, made from the other files where there is none.
        settings: tokenizer_config.json, and what special_tokens_map.json adds to it.
        template: chat_template.jinja.
        eot_ids: the ids that end a text, as the model's files say.
    """

    content: str
    settings: dict[str, Any]
    template: str | None
    eot_ids: tuple[int, ...]

    @property
    def eot_token(self) -> str | None:
        """The token that the settings name as the end of a text."""
        return _content(self.settings.get("eos_token"))


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether there are files of a tokenizer, of a kind that can be read or not."""
    folder = Path(folder)
    alone = (TOKENIZER_FILE, _WORDPIECE_FILE, *_SENTENCEPIECE_FILES)
    return any((folder / name).is_file() for name in alone) or _bpe_files(folder) is not None


def read_tokenizer(path: str | os.PathLike) -> TokenizerFiles:
    """Read a folder, or a tokenizer.json with what lies beside it.

    Raises:
        UserError: when no tokenizer is there, or one of a kind that cannot be read.
    """
    path = Path(path)
    folder, file = (path, path / TOKENIZER_FILE) if path.is_dir() else (path.parent, path)
    settled(folder)
    config, named = (
        _read_object(folder / name) for name in (CONFIG_FILE, "special_tokens_map.json")
    )
    settings = named | config
    added = _added_tokens(folder, settings)
    if file.is_file():
        read_json(file)  # its errors name the file
        content = _with_tokens(file.read_text("utf-8"), added, file)
    else:
        content = _without_json(path, settings, added)
    template = folder / TEMPLATE_FILE
    text = template.read_text("utf-8") if template.is_file() else None
    # tokenizer_config.json describes a token in another way; the tokenizer.json knows how it is cut
    plain = {
        name: [_content(token) for token in value] if isinstance(value, list) else _content(value)
        for name, value in named.items()
    }
    return TokenizerFiles(content, plain | config, text, _eot_ids(folder))


def byte_level_bpe(
    vocab: str | os.PathLike,
    merges: str | os.PathLike,
    added: dict[int, AddedToken] | None = None,
    add_prefix_space: bool = False,
) -> Backend:
    """GPT-2's own BPE, from vocab.json (encoder.json) and merges.txt (vocab.bpe)."""
    table = read_json(vocab)
    pairs = []
    try:
        lines = Path(merges).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{merges} cannot be read ({error}). Restore it.") from None
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise UserError(f"{merges}, line {number}: two tokens were expected: {line!r}.")
        pairs.append(pair)
    strangers = {part for a, b in pairs for part in (a, b, a + b)}.difference(table)
    if strangers:
        raise UserError(
            f"{vocab} and {merges} do not belong together or are damaged: token "
            f"{min(strangers)!r} of the merges is not in the vocabulary. Take both from one "
            "tokenizer."
        )
    added = added or {}
    try:
        backend = Backend(models.BPE(vocab=_joined(table, added, vocab), merges=pairs))
    except (TypeError, OverflowError) as error:
        raise UserError(f"{vocab} must map tokens to ids ({error}). Restore it.") from None
    backend.add_tokens([added[i] for i in sorted(added)])
    if END_OF_TEXT in table:
        backend.add_special_tokens([END_OF_TEXT])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _without_json(path: Path, settings: dict[str, Any], added: dict[int, AddedToken]) -> str:
    """The tokenizer of a folder that has no tokenizer.json."""
    if _read_object(path / "config.json").get("tokenizer_sha256"):
        raise UserError(
            f"{path} was saved with a {TOKENIZER_FILE}, and it is not there. Restore it: other "
            "files beside it may cut text in another way."
        )
    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if path.is_dir() and (files := _bpe_files(path)):
        _check_kind(path, kind, _BPE_CLASSES, " and ".join(file.name for file in files))
        space = bool(settings.get("add_prefix_space"))
        backend = byte_level_bpe(
            *files, _named_tokens(settings, _read_object(files[0])) | added, space
        )
        bos = _content(settings.get("bos_token")) or END_OF_TEXT
        if settings.get("add_bos_token") and (bos_id := backend.token_to_id(bos)) is not None:
            template = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, bos_id)])
            backend.post_processor = template
        return backend.to_str()
    if path.is_dir() and (path / _WORDPIECE_FILE).is_file():
        _check_kind(path, kind, _WORDPIECE_CLASSES, _WORDPIECE_FILE)
        return _wordpiece(path / _WORDPIECE_FILE, settings, added).to_str()
    for name in _SENTENCEPIECE_FILES:
        if (path / name).is_file():
            raise UserError(
                f"{path} has its tokenizer in {name}, a SentencePiece model, and a "
                f"{TOKENIZER_FILE} is needed. Let transformers write it: {_SAVE}."
            )
    raise UserError(
        f"There is no tokenizer in {path}: {TOKENIZER_FILE}, vocab.json with merges.txt, or "
        f"{_WORDPIECE_FILE} was expected."
    )


def _check_kind(path: Path, kind: str, known: tuple[str, ...], files: str) -> None:
    if kind and kind not in known:
        raise UserError(
            f"{path} holds a {kind}, and how that cuts text is not in {files}. Its "
            f"{TOKENIZER_FILE} is needed; transformers writes one: {_SAVE}."
        )


def _wordpiece(file: Path, settings: dict[str, Any], added: dict[int, AddedToken]) -> Backend:
    """BERT's tokenizer, with the settings that its class has where the files say nothing."""
    try:
        lines = file.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}). Restore it.") from None
    if lines[-1] == "":
        lines.pop()
    table = {line: number for number, line in enumerate(lines)}
    named = [_content(settings.get(f"{name}_token")) or f"[{name.upper()}]" for name in _BERT]
    unknown, cls, sep = named[:3]
    special = {table[name]: AddedToken(name, special=True) for name in named if name in table}
    added = special | _named_tokens(settings, table) | added
    if unknown not in table:
        raise UserError(f"{file} has no token {unknown!r}, which stands for unknown words.")
    model = models.WordPiece(_joined(table, added, file), unk_token=unknown)
    backend = Backend(model)
    backend.add_tokens([added[i] for i in sorted(added)])
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    if cls in table and sep in table:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, table[cls]), (sep, table[sep])],
        )
    return backend


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens beside the vocabulary, by id, as tokenizer_config.json or added_tokens.json has it."""
    special = {token.content for token in _named(settings)}
    try:
        described = settings.get("added_tokens_decoder")
        if described is not None:
            return {
                int(i): _as_added(
                    token | ({"special": True} if token["content"] in special else {})
                )
                for i, token in described.items()
            }
        return {
            int(i): AddedToken(token, normalized=token not in special, special=token in special)
            for token, i in _read_object(folder / "added_tokens.json").items()
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"The added tokens in {folder} (added_tokens.json, or added_tokens_decoder in "
            f"{CONFIG_FILE}) must be tokens and ids ({error}). Restore the file."
        ) from None


def _named_tokens(settings: dict[str, Any], table: dict[str, int]) -> dict[int, AddedToken]:
    """The special tokens that the settings name, where the vocabulary has them."""
    return {table[token.content]: token for token in _named(settings) if token.content in table}


def _named(settings: dict[str, Any]) -> list[AddedToken]:
    tokens = []
    for name in _NAMED:
        value = settings.get(name)
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, dict) and "content" in token:
                tokens.append(_as_added({**token, "special": True}))
            elif isinstance(token, str):
                tokens.append(AddedToken(token, special=True))
    return tokens


def _as_added(token: dict[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(token["content"], **{name: token[name] for name in flags if name in token})


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _joined(
    table: dict[str, int], added: dict[int, AddedToken], file: str | os.PathLike
) -> dict[str, int]:
    """The vocabulary with the added tokens at their ids."""
    taken = {i: token for token, i in table.items()} if added else {}
    for i, token in added.items():
        if taken.get(i, token.content) != token.content:
            raise UserError(
                f"Added token {token.content!r} has id {i}, which {file} gives to {taken[i]!r}: "
                "the files are of different tokenizers. Take all of them from one."
            )
    return {**table, **{token.content: i for i, token in added.items()}}


def _with_tokens(content: str, added: dict[int, AddedToken], file: Path) -> str:
    """A tokenizer.json, with the added tokens that it lacks."""
    if not added:
        return content
    try:
        backend = Backend.from_str(content)
    except BaseException as error:  # tokenizers raises bare Exceptions, and panics are not even
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return content  # whoever reads it next says what is wrong with it
    lacking = [i for i in sorted(added) if backend.token_to_id(added[i].content) is None]
    if not lacking:
        return content
    backend.add_tokens([added[i] for i in lacking])
    for i in lacking:
        if (found := backend.token_to_id(added[i].content)) != i:
            raise UserError(
                f"{file} lacks the token {added[i].content!r}, which should have id {i} and would "
                f"get {found}. Let transformers write the folder again: {_SAVE}."
            )
    return backend.to_str()


def _eot_ids(folder: Path) -> tuple[int, ...]:
    """What transformers' generate would stop at."""
    for name in ("generation_config.json", "config.json"):
        value = _read_object(folder / name).get("eos_token_id")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            return tuple(i for i in values if isinstance(i, int) and not isinstance(i, bool))
    return ()


def _bpe_files(folder: Path) -> tuple[Path, Path] | None:
    for names in _BPE_FILES:
        files = folder / names[0], folder / names[1]
        if all(file.is_file() for file in files):
            return files
    return None


def _read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is no file."""
    value = read_json(file) if file.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object. Restore it.")
    return value
