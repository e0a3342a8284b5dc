"""In which number format to train: what the processor multiplies fastest."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from tf_gptopt._errors import UserError, suggest
from tf_gptopt._keras import keras
from tf_gptopt.training.config import PRECISIONS

REWRITE = "graph_bfloat16"
_OPTION = "auto_mixed_precision_onednn_bfloat16"  # of TensorFlow's graph optimizer, Grappler


def use_precision(name: str = "auto") -> tuple[str, str]:
    """Compute in `name` from here on, in this process; call it before the model is built.

    ```python
    precision, why = use_precision()
    model = GPTModel.from_preset("tiny")
    ```

    It sets Keras's global dtype policy, and switches the graph-level rewrite on or off with it:

    - "float32", "mixed_bfloat16", "mixed_float16": the Keras policy of that name.
    - "graph_bfloat16": on CPUs. The model is built under the float32 policy, and when TensorFlow
      optimizes a graph it puts casts around matrix products and what lies between them. Weights,
      norms, softmax, the loss and every island of XLA stay float32. On two cores with avx512_bf16 a
      training step was 4 to 7% faster so than under mixed_bfloat16 (2,430 to 2,490 tokens/s against
      2,330; float32 with XLA 1,740), and it is nearer to float32.
    - "auto": what `choose_precision` says, but on CPUs that multiply bfloat16 the rewrite.

    Graphs that exist already follow the switch too, because TensorFlow optimizes them anew.

    Returns:
        The name that "auto" came to (else `name`), and why.

    Raises:
        UserError: for an unknown name, and for "graph_bfloat16" where TensorFlow rewrites nothing:
            on GPUs, TPUs, and CPUs without oneDNN.
    """
    policy, why = choose_precision(name)
    if name == "auto" and policy == "mixed_bfloat16" and rewrites_graphs():
        name, policy = REWRITE, "float32"
        why += "; rewriting the graph is faster there than the Keras policy"
    if name == REWRITE and not rewrites_graphs():
        raise UserError(
            f"TensorFlow rewrites no graph to bfloat16 here: {REWRITE} needs a CPU alone, and "
            "oneDNN (x86, and TF_ENABLE_ONEDNN_OPTS not 0). Use precision='mixed_bfloat16'."
        )
    keras.mixed_precision.set_global_policy(policy)
    _switch(name == REWRITE)
    return (policy if name == "auto" else name), why


def choose_precision(name: str = "auto") -> tuple[str, str]:
    """A Keras dtype policy, and why it was chosen; nothing is set.

    ```python
    policy, why = choose_precision()
    keras.mixed_precision.set_global_policy(policy)      # before the model is built
    ```

    `use_precision` sets it, and knows one way more on CPUs, which is no policy.

    Args:
        name: "auto", or a policy, which is then taken as it is: "float32", "mixed_bfloat16",
            "mixed_float16". "graph_bfloat16" is built under "float32".

    "auto" takes bfloat16 on TPUs, on GPUs from compute capability 8.0 and on CPUs that multiply it
    (avx512_bf16, amx_bf16); float16, with Keras's loss scaling, on GPUs of 7.x; else float32. A CPU
    without bfloat16 units converts back and forth and is slower than in float32.

    Raises:
        UserError: for an unknown name.
    """
    if name not in PRECISIONS:
        raise UserError(f"Unknown precision {name!r}.{suggest(str(name), PRECISIONS)}")
    best, why = _fastest()
    if name in ("auto", best):
        return best, why
    if name == REWRITE and best == "mixed_bfloat16":
        return policy_of(name), f"as asked: {why}"
    return policy_of(name), f"as asked; {best} would be faster: {why}"


def policy_of(precision: str) -> str:
    """The Keras policy that a model for `precision`, a name other than "auto", is built under."""
    return "float32" if precision == REWRITE else precision


@contextlib.contextmanager
def rewriting(precision: str) -> Iterator[None]:
    """Inside the block graphs are rewritten if `precision` is "graph_bfloat16", and not if it is
    another one; "auto" leaves the switch as it is."""
    before = _is_on()
    _switch(before if precision == "auto" else precision == REWRITE)
    try:
        yield
    finally:
        _switch(before)


def compute_dtype(model: keras.Model) -> str:
    """In what the products of `model` are computed now: "float32", "bfloat16" or "float16"."""
    policies = model_policies(model)
    mixed = sorted(policies - {"float32"})
    if mixed:
        return mixed[0].removeprefix("mixed_")
    return "bfloat16" if _is_on() else "float32"


def model_policies(model: keras.Model) -> set[str]:
    """Names of the dtype policies of `model`'s Dense layers (of all layers where there are none).

    Wrappers of quantization and an untied head are float32 in every model, and do not count.
    """
    layers = list(model._flatten_layers())
    dense = [layer for layer in layers if isinstance(layer, keras.layers.Dense)]
    inner = [layer for layer in dense if layer.name != "token_logits"]
    return {layer.dtype_policy.name for layer in inner or layers}


@functools.cache
def rewrites_graphs() -> bool:
    """Whether the graph-level rewrite does anything here, tried on one small product."""
    if tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU"):
        return False
    fine = 1.0 + 2.0**-12  # bfloat16 has 8 bits: there it is 1

    @tf.function
    def product(x: tf.Tensor) -> tf.Tensor:
        return tf.nn.relu(tf.matmul(x + 0.0, tf.transpose(x))) * 2.0

    with rewriting(REWRITE):
        return float(product(tf.fill([8, 8], fine))[0, 0]) == 16.0


def _is_on() -> bool:
    return bool(tf.config.optimizer.get_experimental_options().get(_OPTION, False))


def _switch(on: bool) -> None:
    if on != _is_on():
        tf.config.optimizer.set_experimental_options({_OPTION: on})


def _fastest() -> tuple[str, str]:
    if tf.config.list_physical_devices("TPU"):
        return "mixed_bfloat16", "TPUs multiply bfloat16"
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        capability = min(detail.get("compute_capability") or (0, 0) for detail in details)
        number = ".".join(map(str, capability))
        if capability >= (8, 0):
            return "mixed_bfloat16", f"GPU with compute capability {number}: bfloat16 tensor cores"
        if capability >= (7, 0):
            return "mixed_float16", f"GPU with compute capability {number}: float16 tensor cores"
        return "float32", f"GPU with compute capability {number}: no tensor cores"
    units = cpu_flags() & {"amx_bf16", "avx512_bf16"}
    if units:
        return "mixed_bfloat16", f"this CPU multiplies bfloat16 ({', '.join(sorted(units))})"
    return "float32", "this CPU has no bfloat16 units"


def cpu_flags() -> set[str]:
    """What the kernel says the CPU can do ("avx512_bf16", ...); empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.partition(":")[2].split())
