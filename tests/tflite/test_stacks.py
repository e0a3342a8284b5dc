"""One array for the keys and values of all blocks, each where LiteRT can read it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.buckets import ALIGNMENT
from tf_gptopt.tflite.litert import aligned_zeros
from tf_gptopt.tflite.stacks import plan_stacks


@given(
    heads=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    head_dim=st.integers(1, 70),
    n=st.integers(1, 40),
    dtype=st.sampled_from(["float32", "int8"]),
)
def test_every_part_is_aligned_and_nobody_elses(heads, head_dim, n, dtype):
    config = GPTConfig(
        vocab_size=8,
        embedding_dim=16,
        num_layers=len(heads),
        num_heads=tuple(heads),
        head_dim=head_dim,
        max_sequence_length=64,
    )
    values, scales = plan_stacks(config, dtype, scales=True)
    for stack, kind, tail in ((values, "", (head_dim,)), (scales, "scale_", ())):
        whole = aligned_zeros(stack.shape(n), stack.dtype)
        parts = stack.parts(whole)
        assert list(parts) == [f"{k}_{kind}{i}" for i in range(len(heads)) for k in "kv"]
        for number, (name, part) in enumerate(parts.items(), 1):
            assert part.shape == (heads[int(name.rpartition("_")[2])], n, *tail)
            assert part.ctypes.data % ALIGNMENT == 0
            assert not part.any()
            part[:] = number
        assert np.count_nonzero(whole) == sum(part.size for part in parts.values())
