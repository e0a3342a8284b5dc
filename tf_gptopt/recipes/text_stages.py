"""The stages that need text alone: tokenizer and dataset. Needs no TensorFlow.

Both have the signature of all stages; see `model_stages.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from tf_gptopt.data.corpus import Corpus, left_out, load_corpus
from tf_gptopt.data.packing import write_dataset
from tf_gptopt.data.tokenizer import Tokenizer, train_tokenizer
from tf_gptopt.recipes.advice import fragment_share, on_held_out, on_vocabulary
from tf_gptopt.recipes.console import Console
from tf_gptopt.recipes.sections import CorpusSection, DatasetSection, TokenizerSection

Metrics = dict[str, Any]


def tokenizer(
    section: TokenizerSection, corpus: CorpusSection, out: Path, seed: int, console: Console
) -> Metrics:
    """Train a byte-level BPE tokenizer on the corpus."""
    documents = _documents(corpus)
    size = sum(len(document.text) for document in documents)
    console.note(f"{len(documents):,} documents, {size:,} characters{left_out(documents)}")
    trained = train_tokenizer((document.text for document in documents), section.vocab_size)
    trained.save(out)
    if trained.vocab_size < section.vocab_size:
        console.note(f"the text gives no more than {trained.vocab_size:,} entries")
    return {"documents": len(documents), "characters": size, "vocab_size": trained.vocab_size}


def dataset(
    section: DatasetSection,
    corpus: CorpusSection,
    tokenizer_folder: Path,
    out: Path,
    seed: int,
    console: Console,
) -> Metrics:
    """Encode the corpus, hold documents out for validation and pack both splits."""
    encoder, documents = Tokenizer.load(tokenizer_folder), _documents(corpus)
    info = write_dataset(
        documents,
        encoder,
        out,
        section.sequence_length,
        valid_fraction=section.valid_fraction,
        seed=seed,
        valid=load_corpus(list(corpus.valid), corpus.text_field) if corpus.valid else None,
    )
    encoder.save(out)
    tokens = np.fromfile(out / "train.bin", np.dtype(info.dtype).newbyteorder("<"), 1 << 20)
    fragments = fragment_share(tokens, encoder)
    bytes_per_token = info.train.text_bytes / info.train.tokens
    share = info.valid_tokens / (info.train_tokens + info.valid_tokens)
    console.note(
        f"{info.train_tokens:,} training tokens of {bytes_per_token:.1f} bytes, "
        f"{info.valid_tokens:,} held out ({share:.1%})"
    )
    for advice in (
        *on_vocabulary(documents, fragments, encoder.vocab_size),
        *on_held_out(info),
    ):
        console.note(advice)
    facts = {"bytes_per_token": round(bytes_per_token, 3), "fragments": round(fragments, 4)}
    return {**dataclasses.asdict(info), **facts}


def _documents(corpus: CorpusSection) -> Corpus:
    return load_corpus(list(corpus.paths) or None, text_field=corpus.text_field)
