"""The stages that need text alone: tokenizer and dataset. Needs no TensorFlow.

Both have the signature of all stages; see `model_stages.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tf_gptopt.data.corpus import Corpus, left_out, load_corpus
from tf_gptopt.data.packing import write_dataset
from tf_gptopt.data.tokenizer import Tokenizer, train_tokenizer
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
    encoder = Tokenizer.load(tokenizer_folder)
    info = write_dataset(
        _documents(corpus),
        encoder,
        out,
        section.sequence_length,
        valid_fraction=section.valid_fraction,
        seed=seed,
        valid=load_corpus(list(corpus.valid), corpus.text_field) if corpus.valid else None,
    )
    encoder.save(out)
    metrics = dataclasses.asdict(info)
    console.note(f"{info.train_tokens:,} training tokens, {info.valid_tokens:,} held out")
    return metrics


def _documents(corpus: CorpusSection) -> Corpus:
    return load_corpus(list(corpus.paths) or None, text_field=corpus.text_field)
