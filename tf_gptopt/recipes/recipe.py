"""A recipe: every number of a run in one small readable file. Needs no TensorFlow.

A recipe has one section per stage, in the order in which they run (`sections.py`). Their defaults
are the main job's values, so a recipe says only what differs, and `prune: null` leaves a stage out.
`load_recipe("quick.yaml", {"train.fit.steps": 50})` reads one.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._files import read_text
from tf_gptopt._options import one_line
from tf_gptopt.compression.quantization.config import RECIPES, QuantConfig
from tf_gptopt.recipes.sections import (
    CorpusSection,
    DatasetSection,
    DistillSection,
    DraftSection,
    EvaluateSection,
    ExportSection,
    PruneSection,
    QatSection,
    QuantizeSection,
    TokenizerSection,
    TrainSection,
)

# A recipe that somebody wrote is far smaller
_MOST_BYTES, _MOST_VALUES, _MOST_LEVELS, _MOST_NAME = 1 << 18, 10_000, 30, 200


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
        distill: the student, or None without one.
        prune: the sparse student, or None to leave it dense.
        qat: the student trained on its grid, or None to quantize without training.
        quantize: quantization after training, or None to leave that to qat or the export.
        export: the .tflite file, of the last model before it.
        draft: a small student of the exported model that guesses its tokens, or None.
        evaluate: the measurements.
    """

    name: str = "default"
    seed: int = 0
    corpus: CorpusSection = CorpusSection()
    tokenizer: TokenizerSection = TokenizerSection()
    dataset: DatasetSection = DatasetSection()
    train: TrainSection = TrainSection()
    distill: DistillSection | None = DistillSection()
    prune: PruneSection | None = PruneSection()
    qat: QatSection | None = QatSection()
    quantize: QuantizeSection | None = None
    export: ExportSection = ExportSection()
    draft: DraftSection | None = None
    evaluate: EvaluateSection = EvaluateSection()

    def __post_init__(self) -> None:
        name = self.name
        is_name = name.isprintable() and 0 < len(name.encode()) <= _MOST_NAME
        if not is_name or set(name) & set("/\\") or name.startswith("."):
            raise UserError(
                f"A recipe's name must be a folder's name, of {_MOST_NAME} bytes at most. "
                f"Received: {name!r:.120}."
            )

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
    """`"prune.pruning.sparsity=0.7"` -> `("prune.pruning.sparsity", 0.7)`.

    The value is YAML, but where the recipe holds text it is that text as it stands: `ROMEO:`,
    `[x`, `12`. Quotes around it are YAML's, and keep spaces.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes key=value, such as train.fit.steps=200. Received: {text!r}.")
    key, value = key.strip(), value.strip()
    kinds = _kinds_of(key)
    is_none = type(None) in kinds and value in ("", "null", "~")
    if kinds and kinds <= {str, type(None)} and value[:1] not in ("'", '"') and not is_none:
        return key, value
    return key, _load_yaml(value, f"The value of {key}, {value!r},")


def _kinds_of(key: str) -> set[Any]:
    """The types that a recipe's dotted key may have; none for a key that is unknown."""
    kinds: set[Any] = {Recipe}
    for part in key.split("."):
        sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        hints = typing.get_type_hints(sections[0]) if sections else {}
        if part not in hints:
            return set()
        is_union = typing.get_origin(hints[part]) in (types.UnionType, typing.Union)
        kinds = set(typing.get_args(hints[part])) if is_union else {hints[part]}
    return kinds


def read_scheme(name: str, within: tuple[str, ...] = ()) -> QuantConfig:
    """A quantization by its name (a key of `RECIPES`), or from a .yaml, .toml or .json file, where
    it may stand under `quantization:`.

    Raises:
        UserError: for a name that is none, and a file that cannot be read or names itself.
    """
    if name in within:
        raise UserError(f"{' names '.join((*within, name))}: name a scheme, such as int8, there.")
    if name in RECIPES or not Path(name).suffix:
        return QuantConfig.from_recipe(name)
    values = _read(name)
    values = values.get("quantization", values)
    if isinstance(values, str):
        return read_scheme(values, (*within, name))
    return QuantConfig.from_dict(values)


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
            text, name = read_text(path, "recipe", _MOST_BYTES), Path(path).name
        except UserError as error:
            raise UserError(
                f"The recipe {path} cannot be read: {error}{suggest(str(path), packaged_recipes())}"
            ) from None
    values = _parse(text, name)
    if not isinstance(values, dict):
        raise UserError(f"The recipe {path} must hold `section:` keys. Received: {values!r:.60}.")
    return values


def _parse(text: str, name: str) -> Any:
    if name.endswith(".toml"):
        import tomllib

        try:
            return _bounded(tomllib.loads(text), name)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} is not valid TOML: {error}.") from None
    return _load_yaml(text, name) or {}


def _load_yaml(text: str, name: str) -> Any:
    """YAML 1.2 in that `2:4` is a text; 1.1 takes it for minutes and seconds, 124."""
    import yaml

    steps = itertools.accumulate((c in "[{") - (c in "]}") for c in text)
    if max(steps, default=0) > _MOST_LEVELS or "\n" + " " * 8 * _MOST_LEVELS in text:
        raise UserError(  # the parser would take minutes
            f"{name} has more than {_MOST_LEVELS} levels of brackets or indentation. A recipe has "
            "three or four."
        )

    class Loader(yaml.SafeLoader):
        def resolve(self, kind: type, value: str, implicit: Any) -> str:
            tag = super().resolve(kind, value, implicit)
            number = tag.endswith((":int", ":float"))
            return self.DEFAULT_SCALAR_TAG if number and ":" in value else tag

    try:
        return _bounded(yaml.load(text, Loader), name)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from None


def _bounded(values: Any, name: str) -> Any:
    """`values`, unless they are more than a recipe has: a few YAML aliases of aliases stand for
    billions of values, and one that contains itself for endless ones."""
    left, level = _MOST_VALUES, [values]
    for _ in range(_MOST_LEVELS):
        level = [
            item
            for value in level
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        left -= len(level)
        if not level:
            return values
        if left < 0:
            break
    raise UserError(
        f"{name} holds more than {_MOST_VALUES:,} values, aliases counted where they stand, or "
        f"more than {_MOST_LEVELS} levels. A recipe has some dozens: write it without aliases."
    )


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None or values[parent] is False:  # the stage was left out
            values[parent] = {}
        if parent == "quantization" and isinstance(values[parent], str):
            values[parent] = read_scheme(values[parent]).to_dict()
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"{key} cannot be set: {parent} is a value, not a section.")
    values[last] = value


def _check_keys(values: dict[str, Any], config: type, where: str) -> None:
    """Unknown keys first, because a near match is worth more than a parser's complaint."""
    hints = typing.get_type_hints(config)
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in hints:
            raise UserError(
                f"Unknown recipe key {name!r}.{suggest(name, [where + hint for hint in hints])}"
            )
        kinds = typing.get_args(hints[key]) or (hints[key],)
        section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if section is None:
            continue
        if type(None) in kinds and (value is None or value is False):  # TOML has no null
            values[key] = None
        elif section is QuantConfig and isinstance(value, str):
            values[key] = read_scheme(value).to_dict()
        elif isinstance(value, dict):
            _check_keys(value, section, f"{name}.")
        else:
            raise UserError(f"{name!r} is a section of keys. Received: {value!r:.60}.")


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
