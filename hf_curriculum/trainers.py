"""The composition of methods and Trainer classes, nothing else."""

from transformers import Trainer
from trl import SFTTrainer

from .curriculum.mixin import CurriculumMixin


__all__ = ["CurriculumSFTTrainer", "CurriculumTrainer"]


class CurriculumTrainer(CurriculumMixin, Trainer):
    """
    [`~transformers.Trainer`] with a curriculum, for tokenised data sets: causal language models and classifiers.

    Takes the arguments of [`~transformers.Trainer`] and `curriculum`. See
    [`~hf_curriculum.curriculum.mixin.CurriculumMixin`].
    """


class CurriculumSFTTrainer(CurriculumMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] with a curriculum.

    Takes the arguments of [`~trl.SFTTrainer`] and `curriculum`. See
    [`~hf_curriculum.curriculum.mixin.CurriculumMixin`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl import SFTConfig
    >>> from hf_curriculum import CurriculumConfig, CurriculumSFTTrainer

    >>> trainer = CurriculumSFTTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=SFTConfig(output_dir="out"),
    ...     train_dataset=Dataset.from_list([{"prompt": "2+2=", "completion": "4"}] * 64),
    ...     curriculum=CurriculumConfig(num_levels=3),
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """
