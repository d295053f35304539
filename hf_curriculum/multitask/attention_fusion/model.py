"""
Task models that consult one another: a LoRA and a head per task on one base, and attention over what they say.

Shapes: B rows, S positions, T tasks, K of them, H hidden size, C the largest number of outputs of a task.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...core.errors import invalid, unsupported
from ..absent import TaskBlocks, task_owners
from ..classifier import TaskClassifier
from ..head_math import pool
from ..passes import PassState, checkpoint_in_passes, checkpointed_modules
from ..tasks import Tasks
from .additions import TaskAdditions
from .base import check_base, default_pooling
from .config import AttentionFusionConfig
from .files import FusionFiles
from .fusion import LayerFusion, OutputFusion
from .prediction import FusedClassifierOutput, FusedPredictions
from .routing import SharedStart, TaskPass, repeat_rows
from .task_loras import add_task_loras, task_lora_layers


__all__ = ["STAGES", "AttentionFusionModel"]

STAGES = ("tasks", "fusion", "joint")


class AttentionFusionModel(FusionFiles, FusedPredictions, TaskAdditions, TaskClassifier):
    """
    Classifiers of several tasks over one frozen base, which consult one another (JECEI 13(2), 2025).

    Each task has a LoRA and a head: a task model. An attention layer weighs for each row what the models of all tasks
    say, and adds it to what the row's own says ([`OutputFusion`], [`LayerFusion`]); before it is trained it adds
    nothing. What is trained is set by [`set_stage`]:

    | stage | what learns | a row's outputs are |
    |---|---|---|
    | `"tasks"`, at first | LoRAs and heads | those of its task's own model |
    | `"fusion"` | the fusion, and heads of its own that start as the tasks' | fused |
    | `"joint"` | LoRAs, fusion and heads | fused |

    Two stages, each of a Trainer of its own, are how the parts are meant to be trained: the task models then stay
    what they are, and each remains a plain LoRA with a head that does without the others.

    A fused pass at level `"output"` costs as much as T task models above the first adapted block, since every row runs
    through all T LoRAs in one batch; at level `"layer"` the base runs once, and each adapted linear has all LoRAs
    beside it. The loss is that of [`~hf_curriculum.multitask.classifier.TaskClassifier`].

    Args:
        base ([`~transformers.PreTrainedModel`]):
            A model without head ([`~transformers.AutoModel`]), an encoder or a decoder. It is frozen, and LoRAs are
            put into it.
        config ([`AttentionFusionConfig`]):
            Tasks, LoRAs and fusion.

    Attributes:
        fusion_config ([`AttentionFusionConfig`]):
            The config.
        stage (`str`):
            What is trained.
        fused_tasks (`set[str]`):
            Tasks whose heads of fused outputs have been started.

    Raises:
        `ValueError`: for a base with a head or with adapters, or LoRAs that fit nothing in it.
        `NotImplementedError`: for an encoder-decoder, or layers that are no linears.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoTokenizer
    >>> from hf_curriculum import AttentionFusionConfig, AttentionFusionModel

    >>> base = AutoModel.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
    >>> config = AttentionFusionConfig(task_names=["topic", "mood"], num_labels={"topic": 4, "mood": 2})
    >>> model = AttentionFusionModel(base, config)  # doctest: +SKIP
    >>> model(input_ids=ids, attention_mask=mask, tasks=["topic", "mood"]).logits.shape  # doctest: +SKIP
    torch.Size([2, 4])
    ```
    """

    sees: torch.Tensor
    mean_attention: torch.Tensor

    def __init__(self, base: PreTrainedModel, config: AttentionFusionConfig) -> None:
        check_base(base)
        if not isinstance(config, AttentionFusionConfig):
            raise invalid("config", f"a {type(config).__name__}", "an `AttentionFusionConfig`")
        heads = config.heads or {}
        super().__init__(base, heads, pooling=config.pooling or default_pooling(base), dropout=config.dropout)
        # PEFT fills in its target modules.
        self.fusion_config = config = copy.deepcopy(config)
        # One and the same: a threshold that is set later is written with either.
        config.heads = self.heads
        self.pass_state: PassState[TaskPass] = PassState()
        assert config.lora is not None
        add_task_loras(base, config.lora, self.pass_state, len(heads))
        self.own_classifier = nn.Linear(self.hidden_size, self.layout.num_outputs)
        self.own_classifier.to(self.classifier.weight).load_state_dict(self.classifier.state_dict())
        self.fused_tasks: set[str] = set()
        self.fusion: OutputFusion | None = None
        self.add_fusion()
        self.register_buffer("sees", torch.ones(len(heads), len(heads), dtype=torch.bool, device=self._device))
        self._sees_all = True
        unknown = torch.full((len(heads), len(heads)), torch.nan, dtype=torch.float32, device=self._device)
        self.register_buffer("mean_attention", unknown)
        self._checkpointed = checkpointed_modules(base)
        self.shared_start: SharedStart | None = None
        self.share_start()
        self.set_stage("tasks")

    def add_fusion(self) -> None:
        """Makes the fusion, or those of adapted linears, where there is none yet."""
        config = self.fusion_config
        sizes = (config.fusion_dim or 0, config.num_attention_heads or 0, len(self.heads))
        if config.level == "output":
            self.fusion = self.fusion or OutputFusion(self.hidden_size, *sizes).to(self.classifier.weight)
            return
        for _, layer in task_lora_layers(self.backbone):
            layer.fusion = layer.fusion or LayerFusion(layer.out_features, *sizes).to(layer.lora_B)

    def share_start(self) -> None:
        """Finds the first adapted block anew."""
        if self.shared_start is not None:
            self.shared_start.remove()
        names = [name for name, _ in task_lora_layers(self.backbone)]
        self.shared_start = SharedStart(self.backbone, names, self.pass_state)

    @property
    def _device(self) -> torch.device:
        return self.classifier.weight.device

    @property
    def level(self) -> str:
        """Where tasks consult one another: `"output"` or `"layer"`."""
        return self.fusion_config.level

    # What learns

    @property
    def stage(self) -> str:
        """What is trained: `"tasks"`, `"fusion"` or `"joint"`."""
        return self._stage

    def set_stage(self, stage: str) -> None:
        """
        Sets what is trained, and whether outputs are fused; before the Trainer is made.

        The head of a task's fused outputs starts as its own model's when the first stage with fusion does.

        Args:
            stage (`str`):
                `"tasks"`, `"fusion"` or `"joint"`.

        Raises:
            `ValueError`: for another one.
        """
        if stage not in STAGES:
            raise invalid("stage", stage, f"one of {', '.join(STAGES)}")
        if stage == "tasks":
            # Heads of fused outputs that no training has moved start anew later.
            self.fused_tasks = {task for task in self.fused_tasks if self._has_fused_head(task)}
        if getattr(self, "_stage", None) == "joint" and stage != "joint":
            self.own_classifier.load_state_dict(self.classifier.state_dict())
        if stage != "tasks":
            for task in self.heads.keys() - self.fused_tasks:
                own = self.head_rows(task)
                self.put_head(self.classifier, task, {n: v[own] for n, v in self.own_classifier.state_dict().items()})
            self.fused_tasks = set(self.heads)
        self._stage = stage
        self.apply_stage()

    def _has_fused_head(self, task: str) -> bool:
        own = self.head_rows(task)
        pairs = zip(self.classifier.parameters(), self.own_classifier.parameters())
        return any(not torch.equal(fused[own], alone[own]) for fused, alone in pairs)

    def apply_stage(self) -> None:
        """Has those parameters learn that the stage names."""
        self.backbone.requires_grad_(False)
        for _, layer in task_lora_layers(self.backbone):
            layer.lora_A.requires_grad_(self._stage != "fusion")
            layer.lora_B.requires_grad_(self._stage != "fusion")
        for fusion in self.fusions():
            fusion.requires_grad_(self._stage != "tasks")
        self.classifier.requires_grad_(self._stage != "tasks")
        self.own_classifier.requires_grad_(self._stage == "tasks")
        self.train(self.training)

    def fusions(self) -> list[OutputFusion | LayerFusion]:
        """The fusion of the outputs, or those of the adapted linears in the order of the model."""
        if self.fusion is not None:
            return [self.fusion]
        layers = (layer.fusion for _, layer in task_lora_layers(self.backbone))
        return [fusion for fusion in layers if fusion is not None]

    def train(self, mode: bool = True) -> AttentionFusionModel:
        """Sets the mode; the task models stay in evaluation mode where only the fusion of their outputs learns."""
        super().train(mode)
        if self._reads_finished_models:
            self.backbone.eval()
        return self

    @property
    def _reads_finished_models(self) -> bool:
        return self._stage == "fusion" and self.level == "output"

    def task_blocks(self) -> tuple[int, list[TaskBlocks]]:
        """T, and what belongs to single tasks: heads, in stage `"tasks"` LoRAs, else what tasks ask for."""
        count = len(self.heads)
        of_heads = task_owners([head.num_labels for head in self.heads.values()], count)
        if self._stage == "tasks":
            heads, owned = self.own_classifier, [
                weight for _, layer in task_lora_layers(self.backbone) for weight in (layer.lora_A, layer.lora_B)
            ]  # fmt: skip
        else:
            heads, owned = self.classifier, [fusion.task_query for fusion in self.fusions()]
        of_tasks = task_owners(1, count)
        blocks = [TaskBlocks(weight, of_heads) for weight in heads.parameters()]
        return count, blocks + [TaskBlocks(weight, of_tasks) for weight in owned]

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Passed on to the base."""
        self.backbone.activation_checkpointing_enable(*args, **kwargs)

    # The way of a batch

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        tasks: Tasks | None = None,
        pooled: torch.Tensor | None = None,
        return_attention: bool = False,
        **inputs: Any,
    ) -> FusedClassifierOutput:
        """
        Classifies rows, each by the head of its task.

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`, int64, *optional*):
                Tokens; or `inputs_embeds` among the other inputs.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
                0 at padding, on either side. Without one, every position counts.
            token_type_ids (`torch.Tensor` of shape `(B, S)`, int64, *optional*):
                Passed on where given.
            labels (`torch.Tensor` of shape `(B,)` or `(B, K)`, *optional*):
                As [`encode_label`] makes them; -100 where a row has none.
            tasks (`str`, `int`, `Sequence` or `torch.Tensor`):
                Task of each row, or of all. May be left out where there is one.
            pooled (`torch.Tensor` of shape `(B, T, H)`, *optional*):
                In place of tokens, what [`pooled_outputs`] made of them, at level `"output"`.
            return_attention (`bool`, *optional*, defaults to `False`):
                Whether to return what each row listened to, where outputs are fused.
            **inputs:
                Passed on to the base; tensors of B rows.

        Returns:
            [`FusedClassifierOutput`]

        Raises:
            `ValueError`: without tasks, for unknown ones, or for pooled outputs that do not fit.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids, **inputs}
        given = {name: value for name, value in given.items() if value is not None}
        rows = pooled if pooled is not None else given.get("input_ids", given.get("inputs_embeds"))
        if rows is None:
            raise invalid("input_ids", None, "tokens, `inputs_embeds`, or at level `output` `pooled`")
        ids = self.row_tasks(tasks, rows)
        heads, attention = self.classifier, None
        if pooled is not None:
            self._check_pooled(pooled)
        if self._stage == "tasks":
            heads = self.own_classifier
            places = torch.arange(len(ids), device=ids.device)
            vectors = self._own_outputs(given, ids) if pooled is None else pooled[places, ids]
        elif self.fusion is not None:
            outputs = self.pooled_outputs(**given) if pooled is None else pooled
            vectors, attention = self.fusion(outputs, ids, visible=self._visible(ids))
        else:
            vectors, attention = self._fused_in_layers(given, ids, return_attention)
        answer = self.answer(vectors, ids, labels, heads)
        return FusedClassifierOutput(**answer, attention=attention if return_attention else None)

    def pooled_outputs(
        self, *, sources: Sequence[str | int] | torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor:
        """
        Runs rows through the models of several tasks at once.

        The rows are repeated for each task, above the blocks that no LoRA adapts ([`SharedStart`]).

        Args:
            sources (`Sequence` or `torch.Tensor` of shape `(K,)`, *optional*):
                Tasks, by name or id. All by default.
            **inputs:
                Inputs of the base, such as `input_ids` and `attention_mask`; tensors of B rows.

        Returns:
            `torch.Tensor` of shape `(B, K, H)`: the pooled output of each task's model, without gradients where only
            the fusion learns.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        first = given.get("input_ids", given.get("inputs_embeds"))
        if first is None:
            raise invalid("input_ids", None, "tokens, or `inputs_embeds`")
        wanted = list(range(len(self.heads))) if sources is None else sources
        ids = self._registry.ids(wanted).to(first.device)
        rows, count = first.shape[0], len(ids)
        current = TaskPass(torch.zeros(rows, dtype=torch.int64, device=first.device), sources=ids)
        if self.shared_start is None or not self.shared_start.is_shared:
            given = {name: repeat_rows(value, rows, count) for name, value in given.items()}
        mask = given.get("attention_mask")
        if mask is not None and mask.shape[0] == rows:
            mask = repeat_rows(mask, rows, count)
        if self._reads_finished_models:
            with torch.no_grad():
                hidden = self._hidden(given, current)
        else:
            hidden = self._hidden(given, current)
        vectors = pool(hidden, mask, self.pooling)  # [K B, H]
        return vectors.view(count, rows, -1).transpose(0, 1)

    def _own_outputs(self, given: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
        single = None
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and len(ids):
            lowest, highest = (int(bound) for bound in torch.aminmax(ids))
            single = lowest if lowest == highest else None
        hidden = self._hidden(given, TaskPass(ids, single=single))
        return pool(hidden, given.get("attention_mask"), self.pooling)

    def _fused_in_layers(
        self, given: Mapping[str, Any], ids: torch.Tensor, keep_attention: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = given.get("attention_mask")
        kept: list[torch.Tensor] | None = [] if keep_attention else None
        current = TaskPass(ids, fused=True, visible=self._visible(ids), mask=mask, attention=kept)
        hidden = self._hidden(given, current)
        return pool(hidden, mask, self.pooling), torch.stack(kept).mean(dim=0) if kept else None

    def _hidden(self, given: Mapping[str, Any], current: TaskPass) -> torch.Tensor:
        """Last hidden states of the base in one pass."""
        options = dict(given)
        if getattr(self.config.get_text_config(), "use_cache", False):
            options.setdefault("use_cache", False)
        if not torch.compiler.is_compiling():
            checkpoint_in_passes(self._checkpointed, self.pass_state)
        with self.pass_state.using(current):
            hidden: torch.Tensor = self.backbone(**options).last_hidden_state
            return hidden

    def _visible(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Which tasks each row may listen to, `(B, T)`; None where that is all."""
        return None if self._sees_all else self.sees[ids]

    def _check_pooled(self, pooled: torch.Tensor) -> None:
        if self.level != "output":
            raise unsupported(
                "Pooled outputs at level `layer`", "its tasks consult one another inside the base", "Pass tokens."
            )
        if pooled.dim() != 3 or pooled.shape[1:] != (len(self.heads), self.hidden_size):
            raise invalid("pooled", tuple(pooled.shape), f"the shape (rows, {len(self.heads)}, {self.hidden_size})")

    # What reading and writing need

    def set_tables(self, sees: torch.Tensor, mean_attention: torch.Tensor) -> None:
        """Sets who may listen to whom, and who does, `(T, T)` each."""
        self.sees, self.mean_attention = sees, mean_attention
        self._sees_all = bool(sees.all())

    def after_loading(self, fused_tasks: Iterable[str], stage: str) -> None:
        """Takes up the state of a model whose weights were read."""
        self.fused_tasks = set(fused_tasks)
        self._sees_all = bool(self.sees.all())
        self._stage = stage
        self.share_start()
        self.apply_stage()
