"""tf_gptopt: raw text in, the smallest and fastest GPT that still says the same out.

Names load on first use (PEP 562), so `import tf_gptopt` costs no TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import Any

from tf_gptopt._version import __version__

# Where each public name lives; __init__.pyi says the same to type checkers.
_PUBLIC = {
    "models.config": ["GPTConfig", "PRESETS"],
    "models.gpt": ["GPTModel"],
    "models.checkpoints": ["load_checkpoint", "load_model", "save_model"],
    "models.generation": ["generate"],
    "data.corpus": ["Document", "load_corpus"],
    "_tokenizer": ["Tokenizer"],
    "data.tokenizer": ["train_tokenizer"],
    "data.packing": ["write_dataset"],
    "data.dataset": ["TokenDataset"],
    "training.config": ["TrainConfig"],
    "training.strategy": ["choose_strategy"],
    "training.precision": ["choose_precision", "use_precision"],
    "training.optimizer": ["adamw"],
    "training.loss": ["NextTokenLoss"],
    "training.schedules": ["Plateau"],
    "training.guard": ["NonFiniteGuard"],
    "training.noise_scale": ["GradientNoiseScale"],
    "training.monitoring": ["Monitor"],
    "training.profile": ["Profile"],
    "training.trainer": ["fit"],
    "training.parallel.mesh": ["Mesh"],
    "training.parallel.tensor": ["shard", "unshard"],
    "training.parallel.pipeline": ["pipeline", "unpipeline"],
    "compression.calibration_text": ["calibration_ids"],
    "compression.pruning.config": ["PruneConfig"],
    "compression.pruning.callbacks": ["pruning_callbacks"],
    "compression.pruning.pruner": ["prune", "sparsity", "strip_pruning"],
    "compression.structured.config": ["ShrinkConfig"],
    "compression.structured.shrinking": ["describe_shrink", "shrink"],
    "compression.quantization.config": ["QuantConfig"],
    "compression.quantization.ptq": ["quantize"],
    "compression.quantization.qat": ["quantize_aware", "strip_quantization"],
    "compression.quantization.aware_state": ["final_config"],
    "compression.quantization.bit_schedule": ["BitSchedule"],
    "compression.quantization.adaptive_bits": ["AdaptiveBits"],
    "compression.distillation.config": ["DistillConfig"],
    "compression.distillation.losses": [
        "AttentionMaps",
        "HiddenStates",
        "Relations",
        "SoftLabels",
    ],
    "compression.distillation.distiller": ["Distiller"],
    "compression.distillation.cache": ["CachedTeacher"],
    "compression.distillation.cache_writer": ["cache_logits"],
    "tflite.convert": ["export_tflite"],
    "tflite.inspecting": ["inspect_tflite"],
    "tflite.runtime": ["TFLiteGPT"],
    "evaluation.compare": ["Candidate", "evaluate"],
    "evaluation.sensitivity": ["measure_sensitivity"],
    "evaluation.sensitivity_table": ["Sensitivity"],
    "recipes.recipe": ["Recipe", "load_recipe"],
    "recipes.runner": ["run_recipe"],
    "_errors": ["UserError"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tf_gptopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tf_gptopt.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
