"""What a callback remembers, in the checkpoints of the model that it works on."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import tensorflow as tf


class SavedState(tf.train.experimental.PythonState):
    """Base of a dataclass that is an attribute of a model, so that checkpoints hold it.

    Its field `weights` is a list of arrays; all others are plain values, as JSON has them.
    """

    def serialize(self) -> bytes:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        weights, stream = values.pop("weights"), io.BytesIO()
        np.savez(stream, *weights, values=json.dumps(values))
        return stream.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        with np.load(io.BytesIO(string_value), allow_pickle=False) as file:
            values = json.loads(str(file["values"]))
            weights = [file[f"arr_{i}"] for i in range(len(file.files) - 1)]
        for name, value in {**values, "weights": weights}.items():
            setattr(self, name, value)
