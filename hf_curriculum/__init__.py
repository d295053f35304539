"""
Order, memory, place and sharing for the Hugging Face Trainer.

Public names are loaded when they are first used: `import hf_curriculum` alone imports no torch and no transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .analysis.attention import AttentionFocus
    from .analysis.forgetting import Forgetting
    from .analysis.seesaw import Seesaw
    from .curriculum.config import CurriculumConfig
    from .curriculum.dataset import score_dataset
    from .curriculum.levels import assign_levels
    from .curriculum.mixin import CurriculumMixin
    from .curriculum.plan import CurriculumPlan, build_plan
    from .curriculum.sampler import CurriculumSampler
    from .distillation.config import DistillationConfig
    from .distillation.mixin import DistillationMixin
    from .layerwise.callback import LayerFreezeCallback
    from .layerwise.config import LayerwiseConfig
    from .layerwise.policies import LayerPolicy
    from .multitask.attention_fusion import (
        AttentionFusionConfig,
        AttentionFusionModel,
        cache_features,
        measure_attention,
    )
    from .multitask.cgc_lora import CGCLoraConfig, CGCLoraModel, export_task_adapters
    from .multitask.collator import MultiTaskCollator
    from .multitask.config import MultiTaskConfig
    from .multitask.heads import MultiTaskHeads
    from .multitask.labels import best_thresholds, heads_of_labels
    from .multitask.mixin import MultiTaskMixin
    from .multitask.sampler import MultiTaskSampler
    from .multitask.task_head import TaskHead
    from .multitask.tasks import TaskRegistry
    from .trainers import (
        CurriculumSFTTrainer,
        CurriculumTrainer,
        KDSFTTrainer,
        KDTrainer,
        MultiTaskSFTTrainer,
        MultiTaskTrainer,
    )

__version__ = "0.1.0"

_ROOMS = {
    "AttentionFocus": "analysis.attention",
    "AttentionFusionConfig": "multitask.attention_fusion",
    "AttentionFusionModel": "multitask.attention_fusion",
    "CGCLoraConfig": "multitask.cgc_lora",
    "CGCLoraModel": "multitask.cgc_lora",
    "CurriculumConfig": "curriculum.config",
    "CurriculumMixin": "curriculum.mixin",
    "CurriculumPlan": "curriculum.plan",
    "CurriculumSFTTrainer": "trainers",
    "CurriculumSampler": "curriculum.sampler",
    "CurriculumTrainer": "trainers",
    "DistillationConfig": "distillation.config",
    "DistillationMixin": "distillation.mixin",
    "Forgetting": "analysis.forgetting",
    "KDSFTTrainer": "trainers",
    "KDTrainer": "trainers",
    "LayerFreezeCallback": "layerwise.callback",
    "LayerPolicy": "layerwise.policies",
    "LayerwiseConfig": "layerwise.config",
    "MultiTaskCollator": "multitask.collator",
    "MultiTaskConfig": "multitask.config",
    "MultiTaskHeads": "multitask.heads",
    "MultiTaskMixin": "multitask.mixin",
    "MultiTaskSFTTrainer": "trainers",
    "MultiTaskSampler": "multitask.sampler",
    "MultiTaskTrainer": "trainers",
    "Seesaw": "analysis.seesaw",
    "TaskHead": "multitask.task_head",
    "TaskRegistry": "multitask.tasks",
    "assign_levels": "curriculum.levels",
    "best_thresholds": "multitask.labels",
    "build_plan": "curriculum.plan",
    "cache_features": "multitask.attention_fusion",
    "export_task_adapters": "multitask.cgc_lora",
    "heads_of_labels": "multitask.labels",
    "measure_attention": "multitask.attention_fusion",
    "score_dataset": "curriculum.dataset",
}

__all__ = [
    "AttentionFocus",
    "AttentionFusionConfig",
    "AttentionFusionModel",
    "CGCLoraConfig",
    "CGCLoraModel",
    "CurriculumConfig",
    "CurriculumMixin",
    "CurriculumPlan",
    "CurriculumSFTTrainer",
    "CurriculumSampler",
    "CurriculumTrainer",
    "DistillationConfig",
    "DistillationMixin",
    "Forgetting",
    "KDSFTTrainer",
    "KDTrainer",
    "LayerFreezeCallback",
    "LayerPolicy",
    "LayerwiseConfig",
    "MultiTaskCollator",
    "MultiTaskConfig",
    "MultiTaskHeads",
    "MultiTaskMixin",
    "MultiTaskSFTTrainer",
    "MultiTaskSampler",
    "MultiTaskTrainer",
    "Seesaw",
    "TaskHead",
    "TaskRegistry",
    "__version__",
    "assign_levels",
    "best_thresholds",
    "build_plan",
    "cache_features",
    "export_task_adapters",
    "heads_of_labels",
    "measure_attention",
    "score_dataset",
]


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOMS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
