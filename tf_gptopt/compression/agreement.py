"""Workers of a cluster go on with the same numbers."""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def agree(strategy: tf.distribute.Strategy, values: list[np.ndarray]) -> list[np.ndarray]:
    """`values` of the first worker, on all workers: two processors may differ in the last bit."""
    if not strategy.extended._in_multi_worker_mode():
        return values

    def first(values: list[tf.Tensor]) -> list[tf.Tensor]:
        replica = tf.distribute.get_replica_context()
        is_first = replica.replica_id_in_sync_group == 0
        mine = [tf.where(is_first, value, tf.zeros_like(value)) for value in values]
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, mine)

    tensors = [tf.convert_to_tensor(value) for value in values]
    agreed = tf.function(lambda x: strategy.run(first, (x,)), autograph=False)(tensors)
    return [strategy.experimental_local_results(value)[0].numpy() for value in agreed]
