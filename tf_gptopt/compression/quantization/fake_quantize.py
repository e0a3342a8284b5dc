"""Weights on their grid in TensorFlow: the arithmetic of `grids.py`, with gradients.

A weight `w` of a group with scale `s` is used as `clip(round(w / s)) * s`. Its gradient passes as
if nothing had happened (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432), but is
zero where the weight was clipped: moving it would change nothing.

The scale of a group is `clip * reach`. Its reach is what its largest weight needs now, so that the
grid follows the weights; `clip` is 1 for a min-max range and less for one that cuts the largest
weights off. With learned ranges the reach stays what it was at the start and `clip` is trained, by
the gradient of LSQ (Esser et al. 2019, "Learned Step Size Quantization", arXiv:1902.08153).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt.compression.quantization.grids import (
    LEAST_CLIP,
    LIMITS,
    SMALLEST,
    SMALLEST_HALF,
    find_grid,
    find_reach,
    find_scales,
    grouped_view,
)
from tf_gptopt.models.custom_gradients import custom_gradient
from tf_gptopt.models.fused import xla

_LARGEST_HALF = 65504.0
COMPILED_FROM = 1 << 16  # numbers


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which weights of a matrix share a scale.

    Args:
        channel_axis: 1 for a Dense kernel `(in, out)`, 0 for a token table `(vocab, width)`: the
            axis with the rows of `grids.py`.
        group: as `QuantConfig.group_of` says. Blocks are int4's: while such a weight has 8 bits,
            all blocks of a row share one scale.
    """

    channel_axis: int
    group: str | int

    @property
    def is_block(self) -> bool:
        return isinstance(self.group, int)

    @property
    def is_whole(self) -> bool:
        return self.group in ("tensor", "global")

    def view(self, shape: Any) -> tuple[int, int, int]:
        """The matrix seen so that the weights of a group lie along `axis`; nothing moves."""
        a, b = shape
        if self.is_whole:
            return 1, 1, a * b
        size = self.group if self.is_block else shape[1 - self.channel_axis]
        return (a, b // size, size) if self.channel_axis == 0 else (a // size, size, b)

    @property
    def axis(self) -> int:
        return 2 if self.channel_axis == 0 or self.is_whole else 1

    @property
    def block_axis(self) -> int:
        """Along which the blocks of a row lie."""
        return 1 if self.channel_axis == 0 else 0

    def groups(self, shape: Any) -> tuple[int, int, int]:
        """The shape of the scales, in this view."""
        a, b, c = self.view(shape)
        return (a, b, 1) if self.axis == 2 else (a, 1, c)

    def group_at(self, bits: int) -> str | int:
        """What `grids.py` calls the groups."""
        return "channel" if bits == 8 and self.is_block else self.group

    def matrix(self, weights: np.ndarray) -> np.ndarray:
        """`(rows, width)`, as `grids.py` and the file have it."""
        return weights if self.channel_axis == 0 else weights.T


def fake_quantize(
    weights: tf.Tensor,
    bits: tf.Tensor,
    clip: tf.Tensor,
    layout: Layout,
    reach: tf.Tensor | None = None,
    mask: tf.Tensor | None = None,
) -> tf.Tensor:
    """`weights` on their grid, float32.

    Args:
        weights: float32, rank 2.
        bits: float32 scalar, 8 or 4. In a graph it must come from a variable: XLA turns a division
            by a constant into a product, whose last bit differs.
        clip: float32 `(groups,)`, see above; it has a gradient where `reach` is given.
        layout: who shares a scale.
        reach: float32 `(groups,)`, fixed; None takes it from the largest weights.
        mask: bool, of the weights' shape: where it is False result and gradient are zero.
    """

    @custom_gradient
    def on_grid(weights: tf.Tensor, clip: tf.Tensor) -> Any:
        values, scales = run_compiled(_forward, weights, bits, clip, reach, mask, layout)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            learned = reach is not None
            upstream = tf.reshape(upstream, weights.shape)  # a look-up's has no static shape
            return run_compiled(_backward, weights, upstream, scales, bits, mask, layout, learned)

        return values, gradient

    return on_grid(tf.convert_to_tensor(weights), tf.convert_to_tensor(clip))


def run_compiled(function: Any, x: tf.Tensor, *args: Any) -> Any:
    """Compiled into one loop where that pays: in a graph, for a large `x` of known shape. Else
    operation by operation, with the same bits: a loop is compiled anew for every shape, and few
    numbers are done sooner than that."""
    known = x.shape.is_fully_defined() and not tf.executing_eagerly()
    pays = known and x.shape.num_elements() >= COMPILED_FROM
    return (function if pays else function.python_function)(x, *args)


@xla
def _forward(
    weights: tf.Tensor, bits: Any, clip: Any, reach: Any, mask: Any, layout: Layout
) -> tuple[tf.Tensor, tf.Tensor]:
    groups, (low, high) = layout.groups(weights.shape), _limits(bits)
    grouped = _grouped(weights, mask, layout)
    if reach is None:
        reach = tf.maximum(
            tf.maximum(tf.reduce_max(grouped, layout.axis, keepdims=True), 0.0) / high,
            tf.maximum(-tf.reduce_min(grouped, layout.axis, keepdims=True), 0.0) / -low,
        )
    else:
        reach = tf.reshape(reach, groups)
    scales = reach * tf.maximum(tf.reshape(clip, groups), LEAST_CLIP)
    kept = _leading_bits(scales)
    if layout.is_block:
        widest = _leading_bits(tf.reduce_max(scales, layout.block_axis, keepdims=True))
        kept = tf.where(bits == 8.0, widest, _half(scales))
    integers = tf.clip_by_value(tf.round(grouped / kept), low, high)
    return tf.reshape(integers * kept, weights.shape), kept


@xla
def _backward(
    weights: tf.Tensor,
    upstream: tf.Tensor,
    scales: tf.Tensor,
    bits: Any,
    mask: Any,
    layout: Layout,
    learned: bool,
) -> tuple[tf.Tensor, tf.Tensor | None]:
    low, high = _limits(bits)
    steps = _grouped(weights, mask, layout) / scales
    slopes, integers = _grouped(upstream, mask, layout), tf.round(steps)
    inside = (integers >= low) & (integers <= high)
    of_weights = tf.reshape(tf.where(inside, slopes, 0.0), weights.shape)
    if not learned:
        return of_weights, None
    within = (steps > low) & (steps < high)
    error = tf.where(within, integers - steps, tf.clip_by_value(steps, low, high))
    of_scales = tf.reduce_sum(slopes * error, layout.axis, keepdims=True)
    share = tf.cast(slopes.shape[layout.axis], tf.float32)
    if layout.is_block:
        row = tf.zeros_like(of_scales) + tf.reduce_sum(of_scales, layout.block_axis, keepdims=True)
        of_scales = tf.where(bits == 8.0, row, of_scales)
        blocks = tf.cast(slopes.shape[layout.block_axis], tf.float32)
        share *= tf.where(bits == 8.0, blocks, 1.0)
    # LSQ's gradient scale. The trained variable is the scale relative to its start and takes the
    # gradient of the scale itself: an optimizer such as Adam then moves scales by about its
    # learning rate, relatively, as it would move them by that much whatever their size.
    return of_weights, tf.reshape(of_scales * tf.math.rsqrt(share * high), [-1])


def _limits(bits: Any) -> tuple[tf.Tensor, tf.Tensor]:
    (low8, high8), (low4, high4) = LIMITS[8], LIMITS[4]
    return tf.where(bits == 8.0, float(low8), low4), tf.where(bits == 8.0, float(high8), high4)


def _grouped(x: tf.Tensor, mask: Any, layout: Layout) -> tf.Tensor:
    return tf.reshape(x if mask is None else tf.where(mask, x, 0.0), layout.view(x.shape))


def _leading_bits(scales: tf.Tensor) -> tf.Tensor:
    kept = tf.bitwise.bitwise_and(tf.bitcast(scales, tf.int32), ~0x7F)
    kept = tf.bitcast(kept, tf.float32)
    return tf.where(kept < SMALLEST, 1.0, kept)


def _half(scales: tf.Tensor) -> tf.Tensor:
    half = tf.cast(tf.cast(tf.minimum(scales, _LARGEST_HALF), tf.float16), tf.float32)
    return tf.where(half < SMALLEST_HALF, 1.0, half)


# Where a range starts


def start_ranges(
    weights: np.ndarray,
    bits: int,
    layout: Layout,
    range: str = "minmax",
    percentile: float = 99.9,
    peak: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`(clip, reach)` with which `fake_quantize` begins where `quantize_matrix` ends.

    Weights that lie on a grid already, whoever put them there, begin on that very grid.

    Args:
        weights: as the layer has them, zeros in the place of masked ones.
        bits, layout: as in `fake_quantize`.
        range, percentile, peak: as in `grids.quantize_matrix`.

    Returns:
        float32 `(groups,)` each: `clip` for a reach that follows the weights; and the reach to
        fix, with a clip of 1, for learned ranges.
    """
    matrix, group = layout.matrix(np.asarray(weights, np.float32)), layout.group_at(bits)
    grouped, grid = grouped_view(matrix, group), find_grid(matrix, bits, group)
    if grid is not None:
        scales = grid.scales[:, :, None]
    else:
        scales = find_scales(grouped, bits, group, range, percentile, peak)
    # one in the middle of those that are stored as this one stays it, however clip is rounded
    scales = scales * np.float32(1 if isinstance(group, int) else 1 + 2.0**-18)
    widest = find_reach(grouped, bits)
    clip = np.divide(scales, widest, out=np.ones_like(scales), where=widest >= SMALLEST)
    if grid is None and peak is None and range == "minmax":
        clip, scales = np.ones_like(scales), widest
    shape = (len(matrix), layout.groups(weights.shape)[layout.block_axis])  # (rows, groups)
    return tuple(_in_view(x[:, :, 0], shape, layout) for x in (clip, scales))


def _in_view(values: np.ndarray, shape: tuple[int, int], layout: Layout) -> np.ndarray:
    if layout.is_whole:
        return values.reshape(-1)
    values = np.broadcast_to(values, shape)  # with 8 bits, a row's blocks have the row's
    return (values if layout.channel_axis == 0 else values.T).reshape(-1)
