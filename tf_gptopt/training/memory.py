"""How many bytes of memory a training step takes on one device. Needs no TensorFlow.

Weights, gradients and moments are counted exactly. Activations follow from what the layers of
`models/gpt.py` keep from the forward pass for the backward pass, in the manner of Korthikanti et
al. (2022, "Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198). For a
token, a block of width d with a = heads x head_dim and n neurons keeps these elements:

| kept | for | elements |
| --- | --- | --- |
| the residual stream before either half | the gradient of LayerNorm | 2 d |
| the normalized stream of either half | the gradients of qkv's and fc's kernels | 2 d |
| q, k, v and scaled q | the two products of attention | 4 a |
| the weights of a head for at most time keys | softmax, the product with v | heads x keys |
| what attention returns, and its heads merged | softmax; the gradient of proj's kernel | 2 a |
| what GELU takes and returns | the gradients of GELU and of out's kernel | 2 n |

With a = d and n = 4 d and 16-bit elements that is 36 bytes a token and width, and 2 a head and key:
attention takes queries in blocks and leaves most of the keys ahead of them out, so that at 1,024
tokens there are 576 keys on average. The paper has 34, and 5 a head and token, from dropout's masks
and other choices of what to keep. The loss takes the logits in chunks
(`models/linear_cross_entropy.py`).

The worst moment counts: gradients come block by block as the activations go.
"""

from __future__ import annotations

import dataclasses
import itertools
import re

from tf_gptopt._errors import UserError, suggest
from tf_gptopt.models.config import GPTConfig

FLOAT32 = 4
COMPUTE_BYTES = {"float32": 4, "mixed_bfloat16": 2, "mixed_float16": 2}
MOMENTS = 2  # AdamW's, float32 for each weight
ATTENTION_BLOCK = 128  # queries: BLOCK of models/attention.py
CHUNK = 1 << 24  # logits: CHUNK of models/linear_cross_entropy.py
# Two of logits, probabilities and gradient in float32 at a time, and the 16-bit ones
LOGIT_BYTES = {"float32": 8, "mixed_bfloat16": 10, "mixed_float16": 18}
# Divided by vocabulary all three, the 16-bit ones, and half a copy inside softmax
DIVIDED_LOGIT_BYTES = {"float32": 14, "mixed_bfloat16": 18, "mixed_float16": 18}
MARGIN = 0.15  # how far above the estimate a step was measured at most


@dataclasses.dataclass(frozen=True)
class Step:
    """One update of the weights, as far as memory is concerned.

    Args:
        batch_size: sequences an update, all devices together.
        sequence_length: tokens a sequence.
        precision: "float32", "mixed_bfloat16" or "mixed_float16".
        recompute: blocks keep only their input and are computed again in the backward pass.
        accumulate: microbatches that an update is summed over, one after another.

    Raises:
        UserError: when a number is out of its range.
    """

    batch_size: int = 8
    sequence_length: int = 1024
    precision: str = "float32"
    recompute: bool = False
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more. Received: {getattr(self, name)}.")
        if self.precision not in COMPUTE_BYTES:
            raise UserError(
                f"Unknown precision {self.precision!r}.{suggest(self.precision, COMPUTE_BYTES)}"
            )


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device has of a model, and how much of a batch passes through it at a time.

    Args:
        config: the whole model.
        sequences: of one pass.
        blocks: `(first, last + 1)` of its blocks; None is all of them.
        split: devices that every matrix is divided among (tensor parallelism).
        replicas: devices that have the same weights and sum their gradients.
        passes: microbatches an update.
        in_flight: microbatches whose activations are kept at the same time.
        mesh: whether the device is one of a mesh, where replicas divide the weights' homes and
            moments among them and hold the others' for a step, and logits are in one piece.
    """

    config: GPTConfig
    sequences: int
    blocks: tuple[int, int] | None = None
    split: int = 1
    replicas: int = 1
    passes: int = 1
    in_flight: int = 1
    mesh: bool = False

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Heads and neurons of each block, as far as they are on this device."""
        both = zip(self.config.block_heads, self.config.block_intermediate_dims, strict=True)
        first, end = self.blocks or (0, self.config.num_layers)
        return [(-(-h // self.split), -(-n // self.split)) for h, n in list(both)[first:end]]

    @property
    def is_first(self) -> bool:
        """Whether the embeddings are here."""
        return self.blocks is None or self.blocks[0] == 0

    @property
    def is_last(self) -> bool:
        """Whether the logits are here."""
        return self.blocks is None or self.blocks[1] == self.config.num_layers

    @property
    def table(self) -> int:
        """Weights of the token table."""
        return -(-self.config.vocab_size // self.split) * self.config.embedding_dim


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters: float32 weights, and their 16-bit copies under mixed precision.
        gradients: float32, all that an optimizer receives.
        optimizer: AdamW's moments.
        activations: the most that forward and backward pass keep and work with.
        total: parameters, optimizer and the worst moment of the other two.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    total: int


def count_weights(share: Share) -> int:
    """Weights on the device."""
    return sum(_block_weights(share, *shape) for shape in share.shapes) + _outer_weights(share)


def step_memory(share: Share, step: Step) -> Memory:
    """What a training step needs on the device that has `share`."""
    weights = count_weights(share)
    gradients, table = FLOAT32 * weights, FLOAT32 * share.table
    optimizer = FLOAT32 * weights * MOMENTS // (share.replicas if share.mesh else 1)
    held = FLOAT32 * weights + optimizer
    copies = 2 * weights if COMPUTE_BYTES[step.precision] == 2 else 0
    if share.is_last and not share.is_first and share.config.tie_embeddings:
        copies += COMPUTE_BYTES[step.precision] * share.table  # of the first stage's table

    kept = [_block_kept(share, step, *shape) for shape in share.shapes]
    work = [_block_work(share, step, *shape) for shape in share.shapes]
    carried = gradients if share.passes > 1 else 0  # sums of earlier microbatches
    alive = share.in_flight * sum(kept)
    moments = []  # (activations, gradients)
    if share.is_last:  # the table's gradient is summed over chunks, then transposed
        moments.append((alive + _loss_work(share, step), 2 * table))
    came = table if share.is_last else 0
    for shape, block, busy in reversed(list(zip(share.shapes, kept, work, strict=True))):
        moments.append((alive + busy, came))
        alive -= block
        came += FLOAT32 * _block_weights(share, *shape)
    if share.is_first:
        # the two uses of a tied table are summed
        moments.append((alive, came + (2 * table if share.config.tie_embeddings else table)))
    summed = gradients if share.replicas > 1 else 0  # packed for the other replicas
    moments.append((alive, gradients + summed))
    return Memory(
        parameters=FLOAT32 * weights + copies,
        gradients=gradients,
        optimizer=optimizer,
        activations=max(kept_and_busy for kept_and_busy, _ in moments),
        total=held + copies + carried + max(a + g for a, g in moments),
    )


# Weights


def _block_weights(share: Share, heads: int, neurons: int) -> int:
    width, inner = share.config.embedding_dim, heads * share.config.head_dim
    norms = 4 * width
    attention = (width + 1) * 3 * inner + inner * width + width
    mlp = (width + 1) * neurons + neurons * width + width
    return norms + attention + mlp


def _outer_weights(share: Share) -> int:
    config, width = share.config, share.config.embedding_dim
    first = share.table + config.max_sequence_length * width
    last = 2 * width + (0 if config.tie_embeddings else share.table)
    return first * share.is_first + last * share.is_last


# Activations


def _block_kept(share: Share, step: Step, heads: int, neurons: int) -> int:
    """Bytes that a block keeps between its forward and its backward pass."""
    width = share.config.embedding_dim
    if _recomputes(share, step):
        return _tokens(share, step) * COMPUTE_BYTES[step.precision] * width
    return _block_full(share, step, heads, neurons)


def _block_full(share: Share, step: Step, heads: int, neurons: int) -> int:
    width, inner = share.config.embedding_dim, heads * share.config.head_dim
    weights = heads * _attended(step.sequence_length)
    elements = 4 * width + 6 * inner + 2 * neurons + weights
    statistics = 4 * FLOAT32  # mean and scale of two norms
    return _tokens(share, step) * (elements * COMPUTE_BYTES[step.precision] + statistics)


def _block_work(share: Share, step: Step, heads: int, neurons: int) -> int:
    """Bytes that a block's backward pass works with: gradients of its widest tensors."""
    attention = 2 * heads * min(step.sequence_length, ATTENTION_BLOCK)
    elements = max(attention, 2 * neurons) + share.config.embedding_dim
    work = _tokens(share, step) * elements * COMPUTE_BYTES[step.precision]
    return work + (_block_full(share, step, heads, neurons) if _recomputes(share, step) else 0)


def _recomputes(share: Share, step: Step) -> bool:
    return step.recompute and not share.mesh  # a mesh keeps its activations


def _attended(time: int) -> int:
    """Mean number of keys that attention keeps a weight for: a block of queries, all up to its end.
    (Rounded up.)"""
    ends = [*range(ATTENTION_BLOCK, time, ATTENTION_BLOCK), time]
    starts = [0, *ends[:-1]]
    return -(-sum((end - start) * end for start, end in zip(starts, ends, strict=True)) // time)


def _loss_work(share: Share, step: Step) -> int:
    """Bytes that the loss works with: a chunk of logits, and the gradient of its input."""
    vocab = -(-share.config.vocab_size // share.split)
    logits, each = _tokens(share, step) * vocab, DIVIDED_LOGIT_BYTES
    if not share.mesh:
        logits, each = min(logits, max(CHUNK, vocab)), LOGIT_BYTES
    width = 2 * _tokens(share, step) * share.config.embedding_dim * COMPUTE_BYTES[step.precision]
    return logits * each[step.precision] + width


def _tokens(share: Share, step: Step) -> int:
    return share.sequences * step.sequence_length


def split_blocks(num_layers: int, stages: int) -> list[tuple[int, int]]:
    """`(first, last + 1)` block of each stage of a pipeline, as equal as can be. The stages in
    front get what is left over: the last one has the logits.

    Raises:
        UserError: when there are more stages than blocks.
    """
    if stages > num_layers:
        raise UserError(
            f"{num_layers} blocks cannot be divided among {stages} stages. Take at most "
            f"{num_layers}."
        )
    ends = [-(-num_layers * stage // stages) for stage in range(stages + 1)]
    return list(itertools.pairwise(ends))


def pipeline_parts(stages: int) -> int:
    """Parts of a batch in a pipeline: with four for each stage a device idles a fifth of the
    time."""
    return 4 * stages


# Sizes in words

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """`"16GB"` -> 16,000,000,000; `"80 GiB"` -> 85,899,345,920.

    Raises:
        UserError: when it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if unit is None or float(match[1]) * unit < 1:
        raise UserError(
            f"A size is a number and a unit (MB, GB, TB, MiB, GiB, TiB). Received: {text!r}. "
            "Write for example 16GB."
        )
    return int(float(match[1]) * unit)
