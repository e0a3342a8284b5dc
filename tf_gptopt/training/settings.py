"""What a model and its optimizer are set to, as plain values by name: compared between the workers
of a cluster, and between a run and its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tf_gptopt._keras import keras

# Of an optimizer: what it is called and how it is computed, and where its schedule stands
_NO_SETTINGS = ("name", "jit_compile", "is_legacy_optimizer")
_OPEN_ENDED = ("constant", "wsd")  # schedules of a run that may be made longer: see `check_length`


def settings(model: keras.Model) -> dict[str, Any]:
    """Shape, dropout, optimizer and loss of a compiled model, by names like "model.dropout"."""
    shape = getattr(getattr(model, "student", model), "config", None)
    return flat(
        {
            "model": shape.to_dict() if hasattr(shape, "to_dict") else {},
            "optimizer": _of_optimizer(model.optimizer),
            "loss": _of_object(model.loss),
        }
    )


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots; values as JSON gives them back."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        else:
            found[name] = json.loads(json.dumps(value, default=lambda item: type(item).__name__))
    return found


def differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs: now and before, by name. What only one of them names is not compared: an
    earlier version knew less, and one schedule has other settings than another."""
    return {
        name: (now[name], before[name])
        for name in sorted(now.keys() & before.keys())
        if now[name] != before[name]
    }


def _of_optimizer(optimizer: Any) -> dict[str, Any]:
    values = _of_object(optimizer)
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        values["inner_optimizer"] = _of_optimizer(inner)
    rate = values.get("learning_rate")
    if isinstance(rate, Mapping):
        rate = {"class": rate.get("class_name"), **rate.get("config", {})}
        values["learning_rate"] = rate
        if rate.get("kind") in _OPEN_ENDED:
            rate.pop("steps", None)
        rate.pop("scale", None)
    elif int(optimizer.iterations.numpy()):  # a callback may have changed the number since
        values.pop("learning_rate", None)
    return values


def _of_object(thing: Any) -> dict[str, Any]:
    """The class and the settings of an optimizer or a loss, however it was handed to `compile`."""
    if thing is None or isinstance(thing, (str, list, tuple, Mapping)):
        return {"class": thing if isinstance(thing, str) else type(thing).__name__}
    config = thing.get_config() if hasattr(thing, "get_config") else {}
    values = {key: value for key, value in config.items() if key not in _NO_SETTINGS}
    return {"class": getattr(thing, "__name__", type(thing).__name__), **values}
