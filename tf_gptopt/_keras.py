"""The only door to tf_keras and tfmot.

tfmot accepts `tf_keras` (Keras 2) models alone, while a plain `import keras` gives Keras 3 today.
Everything in the package therefore imports Keras from here, and what users hand in passes
`require_tf_keras`, which turns a Keras 3 object away with advice.
"""

from __future__ import annotations

from typing import Any

import tf_keras as keras

from tf_gptopt._errors import UserError

__all__ = ["keras", "require_tf_keras", "tfmot"]  # noqa: F822 (tfmot is lazy, below)


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
    modules = {cls.__module__.partition(".")[0] for cls in type(value).__mro__}
    if modules & {"keras", "keras_hub", "keras_nlp"}:
        raise UserError(
            f"The {what} is a Keras 3 object ({type(value).__name__}), and tfmot works on tf_keras "
            "models only. Build it with `import tf_keras as keras`, or copy its weights with "
            "tf_gptopt.load_checkpoint."
        )
    raise UserError(f"The {what} must be a tf_keras model. Received: {type(value).__name__}.")
