"""The CGC-LoRA tuner: experts in the layers of a model, and the tasks of each batch on their way to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.optim import Optimizer

from ...core.errors import invalid, unsupported
from ..absent import AbsentTaskGuard, freeze_absent_tasks
from .config import CGCLoraConfig
from .experts import CGCExperts
from .layer import CGCLoraLayer
from .loading import check_adapter_tensors
from .registration import PREFIX
from .transport import TaskTransport


__all__ = ["CGCLoraModel"]


class CGCLoraModel(TaskTransport, BaseTuner):
    """
    A model with CGC-LoRA experts (arXiv 2402.01684) in its linear layers, made by `get_peft_model(base, config)`.

    Every forward pass says which tasks its rows have: `model(..., tasks=["a", "b"])` with names or ids, one for all
    rows, one per row, or a tensor per token for packed rows; `model.generate(..., tasks="a")`; or
    `model.set_task("a")` for callers that cannot pass it. The same keyword is taken by the base model and by its
    backbone, so that losses that call them directly work. Nothing waits for a device, tasks follow beams and several
    samples per prompt, and gradient checkpointing recomputes with the tasks of its own forward pass.

    Args:
        model (`nn.Module`):
            The base model.
        peft_config ([`CGCLoraConfig`] or `dict[str, CGCLoraConfig]`):
            Configuration of the first adapter.
        adapter_name (`str`):
            Its name.
        **kwargs:
            As in `peft.tuners.tuners_utils.BaseTuner`.

    Example:

    ```python
    >>> from hf_curriculum import CGCLoraConfig
    >>> from peft import get_peft_model

    >>> config = CGCLoraConfig(task_names=["a", "b"], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    >>> model = get_peft_model(base, config)  # doctest: +SKIP
    >>> model(input_ids=ids, labels=ids, tasks=["a", "b"]).loss.backward()  # doctest: +SKIP
    >>> with model.set_task("a"):  # doctest: +SKIP
    ...     model.generate(input_ids=ids)
    ```
    """

    # Layers read the tasks from an object of this model, so they cannot be injected without it.
    uses_shared_state = True
    prefix = PREFIX
    tuner_layer_cls = CGCLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        self._start_transport()
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self._install_hooks()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter to the layers. Called by PEFT, arguments as in `BaseTuner`."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # Built now, because a compiled forward pass could not check names.
        self.registry(adapter_name)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: CGCLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, CGCLoraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise unsupported(
                f"CGC-LoRA on {current_key}, which another PEFT method adapts",
                "the two updates could be neither merged nor saved apart",
                "Merge the other adapter first (`merge_and_unload`).",
            )
        loaded = {
            "get_apply_tensor_subclass": getattr(
                getattr(self.model, "hf_quantizer", None), "get_apply_tensor_subclass", None
            )
        }
        layer = CGCLoraLayer(target, adapter_name, peft_config, state=self.task_state, **loaded)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        self._adapted.append(layer)

    def adapted_layers(self) -> list[tuple[str, CGCLoraLayer]]:
        """Adapted linears, with their names in the base model."""
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, CGCLoraLayer)]

    def experts(self, adapter_name: str | None = None) -> dict[str, CGCExperts]:
        """
        Experts of an adapter, by the name of the linear in the base model.

        Args:
            adapter_name (`str`, *optional*):
                The active one by default.

        Returns:
            `dict[str, CGCExperts]`
        """
        adapter = self.active_adapters[0] if adapter_name is None else adapter_name
        found = {}
        for name, layer in self.adapted_layers():
            if adapter in layer.cgc_lora_experts:
                found[name] = layer.experts(adapter)
        return found

    def gate_table(self, task: str | int | None = None, *, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """
        Gates of all experts, for heat-maps and reports.

        Args:
            task (`str` or `int`, *optional*):
                One task. All by default.
            adapter_name (`str`, *optional*):
                The active one by default.

        Returns:
            `dict[str, torch.Tensor]`: by the name of the linear, gates of shape `(T, E)`, or `(E,)` for one task,
            float32, on the CPU, without the scale: common experts first, then those of task 0, 1 and so on; 0 where a
            task does not see an expert.

        Raises:
            `ValueError`: for an unknown task, or gates that depend on the token.
        """
        task_id = None if task is None else self.registry(adapter_name).id(task)
        table = {}
        for name, experts in self.experts(adapter_name).items():
            with torch.no_grad():
                rows = experts.gate_rows(with_reserved=task_id is not None)[:, :: experts.layout.rank] / experts.scale
            table[name] = (rows if task_id is None else rows[task_id]).float().cpu()
        return table

    def freeze_absent_tasks(self, optimizer: Optimizer, *, strict: bool = True) -> AbsentTaskGuard:
        """
        Has an optimizer leave the experts of absent tasks alone.

        See [`~hf_curriculum.multitask.absent.freeze_absent_tasks`].

        Args:
            optimizer (`torch.optim.Optimizer`):
                The optimizer.
            strict (`bool`, *optional*, defaults to `True`):
                Whether state that cannot be kept for single tasks is an error.

        Returns:
            [`AbsentTaskGuard`]: its `remove()` takes the hooks off.
        """
        return freeze_absent_tasks(optimizer, self, strict=strict)

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        task: str | int | None = None,
    ) -> None:
        """
        Merges one task into the base weights, up to [`unmerge_adapter`].

        Args:
            adapter_names (`list[str]`, *optional*):
                Adapters to merge. The active ones by default.
            safe_merge (`bool`, *optional*, defaults to `False`):
                Refuse merged weights that are not finite.
            task (`str` or `int`, *optional*):
                The task. By default the one that [`set_task`] set.

        Raises:
            `ValueError`: if no single task is known.
            `NotImplementedError`: if the gates depend on the token.
        """
        with self._merging(adapter_names, task):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        task: str | int | None = None,
    ) -> nn.Module:
        """
        Merges one task into the base weights and takes the adapters away.

        Args:
            progressbar (`bool`, *optional*, defaults to `False`):
                Show one.
            safe_merge (`bool`, *optional*, defaults to `False`):
                Refuse merged weights that are not finite.
            adapter_names (`list[str]`, *optional*):
                Adapters to merge. The active ones by default.
            task (`str` or `int`, *optional*):
                The task. By default the one that is merged already, or that [`set_task`] set.

        Returns:
            `nn.Module`: the base model, a plain one again.

        Raises:
            `ValueError`: if no single task is known, or another one is merged.
            `NotImplementedError`: if the gates depend on the token.
        """
        with self._merging(adapter_names, task):
            return super().merge_and_unload(
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._remove_hooks()
        return model

    @contextmanager
    def _merging(self, adapter_names: list[str] | None, task: str | int | None) -> Iterator[None]:
        chosen = {}
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if not self.adapter_config(name).collapses:
                raise unsupported(
                    "Merging with `gate='token'`",
                    "its gates differ from token to token, so no task is one weight",
                    "Gates 'task' and 'task_embedding' can be merged and exported.",
                )
            chosen[name] = self._task_to_merge(name, task)
        self.task_state.merging = chosen
        try:
            yield
        finally:
            self.task_state.merging = {}

    def _task_to_merge(self, adapter: str, task: str | int | None) -> int:
        registry, merged = self.registry(adapter), self._merged_task(adapter)
        wanted = self._task if task is None else task
        if wanted is None and merged is not None:
            return merged
        if not isinstance(wanted, str | int):
            raise invalid(
                "task", wanted, f"one of {list(registry.names)}", "Merging needs one task: `merge_adapter(task=...)`."
            )
        task_id = registry.id(wanted)
        if merged is not None and merged != task_id:
            raise invalid("task", wanted, f"{registry.name(merged)!r}, which is merged", "Unmerge it first.")
        return task_id

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # "...q_proj.cgc_lora_experts.default.A": the name stands second to last, whatever the module is called.
        head, dot, name = key.rpartition(".")
        return head.removesuffix(f".{adapter_name}") + dot + name

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_adapter_tensors(model, adapter_name, remapped)
        return remapped
