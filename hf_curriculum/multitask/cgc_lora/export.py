"""Writes each task of a CGC-LoRA model as a standard LoRA adapter."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn

from ...core.console import say
from ...core.distributed import is_main_process
from ...core.errors import invalid, unsupported
from ...core.modes import evaluation_mode
from ..head_files import WEIGHTS_NAME
from ..heads import MultiTaskHeads
from ..lora_files import adapter_card, is_transposed, target_modules_of, write_lora
from ..tasks import COMMON_TASK_ID
from .collapse import pad_rank, truncate_rank
from .export_card import TASK_MAP, folder_card, serve_command
from .model import CGCLoraModel
from .registration import PREFIX
from .state import TaskBatch


__all__ = ["ExportReport", "TaskAdapter", "export_task_adapters"]

# Largest difference of logits, relative to the largest logit (at least 1), that rounding may explain; mistakes in the
# algebra are orders of magnitude above. Our choice: sums over thousands of terms, a few dozen layers deep.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class TaskAdapter:
    """
    One task as a plain LoRA.

    Args:
        name (`str`):
            Name of the task, and of its folder.
        task_id (`int`):
            In [0, T), or -1 for the common part.
        factors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            A (k, d_in) and B (d_out, k) of each linear, float32, on the CPU.
        truncation_errors (`dict[str, float]`):
            Relative error of each linear's update in [0, 1], by its name; empty without truncation.
        logit_difference (`float`, *optional*):
            Largest difference from the mixture's logits; `None` if not compared.
    """

    name: str
    task_id: int
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    truncation_errors: dict[str, float] = field(default_factory=dict)
    logit_difference: float | None = None

    @property
    def rank(self) -> int:
        """Rank of the adapter, zeros included, the same in all linears."""
        return len(next(iter(self.factors.values()))[0])


@dataclass(frozen=True)
class ExportReport:
    """
    What [`export_task_adapters`] wrote.

    Args:
        folder (`Path`):
            The folder.
        ranks (`dict[str, int]`):
            By task, `"common"` included.
        logit_differences (`dict[str, float | None]`):
            Largest difference between the logits of the mixture and of the adapter, by task; `None` if not compared.
        truncation_errors (`dict[str, dict[str, float]]`):
            Relative error of the update in [0, 1], by task and linear; empty without truncation.
        serve_command (`str`):
            The command that has vLLM serve all of them.
    """

    folder: Path
    ranks: dict[str, int]
    logit_differences: dict[str, float | None]
    truncation_errors: dict[str, dict[str, float]]
    serve_command: str


def export_task_adapters(
    model: PeftModel | MultiTaskHeads,
    folder: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    include_common: bool = True,
    rank_multiple: int = 8,
    truncate_rank: int | None = None,
    check: bool | Mapping[str, torch.Tensor] = True,
    adapter_name: str | None = None,
) -> ExportReport:
    r"""
    Writes one standard LoRA adapter per task, which stock PEFT and vLLM load.

    Where gates depend on the task alone, sum_e s g_te B_e A_e = [s g_t1 B_1 ... s g_tV B_V] [A_1; ...; A_V]: each task
    is exactly one LoRA. The scale is folded into B in float32, `lora_alpha` equals the rank. Nothing is left behind if
    anything fails: all is written to a folder beside, which is renamed at the end.

    Args:
        model ([`~peft.PeftModel`] or [`~hf_curriculum.multitask.heads.MultiTaskHeads`]):
            A model with a CGC-LoRA adapter, or task heads over one.
        folder (`str` or `os.PathLike`):
            A folder that does not exist yet. It gets `<task>/adapter_config.json`, `<task>/adapter_model.safetensors`,
            `tasks.json` (task to adapter) and a `README.md`; with task heads also `<task>/task_heads.json` (labels,
            pooling, problem type) and `<task>/task_heads.safetensors`, since vLLM refuses adapters with modules
            trained in full. `MultiTaskHeads.from_pretrained("<folder>/<task>")` loads both over the base model.
        tasks (`Sequence[str]`, *optional*):
            Names of the tasks to write. All by default.
        include_common (`bool`, *optional*, defaults to `True`):
            Write the common experts alone as `common`, for requests of no known task. Nothing is written if there are
            none.
        rank_multiple (`int`, *optional*, defaults to `8`):
            Fill ranks with zeros up to a multiple of it, at least 1; vLLM's kernels want multiples of 8.
        truncate_rank (`int`, *optional*):
            Keep the best update of this rank in each linear, at least 1. Reported with its error.
        check (`bool` or `Mapping[str, torch.Tensor]`, *optional*, defaults to `True`):
            Compare the logits of the mixture with those of what will be written, before it is; on the model's
            `dummy_inputs`, or on a batch that is given. Truncated adapters are compared, but may differ.
        adapter_name (`str`, *optional*):
            The CGC-LoRA adapter. The active one by default.

    Returns:
        [`ExportReport`]

    Raises:
        `ValueError`: for a folder that exists, an unknown task, a model without CGC-LoRA or merged weights.
        `NotImplementedError`: for `gate="token"`, and for parameters that are partitioned (ZeRO-3).
        `RuntimeError`: if the logits differ.

    Example:

    ```python
    >>> from hf_curriculum import export_task_adapters

    >>> report = export_task_adapters(model, "export")  # doctest: +SKIP
    >>> report.ranks  # doctest: +SKIP
    {'summary': 16, 'translation': 16, 'common': 8}
    ```
    """
    folder = Path(folder)
    heads = model if isinstance(model, MultiTaskHeads) else None
    adapted, tuner, adapter = _check_model(model, adapter_name)
    chosen = _chosen_tasks(tuner, adapter, tasks, include_common)
    if is_main_process():
        _check_folder(folder, chosen)
    adapters = [_collapse(tuner, adapter, name, task_id, rank_multiple, truncate_rank) for name, task_id in chosen]
    if check is not False:
        _compare_logits(adapted, tuner, adapter, adapters, None if check is True else check)
    base = str(tuner.peft_config[adapter].base_model_name_or_path or "BASE_MODEL")
    command = serve_command(base, folder, {entry.name: entry.rank for entry in adapters})
    auxiliary = _auxiliary_tensors(adapted, adapter)
    if is_main_process():
        _write(folder, tuner, adapter, adapters, auxiliary, heads, command)
        words = f"Wrote {len(adapters)} LoRA adapters to {folder}. To serve them:\n{command}"
        if auxiliary:
            words += "\nThey carry modules_to_save or trained tokens, which vLLM refuses; PEFT loads them."
        if heads is not None:
            words += f"\nBeside each task's adapter lies its head, `{WEIGHTS_NAME}`: vLLM serves adapters alone."
        say(words)
    return ExportReport(
        folder=folder,
        ranks={entry.name: entry.rank for entry in adapters},
        logit_differences={entry.name: entry.logit_difference for entry in adapters},
        truncation_errors={entry.name: entry.truncation_errors for entry in adapters if entry.truncation_errors},
        serve_command=command,
    )


def _check_model(model: PeftModel | MultiTaskHeads, adapter_name: str | None) -> tuple[PeftModel, CGCLoraModel, str]:
    adapted = model.backbone if isinstance(model, MultiTaskHeads) else model
    tuner = getattr(adapted, "base_model", None)
    if not isinstance(adapted, PeftModel) or not isinstance(tuner, CGCLoraModel):
        raise invalid("model", type(model).__name__, "a PeftModel with a CGC-LoRA adapter, or task heads over one")
    adapter = tuner.active_adapters[0] if adapter_name is None else adapter_name
    if not tuner.adapter_config(adapter).collapses:
        raise unsupported(
            "Exporting with `gate='token'`",
            "its gates differ from token to token, so no task is one LoRA",
            "Gates 'task' and 'task_embedding' can be merged and exported.",
        )
    experts = tuner.experts(adapter)
    if any(parameter.numel() == 0 for module in experts.values() for parameter in (module.A, module.B)):
        raise unsupported(
            "Exporting from partitioned parameters (ZeRO-3)",
            "each process holds a part of every expert",
            "Save the model, load it in one process and export there.",
        )
    if any(layer.merged for _, layer in tuner.adapted_layers()):
        raise invalid("model", "merged weights", "unmerged ones", "Call `model.unmerge_adapter()` first.")
    return adapted, tuner, adapter


def _chosen_tasks(
    tuner: CGCLoraModel, adapter: str, tasks: Sequence[str] | None, include_common: bool
) -> list[tuple[str, int]]:
    registry = tuner.registry(adapter)
    names = list(registry.names if tasks is None else tasks)
    if isinstance(tasks, str) or not names or len(set(names)) != len(names) or any(n not in registry for n in names):
        raise invalid("tasks", tasks, f"a list of different names among {list(registry.names)}")
    chosen = [(name, registry.id(name)) for name in names]
    if include_common and tuner.adapter_config(adapter).num_common_experts > 0:
        chosen.append(("common", COMMON_TASK_ID))
    return chosen


def _check_folder(folder: Path, chosen: Sequence[tuple[str, int]]) -> None:
    if folder.exists() or folder.is_symlink():
        raise invalid("folder", str(folder), "a folder that does not exist", "Choose another name.")
    for name, _ in chosen:
        if name.casefold() in (TASK_MAP, "readme.md"):
            raise invalid("tasks", name, "names other than those of the files in the export")


def _collapse(
    tuner: CGCLoraModel, adapter: str, name: str, task_id: int, multiple: int, truncation: int | None
) -> TaskAdapter:
    result = TaskAdapter(name, task_id, {})
    for module, experts in tuner.experts(adapter).items():
        with torch.no_grad():
            down, up = (factor.float().cpu() for factor in experts.task_factors(task_id))
        if truncation is not None:
            down, up, result.truncation_errors[module] = truncate_rank(down, up, truncation)
        result.factors[module] = pad_rank(down, up, multiple)
    return result


class _PlainLora(nn.Module):
    """What an exported adapter computes in one linear, in the place of the experts."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, like: torch.Tensor) -> None:
        super().__init__()
        self.A = down.to(like.device, like.dtype)
        self.B = up.to(like.device, like.dtype)

    def forward(self, x: torch.Tensor, tasks: TaskBatch) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.A), self.B)


@contextmanager
def _in_place_of_experts(tuner: CGCLoraModel, adapter: str, entry: TaskAdapter) -> Iterator[None]:
    layers = dict(tuner.adapted_layers())
    originals = tuner.experts(adapter)
    try:
        for name, (down, up) in entry.factors.items():
            layers[name].cgc_lora_experts[adapter] = _PlainLora(down, up, originals[name].A)
        yield
    finally:
        for name, experts in originals.items():
            layers[name].cgc_lora_experts[adapter] = experts


def _compare_logits(
    model: PeftModel,
    tuner: CGCLoraModel,
    adapter: str,
    adapters: Sequence[TaskAdapter],
    batch: Mapping[str, torch.Tensor] | None,
) -> None:
    if list(tuner.active_adapters) != [adapter]:
        raise invalid("adapter_name", adapter, f"the active adapter, which is {tuner.active_adapters}")
    inputs = _check_batch(tuner.model, batch)
    with evaluation_mode(model):
        for entry in adapters:
            mixture = _logits(model, inputs, entry.name)
            with _in_place_of_experts(tuner, adapter, entry):
                exported = _logits(model, inputs, entry.name)
            entry.logit_difference = float((mixture - exported).abs().max())
            allowed = TOLERANCE.get(mixture.dtype, 0.0) * max(1.0, float(mixture.abs().max()))
            if not entry.truncation_errors and not entry.logit_difference <= allowed:
                raise RuntimeError(
                    f"The logits of task {entry.name!r} and of its LoRA differ by {entry.logit_difference:.3g}, more "
                    f"than the {allowed:.3g} that rounding explains. Nothing was written."
                )


def _check_batch(base: nn.Module, batch: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    if batch is None:
        # One row: a classifier that knows no padding token takes no more.
        batch = {name: value[:1] for name, value in (getattr(base, "dummy_inputs", None) or {}).items()}
    if not batch:
        raise invalid("check", "True", "a batch, since the model has no `dummy_inputs`", "Pass one, or `check=False`.")
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "tasks")}
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    device = next(base.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


@torch.no_grad()
def _logits(model: PeftModel, inputs: Mapping[str, torch.Tensor], task: str) -> torch.Tensor:
    output = model(**inputs, tasks=task)
    logits: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def _auxiliary_tensors(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Trained modules and tokens beside the experts, which all tasks share."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: value.detach().cpu().contiguous() for name, value in state.items() if f".{PREFIX}" not in name}


def _write(
    folder: Path,
    tuner: CGCLoraModel,
    adapter: str,
    adapters: Sequence[TaskAdapter],
    auxiliary: Mapping[str, torch.Tensor],
    heads: MultiTaskHeads | None,
    command: str,
) -> None:
    config = tuner.adapter_config(adapter)
    layers = dict(tuner.adapted_layers())
    names = [name for name in layers if name in adapters[0].factors]
    transposed = is_transposed([layers[name].get_base_layer() for name in names])
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        for entry in adapters:
            path = temporary / entry.name
            lora = LoraConfig(
                r=entry.rank,
                lora_alpha=entry.rank,
                target_modules=target_modules_of(tuner.model, names),
                fan_in_fan_out=transposed,
                task_type=config.task_type,
                modules_to_save=config.modules_to_save,
                trainable_token_indices=config.trainable_token_indices,
                base_model_name_or_path=config.base_model_name_or_path,
                revision=config.revision,
                inference_mode=True,
            )
            has_head = heads is not None and entry.task_id >= 0
            card = adapter_card(entry.name, config.base_model_name_or_path, "a CGC-LoRA model", has_head)
            mapping = config.auto_mapping
            write_lora(path, lora, entry.factors, auxiliary=auxiliary, auto_mapping=mapping, card=card)
            if heads is not None and has_head:
                heads.save_head(entry.name, path)
        tasks = {entry.name: entry.name for entry in adapters if entry.task_id >= 0}
        overview = {
            "base_model": config.base_model_name_or_path,
            "tasks": tasks,
            "common": next((entry.name for entry in adapters if entry.task_id < 0), None),
            "ranks": {entry.name: entry.rank for entry in adapters},
        }
        (temporary / TASK_MAP).write_text(json.dumps(overview, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (temporary / "README.md").write_text(folder_card(tasks, command, bool(auxiliary), heads is not None), "utf-8")
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
