"""In which number format to train: what the processor multiplies fastest."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf

from tf_gptopt._errors import UserError, suggest
from tf_gptopt.training.config import PRECISIONS


def choose_precision(name: str = "auto") -> tuple[str, str]:
    """A Keras dtype policy, and why it was chosen.

    ```python
    policy, why = choose_precision()
    keras.mixed_precision.set_global_policy(policy)      # before the model is built
    ```

    Args:
        name: "auto", or a policy, which is then taken as it is: "float32", "mixed_bfloat16",
            "mixed_float16".

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
    return name, f"as asked; {best} would be faster: {why}"


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
