"""Where benchmarks/quality.py works: two corpora, a trained parent for each, one way to train on
and one way to measure. Whatever it starts it can go on with after any interruption."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tf_gptopt._files import read_json, write_json
from tf_gptopt._keras import keras
from tf_gptopt._tokenizer import Tokenizer
from tf_gptopt.compression.pruning.pruner import count_parameters
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.data.corpus import load_corpus
from tf_gptopt.data.dataset import TokenDataset
from tf_gptopt.data.packing import write_dataset
from tf_gptopt.data.tokenizer import train_tokenizer
from tf_gptopt.evaluation.quality import Quality, measure_quality, token_logits
from tf_gptopt.evaluation.size import file_bytes
from tf_gptopt.models.checkpoints import load_checkpoint, save_model
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.tflite.convert import export_tflite
from tf_gptopt.tflite.runtime import TFLiteGPT
from tf_gptopt.training import trainer
from tf_gptopt.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Scale:
    """What every result depends on: sizes, and the training that each technique gets.

    Args:
        seed: of the split, the parents' weights and the order of every run's tokens.
        vocab_size, length, batch: tokens of the vocabulary, of a window, windows of a step.
        shape: the parent's; 5.8 million parameters.
        parent_steps: its training, of 2,048 tokens each, to where PyTorch's model is compared.
        parent_rate: its peak learning rate.
        more_steps: what it is trained on from there, its learning rate warmed up again.
        more_rate: the peak of that.
        tune_steps: of every technique that trains on.
        scored: held-out tokens.
        calibration: windows of the training split.
    """

    seed: int = 0
    vocab_size: int = 4096
    length: int = 256
    batch: int = 8
    shape: tuple[tuple[str, int], ...] = (
        ("embedding_dim", 256),
        ("num_layers", 6),
        ("num_heads", 8),
    )
    parent_steps: int = 1500
    parent_rate: float = 2e-3
    more_steps: int = 3000
    more_rate: float = 1.5e-3
    tune_steps: int = 150
    scored: int = 65_536
    calibration: int = 128


QUICK = Scale(
    vocab_size=512,
    length=32,
    shape=(("embedding_dim", 32), ("num_layers", 2), ("num_heads", 4)),
    parent_steps=30,
    more_steps=10,
    tune_steps=6,
    scored=1024,
    calibration=8,
)


@dataclasses.dataclass
class Lab:
    """A corpus and what has been made of it.

    Args:
        corpus: "wikitext2" or "python" (the standard library's source code).
        folder: everything is kept here.
        texts: WikiText-2's `train.txt` and `valid.txt` (for "wikitext2").
        say: where a line of progress goes.
        scale: how large and how long.
    """

    groups: ClassVar[tuple[str, ...] | None] = None  # of runs that make sense here; None: all
    corpus: str
    folder: Path
    texts: Path | None
    say: Callable[[str], None]
    scale: Scale = Scale()

    @cached_property
    def data(self) -> TokenDataset:
        folder = self.folder / "data"
        if not (folder / "dataset.json").is_file():
            self.say("tokenizer and dataset")
            wiki = self.corpus == "wikitext2"
            train = load_corpus(self.texts / "train.txt" if wiki else None)
            valid = load_corpus(self.texts / "valid.txt") if wiki else None
            tokenizer = train_tokenizer([d.text for d in train], self.scale.vocab_size)
            tokenizer.save(folder)
            write_dataset(
                train, tokenizer, folder, self.scale.length, seed=self.scale.seed, valid=valid
            )
        return TokenDataset.load(folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        assert self.data  # makes both
        return Tokenizer.load(self.folder / "data")

    @property
    def early(self) -> GPTModel:
        """The parent after `parent_steps`, where PyTorch's is compared."""

        def train(folder: Path) -> GPTModel:
            model = self.fresh(dict(self.scale.shape))
            self.fit(model, self.scale.parent_steps, self.scale.parent_rate, folder)
            return model

        return self._trained("trained", train)

    @property
    def parent(self) -> GPTModel:
        """A fresh copy of the trained float parent."""

        def train(folder: Path) -> GPTModel:
            model = self.early
            self.fit(model, self.scale.more_steps, self.scale.more_rate, folder, seed=1)
            return model

        return self._trained("trained_on", train)

    def _trained(self, name: str, train: Callable[[Path], GPTModel]) -> GPTModel:
        """What `train` makes, from disk; its folder lies beside the runs, which measure it."""
        folder = self.folder / name
        if not (folder / "model").is_dir():
            self.say(name)
            save_model(train(folder), folder / "model")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return load_checkpoint(folder / "model")

    @cached_property
    def reference(self) -> Quality:
        """The parent's, that all others are held against."""
        return measure_quality(self.parent, self.scored())

    @cached_property
    def reference_logits(self) -> list[np.ndarray]:
        """The parent's, batch by batch: a gigabyte, which every row would compute anew."""
        return list(token_logits(self.parent, self.scored()))

    @cached_property
    def calibration(self) -> np.ndarray:
        """Windows of the training split, `(calibration, length)` int32."""
        count, seed = self.scale.calibration, self.scale.seed
        batches = self.data.batches("train", count, seed=seed, max_batches=1)
        return next(batches.as_numpy_iterator())[0]

    def sample(self) -> Any:
        """Two batches of the training split, to measure what each layer is worth."""
        batches = self.data.batches("train", self.scale.batch, seed=5, max_batches=2)
        return batches.as_numpy_iterator()

    def scored(self) -> Any:
        """The held-out batches, the same for every model."""
        scale = self.scale
        count = scale.scored // (scale.batch * scale.length)
        return self.data.batches("valid", scale.batch, max_batches=count).as_numpy_iterator()

    def fresh(self, shape: dict[str, Any]) -> GPTModel:
        """A model with random weights."""
        keras.utils.set_random_seed(self.scale.seed)
        model = GPTModel(
            vocab_size=self.tokenizer.vocab_size, max_sequence_length=self.scale.length, **shape
        )
        model.tokenizer = self.tokenizer
        return model

    def fit(
        self,
        model: keras.Model,
        steps: int,
        learning_rate: float,
        folder: Path,
        callbacks: Sequence[Any] = (),
        seed: int = 0,
        data: Any = None,
    ) -> dict[str, Any]:
        """Train, with checkpoints in `folder`; `seed` gives the tokens another order, and `data`
        are other batches."""
        config = self.training(steps, learning_rate, seed)
        return trainer.fit(model, data or self.data, config, folder / "checkpoints", callbacks)

    def training(self, steps: int, learning_rate: float, seed: int = 0) -> TrainConfig:
        return TrainConfig(
            steps,
            self.scale.batch,
            learning_rate=learning_rate,
            seed=self.scale.seed + seed,
            precision="float32",
        )

    def sizes(self) -> dict[str, int]:
        """Tokens of both splits."""
        info = self.data.info
        return {"train_tokens": info.train_tokens, "valid_tokens": info.valid_tokens}

    def compare(self) -> dict[str, Any]:
        """The same model in PyTorch, after `parent_steps`."""
        return self.run("pytorch", {}, functools.partial(nanogpt, self))

    def measure(
        self, model: GPTModel, folder: Path, config: QuantConfig | None = None
    ) -> dict[str, Any]:
        """What the table shows of a plain model, its int8 file's size too; or, with a `config`, of
        the file of that scheme. The file stays in `folder`, for the timing at the end."""
        parameters, nonzero = count_parameters(model)
        file = folder / "model.tflite"
        export_tflite(model, file, config or QuantConfig(), tokenizer=self.tokenizer)
        size, packed = file_bytes(file)
        subject = model if config is None else TFLiteGPT(file)
        quality = measure_quality(subject, self.scored(), self.reference_logits)
        return {
            "parameters": parameters,
            "nonzero": nonzero,
            "bytes": size,
            "gzip_bytes": packed,
            "loss": round(quality.loss, 5),
            "perplexity": round(quality.perplexity, 3),
            "change": round(quality.perplexity / self.reference.perplexity - 1, 5),
            "agreement": round(quality.agreement(self.reference), 5),
            "kl": round(quality.kl, 5),
        }

    def finished(self, name: str, settings: dict[str, Any]) -> Any:
        """A run's result, if it has been run with these settings."""
        path = self.folder / name / "result.json"
        found = read_json(path) if path.is_file() else {}
        return found["result"] if found.get("key") == self._key(settings) else None

    def run(self, name: str, settings: dict[str, Any], make: Callable[[Path], Any]) -> Any:
        """The result of a run: made, or read when these settings have been run before.

        Args:
            name: the run's folder.
            settings: what the result depends on, beside this file's constants.
            make: folder -> result, JSON-ready.
        """
        found = self.finished(name, settings)
        if found is not None:
            return found
        folder, key = self.folder / name, self._key(settings)
        mark = folder / "key.json"
        if not mark.is_file() or read_json(mark) != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(mark, key)
        self.say(name)
        keras.backend.clear_session()
        result = make(folder)
        write_json(folder / "result.json", {"key": key, "settings": settings, "result": result})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return result

    def _key(self, settings: dict[str, Any]) -> str:
        text = json.dumps([dataclasses.asdict(self.scale), settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def nanogpt(lab: Lab, folder: Path) -> dict[str, Any]:
    """The same size of model, tokens, order, schedule and optimizer in PyTorch: its held-out loss.

    Every hundred steps go to disk, so that it too can be interrupted."""
    import torch
    import torch.nn.functional as F

    from benchmarks.nanogpt import GPT, adamw
    from tf_gptopt.training.schedules import schedule_for

    scale, shape = lab.scale, dict(lab.scale.shape)
    torch.manual_seed(scale.seed)
    sizes = [shape[name] for name in ("embedding_dim", "num_layers", "num_heads")]
    model = GPT(lab.tokenizer.vocab_size, *sizes, scale.length)
    optimizer = adamw(model, 0.0)
    rate = schedule_for(lab.training(scale.parent_steps, scale.parent_rate))
    loss_of = torch.compile(lambda x, y: F.cross_entropy(model(x), y.view(-1)))
    saved, done = folder / "checkpoints" / "torch.pt", 0
    saved.parent.mkdir(exist_ok=True)
    if saved.is_file():
        done, weights, moments = torch.load(saved)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    batches = lab.data.batches("train", scale.batch, scale.seed, done, scale.parent_steps - done)
    for step, batch in enumerate(batches.as_numpy_iterator(), done):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        loss = loss_of(*(torch.tensor(part).long() for part in batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            part = saved.with_suffix(".part")
            torch.save((step + 1, model.state_dict(), optimizer.state_dict()), part)
            part.replace(saved)
            lab.say(f"PyTorch step {step + 1}/{scale.parent_steps}  loss {loss.item():.4f}")
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(torch.tensor(x).long()), torch.tensor(y).long().view(-1))
            for x, y in lab.scored()
        ]
    loss = float(torch.stack(losses).double().mean())
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "loss": loss, "perplexity": math.exp(loss)}
