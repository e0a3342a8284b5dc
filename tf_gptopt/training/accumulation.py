"""What happens between a gradient and an update, under every strategy of tf.distribute.

Microbatches are accumulated, replicas are summed, what is not finite is dropped, what is too long
is clipped, and the noise is measured. `AccumulatingOptimizer` does this for any optimizer of Keras,
so that it holds in anybody's `compile` and `fit`; `optimizer.py` has the one that is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.training import noise_scale
from tf_gptopt.training.gradient_weight import GradientWeight

# Each replica writes its own; a checkpoint holds their sum
_EACH_REPLICA = {
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.SUM,
}


class AccumulatingOptimizer(keras.optimizers.Optimizer):
    """A mixin, named before an optimizer of Keras: `class AdamW(AccumulatingOptimizer, ...)`.

    - Of `accumulate` calls of `apply_gradients` (microbatches: steps of `fit`) the last one updates
      with the mean of the gradients, each weighted by its labels where the loss tells how many
      there were (`weigh`), so that the update is that of one batch with all of them. Each replica
      adds up its own; they are summed over replicas once an update. Clipping, `iterations`,
      schedules and variable constraints (pruning masks) see updates, not microbatches.
    - What is left over at the end of a Keras `fit` makes an update of its own (`flush`).
    - Where the norm of that gradient, or a loss given to `minimize`, is NaN or infinite, the whole
      update is skipped on all replicas alike and counted; weights, moments, masks and `iterations`
      stay. Keras's `LossScaleOptimizer` around it leaves this decision here, and its scale moves
      once an update.
    - With `measure_noise` it estimates the gradient noise scale from microbatches and replicas, and
      with `max_accumulate` above `accumulate` it lets the batch grow to it: see `noise_scale.py`.

    Args:
        accumulate: microbatches an update.
        max_accumulate: the most microbatches an update may grow to by doubling; None never grows.
        measure_noise: keep `noise_scale`; growing needs it and turns it on.
        *args, **kwargs: of the optimizer of Keras.

    Attributes (scalar int64 variables, in every checkpoint):
        iterations: updates done.
        skipped: updates skipped.
        skipped_in_a_row: those since the last one that was done.
        last_skipped: which update (from 1, skipped ones counted) was skipped last; 0: none.
        microbatches_per_update: `accumulate`, or what it has grown to.

    Raises:
        UserError: when `accumulate` or `max_accumulate` is out of its range.
    """

    def __init__(
        self,
        *args: Any,
        accumulate: int = 1,
        max_accumulate: int | None = None,
        measure_noise: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        most = accumulate if max_accumulate is None else max_accumulate
        if accumulate < 1 or most < accumulate:
            raise UserError(
                "accumulate counts microbatches from 1, and max_accumulate is not below it. "
                f"Received: {accumulate=}, {max_accumulate=}."
            )
        self.accumulate, self.max_accumulate = accumulate, most
        self.measure_noise = measure_noise or most > accumulate
        self._accumulators: list[tf.Variable] = []
        self._scalars: list[tf.Variable] = []
        self.skipped = self._scalar("skipped")
        self.skipped_in_a_row = self._scalar("skipped_in_a_row")
        self.last_skipped = self._scalar("last_skipped")
        self.microbatches_per_update = self._scalar("microbatches_per_update", accumulate)
        self._microbatch = self._scalar("microbatch")
        self._taken = self._scalar("taken", 0.0)  # labels of the microbatches since the last update
        self._weight = GradientWeight()
        self._update_with_rest: Callable[..., None] | None = None  # of what was taken in so far
        if self.measure_noise:
            self._signal, self._noise = (self._scalar(name, 0.0) for name in ("signal", "noise"))
            self._squares = self._scalar("squares", 0.0, **_EACH_REPLICA)

    def build(self, var_list: Iterable[tf.Variable]) -> None:
        var_list, built = list(var_list), getattr(self, "_built", False)
        super().build(var_list)
        scale = self._lookup_dependency("loss_scale")  # of a LossScaleOptimizer around this one
        if scale is not None:
            scale.update = lambda gradients: (None, True)  # `_update` asks and moves it instead
        if built:
            return
        if self.max_accumulate > 1:
            with tf.init_scope():
                self._accumulators = [self._accumulator(variable) for variable in var_list]
        self._variables += [*self._scalars, *self._accumulators]

    # Between a gradient and an update

    def compute_gradients(
        self, loss: Any, var_list: Any, tape: tf.GradientTape | None = None
    ) -> list[tuple[Any, tf.Variable]]:
        pairs = super().compute_gradients(loss, var_list, tape)
        if callable(loss):
            return pairs
        # a loss can be NaN and its gradient finite: one element of NaN tells all replicas
        sound = tf.reduce_all(tf.math.is_finite(loss))
        sizes = [
            variable.shape.num_elements() if isinstance(gradient, tf.Tensor) else float("inf")
            for gradient, variable in pairs
        ]
        smallest = sizes.index(min(sizes))
        gradient, variable = pairs[smallest]
        if isinstance(gradient, tf.Tensor):
            nan = tf.constant(float("nan"), gradient.dtype)
            pairs[smallest] = tf.where(sound, gradient, nan), variable
        return pairs

    def weigh(self, tokens: tf.Tensor) -> None:
        """Say what the next gradient of this replica counts, against those of other microbatches.

        `fit` does so for models of this package; in a training loop of your own, call it between
        the loss and `apply_gradients`, in the same graph.

        Args:
            tokens: float32 scalar, the labels of all replicas that the loss is a mean over.
        """
        self._weight.say(tokens)

    def flush(self) -> None:
        """Update with the microbatches since the last update, if there are any. Keras's `fit` calls
        it at its end, outside of replicas."""
        if self._update_with_rest is None or not int(self._microbatch.numpy()):
            return
        strategy = self._distribution_strategy
        on_replica = partial(_merge, self._update_with_rest, strategy)
        tf.function(lambda: strategy.run(on_replica), autograph=False)()

    def finalize_variable_values(self, var_list: Iterable[tf.Variable]) -> None:
        self.flush()
        super().finalize_variable_values(var_list)

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, tf.Variable]],
        name: str | None = None,
        skip_gradients_aggregation: bool = False,
        **kwargs: Any,
    ) -> tf.Variable:
        """Take in the gradients of a microbatch; see the class for what follows.

        Args: as Keras's: pairs of gradient and variable; with `skip_gradients_aggregation` the
            gradients are sums over all replicas already.

        Returns:
            `iterations`.
        """
        pairs = list(grads_and_vars)
        if self._mesh or self._run_with_dtensor:  # DTensor sums by itself, and has no replicas
            if self.max_accumulate > 1:
                raise UserError("accumulate is not for DTensor; take accumulate=1 with a mesh.")
            return super().apply_gradients(pairs, name=name)
        reduced = skip_gradients_aggregation or not kwargs.get(
            "experimental_aggregate_gradients", True
        )
        missing = [variable.name for gradient, variable in pairs if gradient is None]
        if missing:
            tf.get_logger().warning("No gradient reaches %s.", ", ".join(missing))
        pairs = [pair for pair in pairs if pair[0] is not None]
        if not pairs:
            raise UserError("No gradient reaches any variable: the loss depends on none of them.")
        gradients = [tf.convert_to_tensor(gradient) for gradient, _ in pairs]
        variables = [variable for _, variable in pairs]
        weight = self._weight.take()
        with tf.name_scope(name or self.name):
            with tf.init_scope():
                self.build(variables)
            # `merge_call` is forbidden in a branch of a replica, so all branches are of the whole
            take = partial(self._take, variables, reduced)
            _merge(take, self._distribution_strategy, gradients, weight)
        return self.iterations

    def _take(
        self,
        variables: list[tf.Variable],
        reduced: bool,
        strategy: tf.distribute.Strategy,
        gradients: Any,
        weight: Any,
    ) -> None:
        """A microbatch: the gradients of all replicas, each still apart unless `reduced`."""
        if self.max_accumulate == 1:
            self._update(strategy, gradients, variables, reduced)
            return
        self._update_with_rest = partial(self._update_with_taken, variables, reduced, False)

        def add(gradients: list[tf.Tensor], weight: tf.Tensor | None) -> None:
            if weight is not None:
                gradients = [gradient * tf.cast(weight, gradient.dtype) for gradient in gradients]
            for variable, gradient in zip(variables, gradients, strict=True):
                self._accumulators[self._index_of(variable)].assign_add(gradient)
            if self.measure_noise:
                self._squares.assign_add(tf.square(tf.linalg.global_norm(gradients)))

        _on_each(strategy, add, gradients, weight)
        here = strategy.experimental_local_results(weight)[0]  # the same on all replicas
        self._taken.assign_add(1.0 if here is None else here)
        self._microbatch.assign_add(1)
        full = self._microbatch.read_value() >= self.microbatches_per_update.read_value()
        update = partial(self._update_with_taken, variables, reduced, True, strategy)
        tf.cond(full, update, lambda: None)

    def _update_with_taken(
        self, variables: list, reduced: bool, whole: bool, strategy: tf.distribute.Strategy
    ) -> None:
        """Update with the microbatches that were taken in, and begin anew; `whole` says whether
        they are as many as an update has."""
        accumulators = [self._accumulators[self._index_of(variable)] for variable in variables]

        def read() -> list[tf.Tensor]:
            return [accumulator.read_value() for accumulator in accumulators]

        def clear() -> None:
            for variable in (*accumulators, *([self._squares] if self.measure_noise else [])):
                variable.assign(tf.zeros(variable.shape, variable.dtype))

        weight = self._taken.read_value()
        self._update(strategy, _on_each(strategy, read), variables, reduced, weight, whole)
        _on_each(strategy, clear)
        self._microbatch.assign(0)
        self._taken.assign(0.0)

    def _update(
        self,
        strategy: tf.distribute.Strategy,
        gradients: Any,
        variables: Any,
        reduced: bool,
        weight: tf.Tensor | float = 1.0,
        measure: bool = True,
    ) -> None:
        """Update with the sum of microbatches' gradients, which weigh `weight` together, or skip
        it."""
        count = tf.cast(self.microbatches_per_update.read_value(), tf.float32)
        measure = measure and self.measure_noise
        share = tf.math.divide_no_nan(1.0, weight)

        def reduce(gradients: list[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
            squares = tf.zeros([])
            if measure:
                squares = self._square_of_parts(gradients, reduced) * count * tf.square(share)
            if not reduced and strategy.num_replicas_in_sync > 1:
                pairs = self.aggregate_gradients(zip(gradients, variables, strict=True))
                gradients = [gradient for gradient, _ in pairs]
            norm = tf.linalg.global_norm(gradients)
            return gradients, norm * share, squares

        gradients, norm, squares = _on_each(strategy, reduce, gradients)
        norm_here, squares = (strategy.experimental_local_results(x)[0] for x in (norm, squares))

        def update() -> None:
            def apply(gradients: list[tf.Tensor], norm: tf.Tensor) -> None:
                self._apply(gradients, variables, norm, share)

            _on_each(strategy, apply, gradients, norm)
            self.skipped_in_a_row.assign(0)
            if measure:
                parts = 1 if reduced else strategy.num_replicas_in_sync
                self._measure(squares, tf.square(norm_here), parts, count)

        def skip() -> None:
            self.skipped.assign_add(1)
            self.skipped_in_a_row.assign_add(1)
            self.last_skipped.assign(self.iterations.read_value() + self.skipped.read_value())

        finite = tf.math.is_finite(norm_here)
        loss_scale = self._lookup_dependency("loss_scale")
        if loss_scale is not None:
            type(loss_scale).update(loss_scale, [norm])
        tf.cond(finite, update, skip)

    def _apply(
        self, gradients: list[tf.Tensor], variables: Any, norm: tf.Tensor, share: tf.Tensor
    ) -> None:
        """On one replica: clip what is the same on all of them, update, keep the constraints."""
        factor = share if self.max_accumulate > 1 else None
        if self.global_clipnorm:
            clip = self.global_clipnorm * tf.minimum(1.0 / norm, 1.0 / self.global_clipnorm)
            factor = clip if factor is None else factor * clip
        if factor is not None:
            gradients = [gradient * tf.cast(factor, gradient.dtype) for gradient in gradients]
        if not self.global_clipnorm:
            gradients = self._clip_gradients(gradients)  # one by one, by norm or by value
        self._compute_current_learning_rate()
        self._internal_apply_gradients(list(zip(gradients, variables, strict=True)))
        for variable in variables:
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))

    def forget_microbatches(self) -> None:
        """Begin the next update with the next microbatch. Call it outside of `fit`."""
        for variable in (*self._accumulators, *([self._squares] if self.measure_noise else [])):
            variable.assign(tf.zeros(variable.shape, variable.dtype))
        self._microbatch.assign(0)
        self._taken.assign(0.0)

    # The gradient noise scale

    @property
    def noise_scale(self) -> tf.Tensor:
        """B_simple, smoothed over some twenty updates, in batches that `fit` is given (microbatches
        of all replicas together): float32 scalar, NaN before the first update."""
        return noise_scale.ratio(self._signal.read_value(), self._noise.read_value())

    def _square_of_parts(self, gradients: list[tf.Tensor], reduced: bool) -> tf.Tensor:
        """Sum over microbatches of the mean squared norm of their gradients, on one replica unless
        `reduced`. Called on each replica."""
        replica = tf.distribute.get_replica_context()
        parts = 1 if reduced else replica.num_replicas_in_sync
        if parts * self.accumulate == 1:
            raise UserError(
                "The gradient noise scale compares parts of a batch with the whole, and there is "
                "one part: one microbatch on one replica. Take accumulate=2 or more, or leave "
                "measure_noise and max_accumulate out."
            )
        if self._accumulators:
            squares = self._squares.read_value()
        else:
            squares = tf.square(tf.linalg.global_norm(gradients))
        if not reduced:  # losses are divided by the number of replicas, and gradients with them
            squares = parts * replica.all_reduce(tf.distribute.ReduceOp.SUM, squares)
        return squares

    def _measure(self, small: tf.Tensor, big: tf.Tensor, parts: int, count: tf.Tensor) -> None:
        estimates = noise_scale.estimate(small, big, 1.0 / parts, count)
        for average, value in zip((self._signal, self._noise), estimates, strict=True):
            keep = noise_scale.DECAY
            average.assign(keep * average.read_value() + (1.0 - keep) * value)
        if self.max_accumulate > self.accumulate:
            size = self.microbatches_per_update.read_value()
            larger = noise_scale.grown(size, self.max_accumulate, self.noise_scale)
            due = self.iterations.read_value() % noise_scale.GROW_EVERY == 0
            self.microbatches_per_update.assign(tf.where(due, larger, size))

    # Variables and their places

    def _index_of(self, variable: tf.Variable) -> int:
        return self._index_dict[self._var_key(variable)]

    def _scalar(self, name: str, value: float = 0, **kwargs: Any) -> tf.Variable:
        """A new variable of the optimizer, int64 or float32 as `value`."""
        dtype = tf.int64 if isinstance(value, int) else tf.float32
        with tf.init_scope():
            variable = tf.Variable(value, name=name, dtype=dtype, trainable=False, **kwargs)
        self._scalars.append(variable)
        return variable

    def _accumulator(self, variable: tf.Variable) -> tf.Variable:
        strategy = tf.distribute.get_strategy()
        with strategy.extended.colocate_vars_with(variable):
            return tf.Variable(
                tf.zeros(variable.shape, getattr(variable, "true_dtype", variable.dtype)),
                name=f"accumulator/{variable._shared_name}",
                trainable=False,
                **_EACH_REPLICA,
            )

    def load_own_variables(self, store: Any) -> None:
        # variables of each replica take tensors alone, not the views of a file
        super().load_own_variables({key: store[key][()] for key in store.keys()})  # noqa: SIM118

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "accumulate": self.accumulate,
            "max_accumulate": self.max_accumulate,
            "measure_noise": self.measure_noise,
        }


def _merge(fn: Callable, strategy: tf.distribute.Strategy, *args: Any) -> None:
    """`fn(strategy, *args)` for all replicas together, called on each of them."""
    fn = tf.autograph.experimental.do_not_convert(fn)
    tf.__internal__.distribute.interim.maybe_merge_call(fn, strategy, *args)


def _on_each(strategy: tf.distribute.Strategy, fn: Callable, *args: Any) -> Any:
    """`fn(*args)` on each replica; where there is no way to step out of a replica (XLA on GPUs),
    this is one."""
    if tf.distribute.in_cross_replica_context():
        return strategy.extended.call_for_each_replica(fn, args=args)
    return fn(*args)
