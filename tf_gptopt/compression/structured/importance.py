"""What each unit of a GPT is worth on calibration data: two rankings, `IMPORTANCES` of config.py.

**Activation** (Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge
Distillation", Minitron, arXiv:2407.14679) needs forward passes alone. A head is worth the L2 norm
of its output, a neuron the absolute value behind GELU, a channel the absolute values of the outputs
of all LayerNorms, summed. Each is averaged over the time of an example and then taken in L2 norm
over examples, the pair of aggregates that the paper recommends. A block is worth its block
influence, 1 - the mean cosine between what enters it and what leaves it (Men et al. 2024,
ShortGPT, arXiv:2403.03853).

**Taylor** also needs a backward pass: a unit is worth |dL/dg| at the gate g = 1 on its output, the
first-order estimate of what the loss of an example changes by when the unit goes, averaged over
examples (Michel et al. 2019, arXiv:1905.10650, for heads; Molchanov et al. 2019, arXiv:1906.10771).
It equals |sum of w dL/dw| over the weights that read the unit's output. So a strong unit whose
output nobody uses is worth nothing, which activation alone cannot see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError, suggest
from tf_gptopt.compression.calibration import Progress
from tf_gptopt.compression.structured.gates import GatedGPT, open_gates
from tf_gptopt.compression.structured.surgery import Units

BATCH_TOKENS = 4096  # of one forward pass


def importance(
    gpt: GatedGPT,
    token_ids: np.ndarray,
    kind: str,
    on_progress: Progress | None = None,
    gates: Units | None = None,
) -> Units:
    """A score for every unit, float64; the least important of a group is the smallest.

    Scores of one kind of unit can be compared, those of two kinds cannot. Memory is that of one
    batch's residual stream before every block, and of the inside of one block.

    Args:
        gpt: the model.
        token_ids: `(examples, time)` int32, negative where there is no text; labels are the tokens
            that follow.
        kind: `"activation"` or `"taylor"`.
        on_progress: called with examples done, all examples and what is done.
        gates: `(1, units)` each, 0 for what is gone already; those units' scores mean nothing.

    Raises:
        UserError: for an unknown kind.
    """
    measures = {"activation": _activation, "taylor": _taylor}
    if kind not in measures:
        raise UserError(f"Unknown importance {kind!r}.{suggest(str(kind), measures)}")
    config, total, done = gpt.config, None, 0
    gates = open_gates(config) if gates is None else gates
    for batch in batches(token_ids):
        scores = measures[kind](gpt, batch, gates)
        total = scores if total is None else _map(np.add, total, scores)
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(token_ids), f"{kind} importance")
    if kind == "taylor":
        return _map(lambda score: score / done, total)
    layers, heads, neurons, norms = total
    return Units(
        layers / done,
        [np.sqrt(score) for score in heads],
        [np.sqrt(score) for score in neurons],
        np.sqrt(norms).reshape(-1, config.embedding_dim).sum(0),
    )


def batches(token_ids: np.ndarray) -> Iterator[np.ndarray]:
    """The examples, some at a time, each time the same number if that divides them."""
    size = max(1, BATCH_TOKENS // token_ids.shape[1])
    for start in range(0, len(token_ids), size):
        yield np.asarray(token_ids[start : start + size], np.int32)


def _activation(gpt: GatedGPT, token_ids: np.ndarray, gates: Units) -> Units:
    """Sums over examples: of 1 - cosine for blocks, of squares for the others; the channels of one
    norm after the other."""
    x = gpt.embed(token_ids)
    layers, heads, neurons, norms = [], [], [], []
    for i in range(gpt.config.num_layers):
        x, seen = gpt.block(i, x, gates, token_ids)
        # rounding alone makes a cosine larger than 1
        layers.append(np.sum(np.maximum(0.0, 1.0 - np.asarray(seen.similarity, np.float64))))
        heads.append(_squares(seen.heads))
        neurons.append(_squares(seen.neurons))
        norms += [_squares(seen.norms[0]), _squares(seen.norms[1])]
    _, last = gpt.loss(x, token_ids, gates)
    return Units(np.array(layers), heads, neurons, np.concatenate([*norms, _squares(last)]))


def _squares(magnitudes: tf.Tensor) -> np.ndarray:
    return np.sum(np.asarray(magnitudes, np.float64) ** 2, 0)


def _taylor(gpt: GatedGPT, token_ids: np.ndarray, gates: Units) -> Units:
    """Sums over examples of |dL/dg|, L the mean loss of an example's tokens."""
    gates = _map(lambda gate: np.repeat(gate, len(token_ids), 0), gates)  # one an example
    streams = [gpt.embed(token_ids)]
    for i in range(gpt.config.num_layers):
        streams.append(gpt.block(i, streams[-1], gates)[0])
    upstream, channels = gpt.loss_gradient(streams.pop(), token_ids, gates)
    layers, heads, neurons = [], [], []
    for i in reversed(range(gpt.config.num_layers)):
        upstream, slopes = gpt.block_gradient(i, streams.pop(), gates, upstream)
        layers.insert(0, np.asarray(slopes.layer))
        heads.insert(0, np.asarray(slopes.heads))
        neurons.insert(0, np.asarray(slopes.neurons))
        channels += slopes.channels
    slopes = Units(np.concatenate(layers, 1), heads, neurons, np.asarray(channels))
    tokens = np.maximum(np.sum(token_ids[:, 1:] >= 0, 1, keepdims=True), 1)
    return _map(lambda slope: (np.abs(np.asarray(slope, np.float64)) / tokens).sum(0), slopes)


def _map(function: Callable[..., np.ndarray], *units: Units) -> Units:
    return tf.nest.map_structure(function, *units)
