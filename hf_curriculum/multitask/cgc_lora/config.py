"""What a CGC-LoRA adapter is made of."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from ...core.errors import invalid
from ..tasks import UNKNOWN_TASK_POLICIES, TaskRegistry
from .card import add_loading_section
from .gate import GATE_NORMALIZATIONS, GateLayout


__all__ = ["GATES", "CGCLoraConfig"]

GATES = ("task", "task_embedding", "token")


@dataclass
class CGCLoraConfig(PeftConfig):
    """
    Configuration of a [`CGCLoraModel`].

    Every adapted linear has `num_common_experts` LoRA experts that all tasks share and `num_task_experts` that belong
    to one task each. For task t the update is sum_e g_te (lora_alpha / r) B_e A_e over the experts that t sees, with
    gates g_t that depend on the task alone (`gate="task"`, `"task_embedding"`), so that each task is one plain LoRA of
    rank (num_common_experts + num_task_experts) r. The paper (arXiv 2402.01684) gives no code and its public part no
    numbers; defaults are our choice unless a source is named.

    Args:
        task_names (`list[str]`):
            One name per task, in the order of their ids. See [`TaskRegistry`].
        num_common_experts (`int`, *optional*, defaults to `2`):
            Experts that every task sees, at least 0.
        num_task_experts (`int`, *optional*, defaults to `1`):
            Experts of each task alone, at least 0.
        r (`int`, *optional*, defaults to `4`):
            Rank of one expert, at least 1. The rank that is trained is
            r (num_common_experts + T num_task_experts) for T tasks.
        lora_alpha (`float`, *optional*, defaults to `8`):
            Numerator of the scale lora_alpha / r, above 0. With `gate_normalization="softmax"` it means what it means
            for a plain LoRA of the rank that one task sees.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout on the input of the experts, in [0, 1).
        target_modules (`list[str]` or `str`, *optional*):
            Linear layers to adapt: endings of names, a regular expression, or `"all-linear"`. Left out, the modules
            that PEFT adapts by LoRA in this architecture.
        exclude_modules (`list[str]` or `str`, *optional*):
            Layers to leave out of `target_modules`.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Numbers of the blocks to adapt. All by default.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of blocks, where PEFT does not know it. Only with `layers_to_transform`.
        gate (`str`, *optional*, defaults to `"task"`):
            What the gates are computed from. `"task"`: one logit per layer, task and expert. `"task_embedding"`: a
            vector per layer and task, times a matrix (MOELoRA, arXiv 2310.18339). `"token"`: the layer's input, one
            gate network per task (CGC/PLE, RecSys 2020); does not collapse, so such a model can neither be merged nor
            exported.
        gate_normalization (`str`, *optional*, defaults to `"softmax"`):
            `"softmax"`: gates of a task sum to 1, as in CGC and MOELoRA. At the start each of the V visible experts
            then counts 1 / V, and the scale is that of a plain LoRA of rank V r with the same `lora_alpha`.
            `"sum_to_n"`: gates sum to V, and each expert starts as a plain LoRA of rank r.
        gate_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of the gates, above 0. MTL-LoRA uses 0.1.
        task_embedding_dim (`int`, *optional*):
            Size of a task's vector, with `gate="task_embedding"` only; 64 there by default, as in the code of MOELoRA.
        shared_down_projection (`bool`, *optional*, defaults to `False`):
            One A of rank r for all experts, which then differ in B alone (HydraLoRA, MTL-LoRA). Needs
            `num_task_experts=0`.
        task_matrix (`bool`, *optional*, defaults to `False`):
            A matrix (r, r) per task between A and B, the identity at the start (MTL-LoRA, arXiv 2410.09437). Needs
            `shared_down_projection=True`.
        fan_in_fan_out (`bool`, *optional*, defaults to `False`):
            Kept for configurations written for GPT-2: its `Conv1D` is recognised, and `True` for a layer that stores
            its weight as (out, in) is an error.
        bias (`str`, *optional*, defaults to `"none"`):
            Biases are not trained; `"none"` is the only value.
        modules_to_save (`list[str]`, *optional*):
            Modules to train in full and to save with the adapter, such as a classification head. All tasks share them.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Rows of the embedding to train, as in PEFT's LoRA.
        init_weights (`bool`, *optional*, defaults to `True`):
            A as in `nn.Linear`, B zero, so that the model starts as its base. `False` draws B too, for tests.
        unknown_task (`str`, *optional*, defaults to `"error"`):
            What a task that is not listed, or none, means: `"error"`, `"common"` (the common experts alone, gates from
            the mean of all tasks' logits) or `"uniform"` (the mean of all tasks' updates).

    Raises:
        `ValueError`: for a value out of range or fields that do not go together.

    Example:

    ```python
    >>> from hf_curriculum import CGCLoraConfig

    >>> config = CGCLoraConfig(task_names=["summary", "translation"], num_common_experts=2, num_task_experts=1, r=4)
    >>> config.layout.total_rank
    16
    ```
    """

    task_names: list[str] | None = field(default=None, metadata={"help": "Names of the tasks, in the order of ids."})
    num_common_experts: int = field(default=2, metadata={"help": "LoRA experts that every task sees."})
    num_task_experts: int = field(default=1, metadata={"help": "LoRA experts of each task alone."})
    r: int = field(default=4, metadata={"help": "Rank of one expert."})
    lora_alpha: float = field(default=8, metadata={"help": "Numerator of the scale lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the experts."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    gate: str = field(default="task", metadata={"help": "What gates depend on: task, task_embedding or token."})
    gate_normalization: str = field(default="softmax", metadata={"help": "softmax (sum 1) or sum_to_n."})
    gate_temperature: float = field(default=1.0, metadata={"help": "Divides the logits of the gates."})
    task_embedding_dim: int | None = field(default=None, metadata={"help": "Size of a task's vector (64)."})
    shared_down_projection: bool = field(default=False, metadata={"help": "One A for all experts."})
    task_matrix: bool = field(default=False, metadata={"help": "A matrix (r, r) per task between A and B."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Accepted for Conv1D, which is recognised."})
    bias: str = field(default="none", metadata={"help": "Biases are not trained: none."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding to train."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start as the base model (B = 0)."})
    unknown_task: str = field(default="error", metadata={"help": "Unknown or missing task: error, common, uniform."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType("CGC_LORA")
        if self.task_names is None:
            raise invalid("task_names", None, "a list of at least one name", "Pass `task_names=[...]`.")
        self.task_names = list(self.registry().names)
        self._check_ranges()
        self._check_combinations()
        if self.gate == "task_embedding" and self.task_embedding_dim is None:
            self.task_embedding_dim = 64
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))

    @property
    def layout(self) -> GateLayout:
        """Numbers of tasks, experts and ranks, and what follows from them."""
        return GateLayout(
            num_tasks=len(self.task_names or ()),
            num_common=self.num_common_experts,
            num_own=self.num_task_experts,
            rank=self.r,
        )

    @property
    def collapses(self) -> bool:
        """Whether each task is exactly one plain LoRA, which merging and exporting need."""
        return self.gate != "token" or self.layout.visible == 1

    def registry(self) -> TaskRegistry:
        """The tasks: names, ids and the policy for those that are unknown."""
        return TaskRegistry(self.task_names or (), unknown_task=self.unknown_task)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """
        Writes `adapter_config.json`, and into the folder's `README.md` how to load the adapter.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder. PEFT calls this last when it saves a model, after its own model card.
            **kwargs:
                Passed on to PEFT.
        """
        super().save_pretrained(os.fspath(save_directory), **kwargs)
        add_loading_section(save_directory, self.task_names or ())

    @classmethod
    def plain_lora(cls, task_names: list[str], *, r: int, lora_alpha: float, **kwargs: Any) -> CGCLoraConfig:
        """
        One LoRA that all tasks share: the baseline without any notion of tasks.

        Args:
            task_names (`list[str]`):
                Names of the tasks.
            r (`int`):
                Rank.
            lora_alpha (`float`):
                As in `peft.LoraConfig`.
            **kwargs:
                Other fields.

        Returns:
            [`CGCLoraConfig`]
        """
        return cls(
            task_names=task_names, num_common_experts=1, num_task_experts=0, r=r, lora_alpha=lora_alpha, **kwargs
        )

    @classmethod
    def separate_loras(cls, task_names: list[str], *, r: int, lora_alpha: float, **kwargs: Any) -> CGCLoraConfig:
        """
        One LoRA per task, sharing nothing, trained in one run. Arguments as in [`plain_lora`], `r` per task.

        Returns:
            [`CGCLoraConfig`]
        """
        return cls(
            task_names=task_names, num_common_experts=0, num_task_experts=1, r=r, lora_alpha=lora_alpha, **kwargs
        )

    @classmethod
    def moelora(
        cls, task_names: list[str], *, r: int, lora_alpha: float, num_experts: int = 8, **kwargs: Any
    ) -> CGCLoraConfig:
        """
        MOELoRA (arXiv 2310.18339): all experts common, gates by softmax from a task embedding, scale lora_alpha / r.

        Args:
            task_names (`list[str]`):
                Names of the tasks.
            r (`int`):
                Rank of all experts together, a multiple of `num_experts`. Its authors' script uses 16.
            lora_alpha (`float`):
                Scale times `r`.
            num_experts (`int`, *optional*, defaults to `8`):
                Experts, as in its authors' script.
            **kwargs:
                Other fields.

        Returns:
            [`CGCLoraConfig`]

        Raises:
            `ValueError`: if `r` is no multiple of `num_experts`.
        """
        if num_experts < 1 or r % num_experts != 0:
            raise invalid("r", r, f"a multiple of `num_experts` ({num_experts})")
        return cls(
            task_names=task_names,
            num_common_experts=num_experts,
            num_task_experts=0,
            r=r // num_experts,
            # The layer divides by the rank of one expert, MOELoRA by that of all.
            lora_alpha=lora_alpha / num_experts,
            gate="task_embedding",
            **kwargs,
        )

    @classmethod
    def mtl_lora(
        cls, task_names: list[str], *, r: int, lora_alpha: float, num_experts: int = 3, **kwargs: Any
    ) -> CGCLoraConfig:
        """
        MTL-LoRA (arXiv 2410.09437): one A, a matrix (r, r) per task, several B under gates of temperature 0.1.

        Args:
            task_names (`list[str]`):
                Names of the tasks.
            r (`int`):
                Rank of A.
            lora_alpha (`float`):
                Scale times `r`.
            num_experts (`int`, *optional*, defaults to `3`):
                Number of matrices B, as in its authors' script.
            **kwargs:
                Other fields.

        Returns:
            [`CGCLoraConfig`]
        """
        if num_experts > 1:
            kwargs.setdefault("gate_temperature", 0.1)
        return cls(
            task_names=task_names,
            num_common_experts=num_experts,
            num_task_experts=0,
            r=r,
            lora_alpha=lora_alpha,
            shared_down_projection=True,
            task_matrix=True,
            **kwargs,
        )

    def _check_ranges(self) -> None:
        for name, lowest in (("num_common_experts", 0), ("num_task_experts", 0), ("r", 1), ("task_embedding_dim", 1)):
            value = getattr(self, name)
            if value is None and name == "task_embedding_dim":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise invalid(name, value, f"an integer >= {lowest}")
        if self.num_common_experts + self.num_task_experts == 0:
            raise invalid("num_task_experts", 0, "at least one expert, common or of a task")
        if not 0 < self.lora_alpha < float("inf"):
            raise invalid("lora_alpha", self.lora_alpha, "a float > 0")
        if not 0 < self.gate_temperature < float("inf"):
            raise invalid("gate_temperature", self.gate_temperature, "a float > 0")
        if not 0 <= self.lora_dropout < 1:
            raise invalid("lora_dropout", self.lora_dropout, "a float in [0, 1)")
        choices = {
            "gate": GATES,
            "gate_normalization": GATE_NORMALIZATIONS,
            "unknown_task": UNKNOWN_TASK_POLICIES,
            "bias": ("none",),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise invalid(name, getattr(self, name), f"one of {allowed}")

    def _check_combinations(self) -> None:
        if self.task_embedding_dim is not None and self.gate != "task_embedding":
            raise invalid("task_embedding_dim", self.task_embedding_dim, "None unless `gate='task_embedding'`")
        if self.shared_down_projection and self.num_task_experts != 0:
            raise invalid(
                "shared_down_projection", True, "False with task-specific experts", "Set `num_task_experts=0`."
            )
        if self.task_matrix and not self.shared_down_projection:
            raise invalid("task_matrix", True, "False without `shared_down_projection=True`")
        if self.unknown_task == "common" and self.num_common_experts == 0:
            raise invalid("unknown_task", "common", "a policy other than 'common' where there is no common expert")
        if self.layout.visible == 1 and (self.gate != "task" or self.gate_temperature != 1.0):
            raise invalid(
                "gate", self.gate, "'task' at temperature 1 where a task sees one expert, which has nothing to gate"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise invalid("layers_pattern", self.layers_pattern, "None without `layers_to_transform`")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise invalid("layers_to_transform", self.layers_to_transform, "None where `target_modules` is a string")
