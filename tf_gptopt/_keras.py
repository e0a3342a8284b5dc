"""The only door to tf_keras and tfmot.

tfmot accepts `tf_keras` (Keras 2) models alone, while a plain `import keras` gives Keras 3 today.
Everything in the package therefore imports Keras from here, and what users hand in passes
`require_tf_keras`, which turns a Keras 3 object away with advice.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import tf_keras as keras

from tf_gptopt._errors import UserError

__all__ = ["keras", "refuse_keras3", "require_tf_keras", "tfmot"]  # noqa: F822 (tfmot is lazy, below)


def __getattr__(name: str) -> Any:
    if name == "tfmot":  # half a second that only pruning and QAT need
        import tensorflow_model_optimization

        return tensorflow_model_optimization
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def require_tf_keras(value: Any, what: str = "model") -> Any:
    """Return `value` if it is a `tf_keras` model or layer.

    Raises:
        UserError: for a Keras 3 object (with how to bring it over) and for anything else.
    """
    if isinstance(value, (keras.Model, keras.layers.Layer)):
        return value
    if is_keras3(value):
        raise UserError(
            f"The {what} is a Keras 3 object ({type(value).__name__}), and tfmot works on tf_keras "
            "models only. Build it with `import tf_keras as keras`, or copy its weights with "
            "tf_gptopt.load_checkpoint."
        )
    raise UserError(f"The {what} must be a tf_keras model. Received: {type(value).__name__}.")


def is_keras3(value: Any) -> bool:
    """Whether `value` is an object, a class or a function of Keras 3, or of what is built on it."""
    kind = value if isinstance(value, type) else type(value)
    modules = [one.__module__ for one in kind.__mro__] + [getattr(value, "__module__", None)]
    roots = {str(module).partition(".")[0] for module in modules}
    return bool(roots & {"keras", "keras_hub", "keras_nlp"})


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def refuse_keras3(value: Any, what: str) -> Any:
    """Return `value`, an optimizer, loss, metric or callback, if it is not of Keras 3.

    Raises:
        UserError: for one that is, with what to import.
    """
    if is_keras3(value):
        name = getattr(value, "__name__", type(value).__name__)
        raise UserError(
            f"The {what} {name} is of Keras 3, which is what `import keras` and tf.keras are, and "
            "a GPTModel is of tf_keras (Keras 2), which tfmot needs. Write `import tf_keras as "
            f"keras` and take {name} from there."
        )
    return value


def refuse_hdf5(path: Any, save_format: str | None) -> None:
    """Raise a `UserError` where Keras would write a model as HDF5."""
    is_path = isinstance(path, (str, os.PathLike))
    is_hdf5 = os.fspath(path).endswith((".h5", ".hdf5")) if is_path else _package(path) == "h5py"
    if is_hdf5 or save_format in ("h5", "hdf5"):
        raise UserError(
            "Keras writes a GPTModel as HDF5 and cannot read it again. Received: "
            f"{path}. Save it as a .keras file, or with save_to_preset(folder). Weights alone may "
            "be .h5: save_weights and load_weights."
        )


class _InKeras3:
    """What Keras 3 finds in the place of `GPTModel` when it reads a file of one."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        raise UserError(
            "The file holds a model of tf_keras (Keras 2), and this is Keras 3, which is what "
            "`import keras` and tf.keras are. Write `import tf_keras as keras`, then "
            "keras.models.load_model reads it."
        )


def tell_keras3(registered_name: str) -> None:
    """Let Keras 3, if this process has it, refuse a file with a `registered_name` in a sentence."""
    keras3 = sys.modules.get("keras")
    if keras3 is not None and hasattr(keras3, "saving"):
        keras3.saving.get_custom_objects().setdefault(registered_name, _InKeras3)
