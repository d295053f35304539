"""What a model of attention-fused task LoRAs is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from peft import LoraConfig

from ...core.errors import invalid, unsupported
from ..head_math import POOLINGS
from ..task_head import TaskHead
from ..tasks import TaskRegistry


__all__ = ["LEVELS", "AttentionFusionConfig", "check_lora_config"]

LEVELS = ("output", "layer")
# What of PEFT's LoRA is more than a low-rank update of a linear, beside what PEFT marks as a variant.
MORE = ("lora_bias", "use_qalora", "layer_replication", "target_parameters", "trainable_token_indices")
# What lies beside the folders of tasks.
TAKEN = (
    *("fusion.safetensors", "fusion_config.json", "task_heads.json", "task_heads.safetensors", "readme.md"),
    *("training_args.bin", "runs", "pooled", "hf_curriculum"),
)
# Starts that leave the base as it is, which all tasks share.
STARTS = (True, False, "gaussian", "eva", "orthogonal")
WHY = "the LoRAs of all tasks run side by side, as low-rank updates of linears and nothing else"
INSTEAD = "Train it as a plain LoRA."
# Dimension of queries, keys and values, and heads. Our choice: at hidden size 4096 and 8 tasks a fusion of outputs is
# 0.02 % of a 7B model, one in the query and value projections 0.13 %, in all linears 0.66 %.
SIZES = {"output": (64, 4), "layer": (8, 2)}


@dataclass
class AttentionFusionConfig:
    """
    Configuration of an [`AttentionFusionModel`].

    The paper (JECEI 13(2), 2025) says in public that an attention layer over the outputs of task models weighs what
    each contributes, and no more; all that follows is our choice unless a source is named.

    Args:
        task_names (`list[str]`, *optional*):
            One name per task, in the order of their ids. See [`~hf_curriculum.TaskRegistry`].
        num_labels (`dict[str, int]`, *optional*):
            Classes of each task, one of which is right for a row.
        heads (`dict[str, TaskHead]`, *optional*):
            In place of both: what each task predicts, in the order of their ids. For names of classes, several classes
            per row with thresholds, weights of classes, and regressions.
        level (`str`, *optional*, defaults to `"output"`):
            `"output"` (the paper): attention over the pooled outputs of the T task models, each a LoRA over the base.
            `"layer"`: attention over the T LoRA outputs in each adapted linear, in one pass of the base.
        lora ([`~peft.LoraConfig`], *optional*):
            The LoRA of each task. Defaults to `LoraConfig(r=8, lora_alpha=16)` on the modules that PEFT adapts in this
            architecture. Tasks that are loaded bring their own.
        pooling (`str`, *optional*):
            What of a row is classified: `"cls"` (its first token), `"mean"` (the mean over its tokens) or `"last"`
            (its last token); padding never counts, on either side. Defaults to `"last"` for a model of causal
            attention, else to `"mean"`.
        fusion_dim (`int`, *optional*):
            Dimension of all heads' queries, keys and values together, at least 1. Defaults to 64 (`"output"`) or 8
            (`"layer"`).
        num_attention_heads (`int`, *optional*):
            A divisor of `fusion_dim`. Defaults to 4 or 2.
        dropout (`float`, *optional*, defaults to `0.1`):
            Dropout before the task heads, in [0, 1); as in BERT.

    Raises:
        `ValueError`: for a value out of range, or fields that do not go together.
        `NotImplementedError`: for a `lora` that is more than a low-rank update of linears.

    Example:

    ```python
    >>> from hf_curriculum import AttentionFusionConfig

    >>> config = AttentionFusionConfig(task_names=["topic", "mood"], num_labels={"topic": 4, "mood": 2})
    >>> config.level, config.fusion_dim, config.heads["mood"].num_labels
    ('output', 64, 2)
    ```
    """

    task_names: list[str] | None = field(default=None, metadata={"help": "Names of the tasks, in the order of ids."})
    num_labels: dict[str, int] | None = field(default=None, metadata={"help": "Classes of each task."})
    heads: dict[str, TaskHead] | None = field(default=None, metadata={"help": "What each task predicts."})
    level: str = field(default="output", metadata={"help": "Where tasks consult one another: output or layer."})
    lora: LoraConfig | None = field(default=None, metadata={"help": "The LoRA of each task."})
    pooling: str | None = field(default=None, metadata={"help": "What of a row is classified: cls, mean or last."})
    fusion_dim: int | None = field(default=None, metadata={"help": "Dimension of queries, keys and values."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the attention over tasks."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout before the task heads."})

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise invalid("level", self.level, f"one of {', '.join(LEVELS)}")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise invalid("pooling", self.pooling, f"None or one of {', '.join(POOLINGS)}")
        if not 0 <= self.dropout < 1:
            raise invalid("dropout", self.dropout, "a float in [0, 1)")
        self.heads = self._heads()
        self.task_names = list(TaskRegistry(list(self.heads)).names)
        if taken := [name for name in self.task_names if _is_taken(name)]:
            raise invalid("task_names", taken[0], "names other than those of files and folders beside the tasks'")
        self.num_labels = {name: head.num_labels for name, head in self.heads.items()}
        self.lora = LoraConfig(r=8, lora_alpha=16) if self.lora is None else self.lora
        check_lora_config(self.lora, "lora")
        if self.lora.modules_to_save:
            raise unsupported("`modules_to_save` in lora", "tasks share all of the base but their LoRAs", INSTEAD)
        dim, heads = SIZES[self.level]
        self.fusion_dim = dim if self.fusion_dim is None else self.fusion_dim
        self.num_attention_heads = heads if self.num_attention_heads is None else self.num_attention_heads
        for name in ("fusion_dim", "num_attention_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise invalid(name, value, "an integer >= 1")
        if self.fusion_dim % self.num_attention_heads:
            raise invalid("num_attention_heads", self.num_attention_heads, f"a divisor of {self.fusion_dim}")

    def _heads(self) -> dict[str, TaskHead]:
        if self.heads is not None:
            if not isinstance(self.heads, Mapping) or not all(isinstance(h, TaskHead) for h in self.heads.values()):
                raise invalid("heads", self.heads, "a `TaskHead` by the name of each task")
            same = {name: head.num_labels for name, head in self.heads.items()}
            if self.task_names not in (None, list(self.heads)) or self.num_labels not in (None, same):
                raise invalid(
                    "heads", list(self.heads), "the tasks of `task_names` and `num_labels`, or neither of these"
                )
            return dict(self.heads)
        if self.task_names is None or self.num_labels is None:
            raise invalid("task_names", self.task_names, "names, with `num_labels`, or `heads` in place of both")
        names = TaskRegistry(self.task_names).names
        if not isinstance(self.num_labels, Mapping) or set(self.num_labels) != set(names):
            raise invalid("num_labels", self.num_labels, f"a number of classes for each of {', '.join(names)}")
        return {name: TaskHead(self.num_labels[name]) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, read back by [`from_dict`]; the LoRAs are kept with their adapters."""
        kept = ("level", "pooling", "fusion_dim", "num_attention_heads", "dropout")
        heads = {name: asdict(head) for name, head in (self.heads or {}).items()}
        assert self.lora is not None
        values = self.lora.to_dict().items()
        lora = {key: sorted(value) if isinstance(value, set | range) else value for key, value in values}
        return {**{name: getattr(self, name) for name in kept}, "heads": heads, "lora": lora}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttentionFusionConfig:
        """
        Reads what [`to_dict`] wrote.

        Args:
            values (`Mapping`):
                The values.

        Returns:
            [`AttentionFusionConfig`]

        Raises:
            `ValueError`, `TypeError`, `KeyError`: if a key is missing or not known, or a value is wrong.
        """
        rest = {key: value for key, value in values.items() if key not in ("heads", "lora")}
        heads = {name: TaskHead(**head) for name, head in values["heads"].items()}
        return cls(heads=heads, lora=LoraConfig.from_peft_type(**values["lora"]), **rest)


def _is_taken(name: str) -> bool:
    """Whether a task's folder would have the name of what is written beside it, by the model or a trainer."""
    folded = name.casefold()
    return folded in TAKEN or folded.startswith("checkpoint-")


def check_lora_config(config: object, name: str) -> None:
    """
    Refuses an adapter that is more than a low-rank update of linears.

    Args:
        config (`object`):
            The config.
        name (`str`):
            Whose it is, for the error.

    Raises:
        `ValueError`: for another method.
        `NotImplementedError`: for variants and trained modules beside the update.
    """
    if not isinstance(config, LoraConfig):
        raise invalid(name, f"a {type(config).__name__}", "a plain `peft.LoraConfig`")
    if config.bias != "none":
        raise unsupported(f"`bias={config.bias!r}` in {name}", WHY, INSTEAD)
    variants = [item.name for item in fields(config) if item.metadata.get("is_lora_variant")]
    if wrong := [item for item in (*MORE, *variants) if getattr(config, item)]:
        raise unsupported(f"`{wrong[0]}` in {name}", WHY, INSTEAD)
    if config.init_lora_weights not in STARTS:
        raise unsupported(
            f"`init_lora_weights={config.init_lora_weights!r}` in {name}",
            "it changes the base, which all tasks share",
            f"Use one of {', '.join(map(str, STARTS))}.",
        )
