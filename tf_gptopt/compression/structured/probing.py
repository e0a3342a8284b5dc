"""What a cut costs, tried out with gates before anything is cut."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tf_gptopt.compression.structured.gates import GatedGPT
from tf_gptopt.compression.structured.ladders import Group, close
from tf_gptopt.compression.structured.surgery import Units

PROBE_TOKENS = 4096


class Probe:
    """Measures on the first `PROBE_TOKENS` of `token_ids` what the loss rises by.

    Args:
        gpt: the model.
        token_ids: `(examples, time)` int32.
        gates: what is closed already; the loss is compared with the loss then.
    """

    def __init__(self, gpt: GatedGPT, token_ids: np.ndarray, gates: Units) -> None:
        self._gpt, self._gates = gpt, gates
        self._ids = np.asarray(token_ids[: max(1, PROBE_TOKENS // token_ids.shape[1])], np.int32)
        self._streams = [gpt.embed(self._ids)]  # before every block: a probe starts at its own
        for i in range(gpt.config.num_layers):
            self._streams.append(gpt.block(i, self._streams[-1], gates)[0])
        self._before = self._loss(gates, gpt.config.num_layers)

    def __call__(self, group: Group, gone: np.ndarray) -> float:
        """Nats a token that the loss rises by when these units of a group are gone."""
        gates = tf.nest.map_structure(np.copy, self._gates)
        close(gates, group, gone)
        return self._loss(gates, group.block) - self._before

    def _loss(self, gates: Units, first: int) -> float:
        x = self._streams[first]
        for i in range(first, self._gpt.config.num_layers):
            x = self._gpt.block(i, x, gates)[0]
        loss, _ = self._gpt.loss(x, self._ids, gates)
        return float(loss) / max(1, np.sum(self._ids[:, 1:] >= 0))
