"""From documents to two streams of token ids on disk, train and valid. Needs no TensorFlow.

A stream is the documents' tokens, each document followed by the end-of-text token; windows of any
length are cut from it later. Which stream a document goes to depends on a hash of its text, and no
text is ever in both. A document stays where it is when others are added, but in a corpus of so few
that the hash alone would hold out another share than was asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt._files import SEAL, check_seal, read_json, sealed, write_json
from tf_gptopt._folder import changing, settled
from tf_gptopt.data.corpus import Document
from tf_gptopt.data.tokenizer import Tokenizer

SPLITS = ("train", "valid")
INFO_FILE = "dataset.json"
_FORMAT = "tf_gptopt.dataset.1"
_OFF = 0.2  # how far the share of held-out text may be off, of itself
_NEAR = 0.05  # as near is near enough
_BATCH = 1 << 21  # characters tokenized at once: enough for all cores, small beside the corpus


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """What one stream holds; `text_bytes` is the UTF-8 length of its documents."""

    tokens: int
    documents: int
    text_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What dataset.json says of a folder with train.bin and valid.bin.

    Attributes:
        dtype: of the token ids on disk, little-endian: "uint16" (up to 65,536 tokens) or "uint32".
        sequence_length: the context it was made for; both streams hold at least one.
        tokenizer_fingerprint: `Tokenizer.fingerprint` of the tokenizer that made the ids.
        seed: of the split.
    """

    train: SplitInfo
    valid: SplitInfo
    dtype: str
    vocab_size: int
    eot_id: int
    sequence_length: int
    tokenizer_fingerprint: str
    valid_fraction: float
    seed: int

    @property
    def train_tokens(self) -> int:
        """Tokens to train on."""
        return self.train.tokens

    @property
    def valid_tokens(self) -> int:
        """Tokens held out."""
        return self.valid.tokens

    def split(self, name: str) -> SplitInfo:
        """The stream called "train" or "valid"."""
        if name not in SPLITS:
            raise UserError(f"The splits of a dataset are 'train' and 'valid'. Received: {name!r}.")
        return getattr(self, name)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> DatasetInfo:
        """Read a folder's dataset.json."""
        path = settled(folder) / INFO_FILE
        if not path.is_file():
            raise UserError(f"There is no dataset in {folder}: {INFO_FILE} was expected.")
        values = read_json(path)
        if isinstance(values, dict):
            check_seal(path, values)
            values.pop(SEAL, None)
        try:
            if values.pop("format") != _FORMAT:
                raise KeyError("format")
            splits = {name: SplitInfo(**values.pop(name)) for name in SPLITS}
            return cls(**splits, **values)
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path} is not a dataset description of this version. Make the dataset again."
            ) from None


def write_dataset(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    sequence_length: int,
    valid_fraction: float = 0.05,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    valid: Sequence[Document] | None = None,
) -> DatasetInfo:
    """Tokenize documents and write train.bin, valid.bin and dataset.json, all at once.

    Args:
        documents: at least two, of different text; with `valid`, all of them are for training.
        tokenizer: must have an end-of-text token.
        folder: made if absent; a dataset that is there is replaced.
        sequence_length: tokens of one context. Each split gets at least one (and its label).
        valid_fraction: share of the text that is held out, in whole documents and to within a
            fifth (8% is 6.4% to 9.6%) where their sizes allow that. One context is held out at
            least; a document that is half of the corpus stays in train.
        seed: of the split.
        on_progress: called with the bytes of text done and to do.
        valid: documents to hold out, where a corpus has a split of its own (WikiText's, say); a
            document that is also among them leaves training.

    Raises:
        UserError: when the corpus is too small for both splits, with what would do.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length must be positive. Received: {sequence_length}.")
    if not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction must be between 0 and 1. Received: {valid_fraction}.")
    if tokenizer.eot_id is None:
        raise UserError(
            "The tokenizer has no end-of-text token, which must stand between documents. Name one "
            "of its tokens as eos_token in tokenizer_config.json, or train a tokenizer."
        )
    for document in (*documents, *(valid or ())):
        if not isinstance(document, Document):
            raise UserError(
                "write_dataset takes documents, as load_corpus gives them: Document(name, text). "
                f"Received: {type(document).__name__}."
            )
    # Reading in the order of the hash shuffles the documents, and gives each its place for good
    given = {document.text for document in valid or ()}
    documents = [*(d for d in documents if d.text not in given), *(valid or ())]
    keyed = sorted(
        ((_key(document.text, seed), document) for document in documents),
        key=lambda item: (item[0], item[1].name),
    )
    keys = np.array([key for key, _ in keyed], np.float64)
    ordered = [document for _, document in keyed]
    sizes = [len(document.text.encode()) for document in ordered]
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    tokens = list(_tokenize(ordered, sizes, tokenizer, dtype, on_progress))
    lengths = np.array([len(ids) for ids in tokens], np.int64)
    if valid is None:
        held_out = _hold_out(keys, lengths, valid_fraction, sequence_length + 1)
    else:
        held_out = np.array([document.text in given for document in ordered])
        valid_fraction = float(np.mean(held_out))
    _require_contexts(lengths, held_out, sequence_length, valid_fraction)

    splits: dict[str, SplitInfo] = {}
    with changing(folder) as new:
        for name, chosen in (("train", ~held_out), ("valid", held_out)):
            rows = np.flatnonzero(chosen).tolist()
            splits[name] = SplitInfo(
                tokens=int(lengths[rows].sum()),
                documents=len(rows),
                text_bytes=sum(sizes[row] for row in rows),
                sha256=_write(new / f"{name}.bin", [tokens[row] for row in rows]),
            )
        info = DatasetInfo(
            **splits,
            dtype="uint16" if dtype.itemsize == 2 else "uint32",
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            sequence_length=sequence_length,
            tokenizer_fingerprint=tokenizer.fingerprint,
            valid_fraction=valid_fraction,
            seed=seed,
        )
        write_json(new / INFO_FILE, sealed({"format": _FORMAT, **dataclasses.asdict(info)}))
    return info


def _key(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=7, salt=str(seed).encode()[:16]).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _tokenize(
    documents: Sequence[Document],
    sizes: Sequence[int],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[np.ndarray]:
    """Each document's ids, what begins a text before them and the end-of-text id behind; about
    half as many bytes as the text has."""
    done, total, start = 0, sum(sizes), 0
    # where a text begins with the token that ends one, that of the document before does for it
    bos = [] if tokenizer.bos_ids == (tokenizer.eot_id,) else list(tokenizer.bos_ids)
    while start < len(documents):
        end, characters = start, 0
        while end < len(documents) and characters < _BATCH:
            characters += len(documents[end].text)
            end += 1
        for ids in tokenizer.encode_batch([document.text for document in documents[start:end]]):
            yield np.concatenate([bos, ids, [tokenizer.eot_id]]).astype(dtype)
        done, start = done + sum(sizes[start:end]), end
        if on_progress:
            on_progress(done, total)


def _hold_out(keys: np.ndarray, lengths: np.ndarray, fraction: float, needed: int) -> np.ndarray:
    """Which documents (in the order of their keys) are for validation.

    Those whose key is below the fraction, which stay where they are when others are added. Where
    chance makes that another share of the tokens (documents are few, or of very unequal length),
    they are taken in the order of their keys until the share is right.
    """
    if not len(keys):
        return np.zeros(0, bool)
    _, starts, which = np.unique(keys, return_index=True, return_inverse=True)
    sizes = np.add.reduceat(lengths, starts).tolist()  # equal texts go the same way
    target, limit = fraction * sum(sizes), max(fraction, 0.5) * sum(sizes)
    chosen, held = np.zeros(len(sizes), bool), 0

    for i in np.flatnonzero(keys[starts] < fraction).tolist():
        if held + sizes[i] <= limit:
            chosen[i], held = True, held + sizes[i]
    if abs(held - target) > _OFF * target:
        chosen[:], held = False, 0
        for i, size in enumerate(sizes):
            if held >= (1 - _NEAR) * target:
                break
            # with this one nearer to it than without
            if held + size / 2 <= target and held + size <= limit:
                chosen[i], held = True, held + size
    for i, size in enumerate(sizes):
        if held >= needed:
            break
        if not chosen[i] and held + size <= limit:
            chosen[i], held = True, held + size
    return chosen[which]


def _require_contexts(
    lengths: np.ndarray, held_out: np.ndarray, sequence_length: int, valid_fraction: float
) -> None:
    train, valid = int(lengths[~held_out].sum()), int(lengths[held_out].sum())
    if min(train, valid) > sequence_length:
        return
    raise UserError(
        f"The corpus is too small: it has {len(lengths)} documents of {train + valid} tokens: "
        f"{train} for training and {valid} for validation. Each needs at least "
        f"{sequence_length + 1} (sequence_length={sequence_length}, "
        f"valid_fraction={valid_fraction:g}). Give more text or more documents, or use a smaller "
        "sequence_length."
    )


def _write(path: Path, arrays: list[np.ndarray]) -> str:
    """Write the arrays one after the other; returns the sha256 of the file."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for array in arrays:
            data = array.tobytes()
            digest.update(data)
            file.write(data)
    return digest.hexdigest()
