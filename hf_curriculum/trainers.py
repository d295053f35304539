"""The composition of methods and Trainer classes, nothing else."""

from transformers import Trainer
from trl import SFTTrainer

from .curriculum.mixin import CurriculumMixin
from .distillation.mixin import DistillationMixin
from .multitask.mixin import MultiTaskMixin


__all__ = [
    "CurriculumSFTTrainer",
    "CurriculumTrainer",
    "KDSFTTrainer",
    "KDTrainer",
    "MultiTaskSFTTrainer",
    "MultiTaskTrainer",
]


class CurriculumTrainer(DistillationMixin, CurriculumMixin, Trainer):
    """
    [`~transformers.Trainer`] with a curriculum, for tokenised data sets: causal language models and classifiers.

    Takes the arguments of [`~transformers.Trainer`], `curriculum`, and `distillation` against forgetting. See
    [`~hf_curriculum.curriculum.mixin.CurriculumMixin`] and [`~hf_curriculum.distillation.mixin.DistillationMixin`].
    """


class CurriculumSFTTrainer(DistillationMixin, CurriculumMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] with a curriculum.

    Takes the arguments of [`~trl.SFTTrainer`], `curriculum`, and `distillation` against forgetting. See
    [`~hf_curriculum.curriculum.mixin.CurriculumMixin`] and [`~hf_curriculum.distillation.mixin.DistillationMixin`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl import SFTConfig
    >>> from hf_curriculum import CurriculumConfig, CurriculumSFTTrainer, DistillationConfig

    >>> trainer = CurriculumSFTTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=SFTConfig(output_dir="out"),
    ...     train_dataset=Dataset.from_list([{"prompt": "2+2=", "completion": "4"}] * 64),
    ...     curriculum=CurriculumConfig(num_levels=3),
    ...     distillation=DistillationConfig(teacher="previous_stage"),
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """


class KDTrainer(DistillationMixin, Trainer):
    """
    [`~transformers.Trainer`] with a teacher, for tokenised data sets.

    For causal language models, classifiers of sequences and tokens, and sequence-to-sequence models. Takes the
    arguments of [`~transformers.Trainer`], and `distillation`, which is required. See
    [`~hf_curriculum.distillation.mixin.DistillationMixin`].
    """

    requires_teacher = True


class KDSFTTrainer(DistillationMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] with a teacher.

    Takes the arguments of [`~trl.SFTTrainer`], and `distillation`, which is required. See
    [`~hf_curriculum.distillation.mixin.DistillationMixin`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl import SFTConfig
    >>> from hf_curriculum import DistillationConfig, KDSFTTrainer

    >>> trainer = KDSFTTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=SFTConfig(output_dir="out"),
    ...     train_dataset=Dataset.from_list([{"prompt": "2+2=", "completion": "4"}] * 64),
    ...     distillation=DistillationConfig(alpha=0.5, temperature=2.0, teacher="Qwen/Qwen3-1.7B"),
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    requires_teacher = True


class MultiTaskTrainer(MultiTaskMixin, Trainer):
    """
    [`~transformers.Trainer`] for rows of several tasks: language models, classifiers and task heads.

    Takes the arguments of [`~transformers.Trainer`] and `multitask`. See
    [`~hf_curriculum.multitask.mixin.MultiTaskMixin`].
    """


class MultiTaskSFTTrainer(MultiTaskMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] for rows of several tasks, padded, packed or padding-free.

    Takes the arguments of [`~trl.SFTTrainer`] and `multitask`. See
    [`~hf_curriculum.multitask.mixin.MultiTaskMixin`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl import SFTConfig
    >>> from hf_curriculum import CGCLoraConfig, MultiTaskSFTTrainer

    >>> rows = [
    ...     {"prompt": "2+2=", "completion": "4", "task": "sum"},
    ...     {"prompt": "cab", "completion": "abc", "task": "sort"},
    ... ]
    >>> trainer = MultiTaskSFTTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=SFTConfig(output_dir="out"),
    ...     train_dataset=Dataset.from_list(rows * 32),
    ...     peft_config=CGCLoraConfig(task_names=["sum", "sort"], task_type="CAUSAL_LM"),
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """
