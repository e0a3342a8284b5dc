"""A recipe: every number of a run in one small readable file. Needs no TensorFlow.

A recipe has one section per stage, in the order in which they run. Each section is the
configuration of the stage function of that name, and its defaults are the main job's values, so a
recipe says only what differs. `load_recipe("quick.yaml", {"train.fit.steps": 50})` reads one.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError, suggest
from tf_gptopt.compression.distillation.config import DistillConfig
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class CorpusSection:
    """Where the text comes from.

    Args:
        paths: text files, .jsonl files or folders; empty means the source code of the running
            Python's standard library.
        text_field: the field of a .jsonl line that holds its text.
    """

    paths: tuple[str, ...] = ()
    text_field: str = "text"


@dataclasses.dataclass(frozen=True)
class TokenizerSection:
    """The byte-level BPE tokenizer.

    Args:
        vocab_size: entries, of which 256 are bytes and one ends a document.
    """

    vocab_size: int = 4096


@dataclasses.dataclass(frozen=True)
class DatasetSection:
    """Packed tokens, split by document.

    Args:
        sequence_length: tokens a training example holds, the context of the model.
        valid_fraction: share of the documents that is held out.
    """

    sequence_length: int = 256
    valid_fraction: float = 0.05


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The teacher's shape; vocabulary and context come from the tokenizer and the dataset.

    Args:
        embedding_dim: width of the residual stream.
        num_layers: number of blocks.
        num_heads: attention heads.
        intermediate_dim: neurons of the MLP; default 4 x width.
        dropout: rate after embeddings, in attention and after each residual branch.
        tie_embeddings: whether the logits use the token table.
    """

    embedding_dim: int = 192
    num_layers: int = 4
    num_heads: int = 6
    intermediate_dim: int | None = None
    dropout: float = 0.0
    tie_embeddings: bool = True


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """Train the teacher.

    Args:
        model: its shape.
        fit: its training.
    """

    model: ModelSection = ModelSection()
    fit: TrainConfig = TrainConfig(steps=600, learning_rate=2e-3)


@dataclasses.dataclass(frozen=True)
class DistillSection:
    """Distill a student that starts as some of the teacher's blocks.

    Args:
        layers: how many blocks the student keeps.
        soft_labels: temperature and weight of the teacher's distribution.
        fit: its training.
    """

    layers: int = 2
    soft_labels: DistillConfig = DistillConfig()
    fit: TrainConfig = TrainConfig(steps=300, learning_rate=1e-3)


@dataclasses.dataclass(frozen=True)
class PruneSection:
    """Prune the student by magnitude while it trains on.

    Args:
        pruning: how much, where and along which schedule.
        fit: its training; it must be long enough to reach the end of the schedule.
    """

    pruning: PruneConfig = PruneConfig(end_step=100)
    fit: TrainConfig = TrainConfig(steps=150, learning_rate=5e-4)

    def __post_init__(self) -> None:
        if self.pruning.schedule == "polynomial" and self.pruning.end_step > self.fit.steps:
            raise UserError(
                "The pruning schedule must end before its training does. Received: "
                f"pruning.end_step={self.pruning.end_step}, fit.steps={self.fit.steps}."
            )


@dataclasses.dataclass(frozen=True)
class QatSection:
    """Quantization-aware training, keeping the zeros of the pruning.

    Args:
        quantization: the scheme that training sees and the file will hold.
        fit: its training.
    """

    quantization: QuantConfig = QuantConfig()
    fit: TrainConfig = TrainConfig(steps=100, learning_rate=2e-4)


@dataclasses.dataclass(frozen=True)
class ExportSection:
    """The .tflite file.

    Args:
        quantization: the file's scheme; after quantization-aware training, the same as there.
    """

    quantization: QuantConfig = QuantConfig()


@dataclasses.dataclass(frozen=True)
class EvaluateSection:
    """What is measured, and how long.

    Args:
        tokens: held-out tokens that every model is scored on.
        speed_tokens: tokens generated to time decoding.
        threads: processor threads; default all.
        tolerance: how much worse than the teacher's perplexity a recommended file may be
            (0.1 = 10%).
        prompt: what the finished file is asked to complete.
    """

    tokens: int = 32768
    speed_tokens: int = 64
    threads: int | None = None
    tolerance: float = 0.1
    prompt: str = "def __init__(self"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Raw text to an int8 file, stage by stage.

    Args:
        name: names the run's folder.
        seed: fixes initial weights, the split, the order of the data and sampling.
        corpus: where the text comes from.
        tokenizer: the vocabulary.
        dataset: packing and split.
        train: the teacher.
        distill: the student.
        prune: the sparse student.
        qat: the sparse student on its int8 grid.
        export: the .tflite file.
        evaluate: the measurements.
    """

    name: str = "default"
    seed: int = 0
    corpus: CorpusSection = CorpusSection()
    tokenizer: TokenizerSection = TokenizerSection()
    dataset: DatasetSection = DatasetSection()
    train: TrainSection = TrainSection()
    distill: DistillSection = DistillSection()
    prune: PruneSection = PruneSection()
    qat: QatSection = QatSection()
    export: ExportSection = ExportSection()
    evaluate: EvaluateSection = EvaluateSection()

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/\\") or self.name.startswith("."):
            raise UserError(f"A recipe's name must be a folder's name. Received: {self.name!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return plain(self)


def plain(config: Any) -> Any:
    """A configuration as JSON-ready values (tuples become lists)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [plain(item) for item in config]
    return config


def load_recipe(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe (.yaml, .yml or .toml; None is the one that the package carries).

    Args:
        path: a file, or the name of a recipe in the package (`default`, `quick`).
        overrides: dotted keys and values that replace the file's, such as
            `{"prune.pruning.sparsity": 0.7}`.

    Raises:
        UserError: for a file that cannot be read, an unknown key (with the nearest known one) or
            a value that cannot be.
    """
    values = _read(path)
    for key, value in (overrides or {}).items():
        _set_dotted(values, key, value)
    _check_keys(values, Recipe, "")
    return _build(values)


def parse_override(text: str) -> tuple[str, Any]:
    """`"prune.pruning.sparsity=0.7"` -> `("prune.pruning.sparsity", 0.7)`; the value is YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes key=value, such as train.fit.steps=200. Received: {text!r}.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"The value of {key} is not valid YAML. Received: {value!r}.") from None


def packaged_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    files = resources.files("tf_gptopt.recipes").iterdir()
    return sorted(file.name[: -len(".yaml")] for file in files if file.name.endswith(".yaml"))


def _read(path: str | Path | None) -> dict[str, Any]:
    path = "default" if path is None else path
    if str(path) in packaged_recipes():
        text, name = (
            resources.files("tf_gptopt.recipes").joinpath(f"{path}.yaml").read_text("utf-8"),
            f"{path}.yaml",
        )
    else:
        try:
            text, name = Path(path).read_text("utf-8"), Path(path).name
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(
                f"The recipe {path} cannot be read ({reason})."
                f"{suggest(str(path), packaged_recipes())}"
            ) from None
    values = _parse(text, name)
    if not isinstance(values, dict):
        raise UserError(f"The recipe {path} must hold `section:` keys. Received: {values!r:.60}.")
    return values


def _parse(text: str, name: str) -> Any:
    if name.endswith(".toml"):
        import tomllib

        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{name} is not valid TOML: {error}.") from None
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from None


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"{key} cannot be set: {parent} is a value, not a section.")
    values[last] = value


def _check_keys(values: Mapping[str, Any], config: type, where: str) -> None:
    """Unknown keys first, because a near match is worth more than a parser's complaint."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    for key, value in values.items():
        if key not in fields:
            known = [f"{where}{name}" for name in fields]
            raise UserError(f"Unknown recipe key '{where}{key}'.{suggest(f'{where}{key}', known)}")
        default = fields[key].default
        if not dataclasses.is_dataclass(default):
            continue
        if not isinstance(value, Mapping):
            raise UserError(f"'{where}{key}' is a section of keys. Received: {value!r:.60}.")
        _check_keys(value, type(default), f"{where}{key}.")


def _build(values: dict[str, Any]) -> Recipe:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, None)
    try:
        parsed = parser.instantiate(parser.parse_object(values))
    except UserError:
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"The recipe has a value that cannot be: {one_line(error)}") from None
    return Recipe(**{name: parsed[name] for name in inspect.signature(Recipe).parameters})


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split())
