"""Which way of training fits into the memory of given devices, and why. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tf_gptopt._errors import UserError
from tf_gptopt._files import read_json
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.training.memory import (
    MARGIN,
    Memory,
    Share,
    Step,
    pipeline_parts,
    split_blocks,
    step_memory,
)

LARGEST = 1 << 20  # sequences: no batch is larger


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way to spread a training step over devices.

    Attributes:
        name: for people.
        option: of `tf-gptopt train`; empty where nothing needs to be said.
        unit: the batch is a multiple of this.
        shares: what each kind of device has of a step.
    """

    name: str
    option: str
    unit: int
    shares: Callable[[Step], list[Share]]


@dataclasses.dataclass(frozen=True)
class Row:
    """What a scheme needs.

    Attributes:
        scheme, option: as `Scheme`.
        memory: of the device that needs most.
        fits: with the margin of the estimate, in one device's memory.
        largest_batch: sequences an update that would fit; 0 when not even the smallest does.
    """

    scheme: str
    option: str
    memory: Memory
    fits: bool
    largest_batch: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """All schemes for one model, one step and some devices.

    Attributes:
        recommended: the scheme to take; None when nothing fits.
        command: that trains so; empty when nothing fits.
        why: the reason, or what would help.
    """

    rows: tuple[Row, ...]
    step: Step
    devices: int
    device_memory: int
    recommended: str | None
    command: str
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def plan(config: GPTConfig, step: Step, devices: int, device_memory: int) -> Plan:
    """Hold every scheme against the memory of one device, in bytes.

    Raises:
        UserError: for fewer devices than one, and sequences longer than the model's context.
    """
    if devices < 1:
        raise UserError(f"devices must be 1 or more. Received: {devices}.")
    if step.sequence_length > config.max_sequence_length:
        raise UserError(
            f"The model's context is {config.max_sequence_length} tokens. Received: "
            f"sequence_length={step.sequence_length}. Lower it."
        )
    rows = tuple(_row(scheme, step, device_memory) for scheme in schemes(config, devices))
    best, changed = _recommend(config, step, devices, device_memory)
    if best is None:
        need = min(_worst(scheme, changed).total for scheme in schemes(config, devices))
        why = (
            f"Nothing fits: {_words(changed, step)} a device still needs {human(need)} and "
            f"{MARGIN:.0%} in reserve. Take more devices, devices with "
            f"{human(int(need * (1 + MARGIN)))} or more, a shorter sequence or a smaller model."
        )
        return Plan(rows, step, devices, device_memory, None, "", why)
    options = [*_shape(config), best.option, *_options(changed)]
    options.append(f"--fit.batch_size {step.batch_size}")
    why = _why(best, rows, devices)
    if changed != step:
        why = f"As asked, nothing fits; {_words(changed, step)} this does. {why}"
    command = " ".join(filter(None, ["tf-gptopt train --dataset DATASET --out OUT", *options]))
    return Plan(rows, step, devices, device_memory, best.name, command, why)


def schemes(config: GPTConfig, devices: int) -> Iterator[Scheme]:
    """All ways to use the devices, the simplest first."""

    def replicated(batch: int, model: int, mesh: bool = True) -> Callable[[Step], list[Share]]:
        def shares(step: Step) -> list[Share]:
            sequences = _up(step.batch_size, batch * step.accumulate)
            return [
                Share(
                    config,
                    sequences,
                    split=model,
                    replicas=batch,
                    passes=step.accumulate,
                    mesh=mesh,
                )
            ]

        return shares

    def staged(step: Step) -> list[Share]:
        batch = _up(step.batch_size, step.accumulate)
        parts = min(batch, pipeline_parts(devices))
        return [
            Share(
                config,
                _up(batch, parts),
                blocks,
                passes=parts * step.accumulate,
                in_flight=min(devices - stage, parts),
            )
            for stage, blocks in enumerate(split_blocks(config.num_layers, devices))
        ]

    yield Scheme("one device", "", 1, replicated(1, 1, mesh=False))
    if devices == 1:
        return
    yield Scheme(f"data parallel over {devices}", "", devices, replicated(devices, 1, mesh=False))
    for model in range(1, min(devices, *config.block_heads) + 1):
        if devices % model == 0:
            batch = devices // model
            name, option = f"mesh {batch} x {model}", f"--fit.mesh batch={batch},model={model}"
            yield Scheme(name, option, batch, replicated(batch, model))
    if devices <= config.num_layers:
        yield Scheme(f"pipeline of {devices}", f"--fit.pipeline {devices}", 1, staged)


def _row(scheme: Scheme, step: Step, device_memory: int) -> Row:
    memory = _worst(scheme, step)
    fits = _fits(memory, device_memory)
    return Row(
        scheme.name, scheme.option, memory, fits, _largest_batch(scheme, step, device_memory)
    )


def _worst(scheme: Scheme, step: Step) -> Memory:
    """Of the device that needs most."""
    memories = [step_memory(share, step) for share in scheme.shares(step)]
    return max(memories, key=lambda memory: memory.total)


def _fits(memory: Memory, device_memory: int) -> bool:
    return memory.total * (1 + MARGIN) <= device_memory


def _largest_batch(scheme: Scheme, step: Step, device_memory: int) -> int:
    unit = scheme.unit * step.accumulate

    def fits(units: int) -> bool:
        larger = dataclasses.replace(step, batch_size=units * unit)
        return _fits(_worst(scheme, larger), device_memory)

    low, high = 0, 1
    while fits(high) and high * unit < LARGEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def _recommend(
    config: GPTConfig, step: Step, devices: int, device_memory: int
) -> tuple[Scheme | None, Step]:
    """The first scheme that fits, at the least that has to change; and the step then."""
    for changed in _cheaper(step):
        for scheme in schemes(config, devices):
            if devices > 1 and scheme.name == "one device":
                continue
            if changed.recompute and scheme.name.startswith("mesh"):
                continue  # it does not recompute
            if _fits(_worst(scheme, changed), device_memory):
                return scheme, changed
    return None, changed


def _cheaper(step: Step) -> Iterator[Step]:
    """The step as asked, then in ways that take ever less memory."""
    yield step
    parts = [n for n in (2, 4, 8, 16, 32, 64, 128) if step.batch_size % (n * step.accumulate) == 0]
    accumulated = [dataclasses.replace(step, accumulate=n * step.accumulate) for n in parts]
    yield from accumulated
    if not step.recompute:
        for each in (step, *accumulated):
            yield dataclasses.replace(each, recompute=True)


def _why(best: Scheme, rows: tuple[Row, ...], devices: int) -> str:
    if devices == 1:
        return "One device is enough."
    if best.name.startswith("data"):
        return (
            "Every device holds the whole model, so data parallelism is the fastest: gradients are "
            "summed once an update, and nothing else travels. choose_strategy takes it by itself."
        )
    refused = "A device cannot hold the whole model with its gradients and moments"
    if best.name.startswith("mesh") and best.name.endswith("x 1"):
        return f"{refused}; a mesh of rows divides weights and moments and copies them for a step."
    if best.name.startswith("mesh"):
        return f"{refused}; a mesh divides every matrix, for two sums over its columns a block."
    return f"{refused}, and no mesh fits either; a pipeline divides the blocks."


def _shape(config: GPTConfig) -> list[str]:
    """A model's shape as options, as far as they can say it: all blocks alike."""
    if len(set(config.block_heads)) > 1 or len(set(config.block_intermediate_dims)) > 1:
        return []
    fields = ["embedding_dim", "num_layers", "num_heads"]
    if config.intermediate_dim != 4 * config.embedding_dim:
        fields.append("intermediate_dim")
    return [f"--model.{field} {getattr(config, field)}" for field in fields]


def _options(changed: Step) -> list[str]:
    options = []
    if changed.precision != "float32":
        options.append(f"--fit.precision {changed.precision}")
    if changed.accumulate > 1:
        options.append(f"--fit.accumulate {changed.accumulate}")
    if changed.recompute:
        options.append("--fit.recompute true")
    return options


def _words(changed: Step, asked: Step) -> str:
    words = []
    if changed.accumulate != asked.accumulate:
        words.append(f"{changed.accumulate} microbatches an update (accumulate)")
    if changed.recompute and not asked.recompute:
        words.append("recomputed activations (recompute)")
    return "with " + " and ".join(words) if words else "as asked"


def _up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def folder_shape(folder: str | os.PathLike) -> GPTConfig:
    """The shape of the model in a folder, ours or a Hugging Face GPT-2 checkpoint.

    Raises:
        UserError: when the folder has no readable config.json.
    """
    config = read_json(Path(folder) / "config.json")
    if isinstance(config, dict) and isinstance(config.get("gpt"), dict):
        return GPTConfig.from_dict(config["gpt"])
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{folder}/config.json describes no GPT. Name a folder with a model.")
    from tf_gptopt.models.huggingface import shape_of

    return shape_of(config)


def human(count: int) -> str:
    """12,345,678,901 -> `12.3 GB` (decimal units)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
