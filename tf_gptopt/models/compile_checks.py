"""What `compile` is given, checked: a GPT puts out logits, and a loss that takes them for
probabilities trains something else without a word; objects of Keras 3 fail somewhere inside."""

from __future__ import annotations

import inspect
import warnings
from types import ModuleType
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras, refuse_keras3

# Keras's names without case and underscores; metrics have two short ones as well
_SPARSE = "SparseCategoricalCrossentropy"
_CLASSES = {
    "sparsecategoricalcrossentropy": _SPARSE,
    "categoricalcrossentropy": "CategoricalCrossentropy",
    "crossentropy": _SPARSE,
    "ce": _SPARSE,
}


def compile_arguments(
    optimizer: Any, loss: Any, metrics: Any, weighted_metrics: Any
) -> dict[str, Any]:
    """Keyword arguments for `keras.Model.compile`, in which a cross-entropy that was named is the
    one from logits.

    Raises:
        UserError: for a loss or a metric that takes probabilities, for a class where an object is
            needed, and for what is of Keras 3.
    """
    return {
        "optimizer": refuse_keras3(optimizer, "optimizer"),
        "loss": _from_logits(loss, keras.losses),
        "metrics": _from_logits(metrics, keras.metrics),
        "weighted_metrics": _from_logits(weighted_metrics, keras.metrics),
    }


def _from_logits(value: Any, module: ModuleType) -> Any:
    """`value`, a loss or metric or some by output, as it has to be for logits."""
    if isinstance(value, dict):
        return {key: _from_logits(item, module) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_from_logits(item, module) for item in value]
    what = "loss" if module is keras.losses else "metric"
    refuse_keras3(value, what)
    if isinstance(value, type):
        arguments = "from_logits=True" if _asks_for_logits(value) else ""
        raise UserError(
            f"The {what} {value.__name__} is a class. Give compile an object of it: "
            f"{value.__name__}({arguments})."
        )
    if isinstance(value, str):
        function = _known_to_keras(value, module)
    else:
        function = value if inspect.isfunction(value) else None
    if function is None:  # an object, or nothing
        options = getattr(value, "_fn_kwargs", None) or {}  # where Keras's own keep them
        if options.get("from_logits") is False:
            raise UserError(_advice(what, type(value).__name__))
        return value
    name = value if isinstance(value, str) else value.__name__
    if not (function.__module__.startswith("tf_keras.") and _asks_for_logits(function)):
        return value
    class_name = _CLASSES.get(name.lower().replace("_", ""))
    if class_name is None:
        raise UserError(_advice(what, repr(name)))
    if what == "loss":
        warnings.warn(
            f"loss={name!r} takes probabilities in Keras, and a GPT puts out logits: "
            f"{class_name}(from_logits=True) is taken instead. tf_gptopt.NextTokenLoss() computes "
            "the same in less time and memory, and leaves padding out.",
            stacklevel=4,
        )
    return getattr(module, class_name)(from_logits=True, name=name)


def _known_to_keras(name: str, module: ModuleType) -> Any:
    """What Keras has under this name, or None: it says itself what it does not know."""
    if name in ("ce", "crossentropy"):
        return keras.losses.sparse_categorical_crossentropy
    try:
        found = module.get(name)
    except ValueError:
        return None
    return found if inspect.isfunction(found) or inspect.isclass(found) else type(found)


def _asks_for_logits(function: Any) -> bool:
    """Whether a function or a class has the argument from_logits."""
    return "from_logits" in inspect.signature(function).parameters


def _advice(what: str, name: str) -> str:
    ours = ", or take tf_gptopt.NextTokenLoss()" if what == "loss" else ""
    return (
        f"The {what} {name} takes probabilities, and a GPT puts out logits. Write it as an object "
        f"with from_logits=True{ours}."
    )
