"""The files of task heads: weights, and a JSON that says what they predict; the backbone lies beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import AutoModel, PreTrainedModel
from transformers.utils.hub import cached_file

from ..core.errors import invalid
from ..core.files import write_atomic


__all__ = [
    "CONFIG_NAME",
    "EXPECTED",
    "WEIGHTS_NAME",
    "find_head_files",
    "load_backbone",
    "read_head_files",
    "tensors_below",
    "write_head_files",
]

CONFIG_NAME = "task_heads.json"
WEIGHTS_NAME = "task_heads.safetensors"
HEAD_FILES = (CONFIG_NAME, WEIGHTS_NAME)
EXPECTED = "a folder written by `MultiTaskHeads.save_pretrained` or `export_task_adapters`"


def write_head_files(
    folder: str | os.PathLike[str], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """
    Writes `task_heads.safetensors` and, last, `task_heads.json`.

    Args:
        folder (`str` or `os.PathLike`):
            The folder; made when missing.
        settings (`Mapping[str, Any]`):
            `pooling`, `dropout`, and `heads`: fields of [`~hf_curriculum.multitask.heads.TaskHead`] by task.
        tensors (`Mapping[str, torch.Tensor]`):
            `weight` of shape `(C_1 + ... + C_T, H)` and `bias` of shape `(C_1 + ... + C_T,)`.
    """
    target = Path(folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_atomic(target / WEIGHTS_NAME, lambda file: file.write(save(weights)))
    write_atomic(target / CONFIG_NAME, lambda file: file.write(text.encode("utf-8")))


def read_head_files(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    Reads what [`write_head_files`] wrote.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        `tuple[dict[str, Any], dict[str, torch.Tensor]]`: settings and tensors.

    Raises:
        `ValueError`: if a file is missing or unreadable.
    """
    source = Path(folder)
    for name in HEAD_FILES:
        if not (source / name).is_file():
            raise invalid("folder", f"{source}, which has no {name}", EXPECTED)
    try:
        settings = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
        tensors = load_file(source / WEIGHTS_NAME)
    except (OSError, ValueError, SafetensorError) as error:
        raise invalid("folder", f"{source}, which cannot be read ({error})", EXPECTED) from error
    if not isinstance(settings, dict):
        raise invalid("folder", f"{source}, which cannot be read ({CONFIG_NAME} holds no object)", EXPECTED)
    return settings, tensors


def tensors_below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The weights of a part of a model.

    Args:
        prefix (`str`):
            Name of the part, with the dot.
        tensors (`Mapping[str, torch.Tensor]`):
            The weights of the model by name.

    Returns:
        `dict[str, torch.Tensor]`: without the prefix.
    """
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def find_head_files(source: str, **kwargs: Any) -> Path | None:
    """
    Looks for heads beside an adapter.

    Args:
        source (`str`):
            A folder, or a Hub id, whose files are then fetched.
        **kwargs:
            Passed on to [`~transformers.utils.hub.cached_file`], such as `subfolder` and `revision`.

    Returns:
        `Path`, *optional*: the folder with both files; None if there is no `task_heads.json`.
    """
    found = [cached_file(source, name, _raise_exceptions_for_missing_entries=False, **kwargs) for name in HEAD_FILES]
    return None if found[0] is None else Path(found[0]).parent


def load_backbone(folder: str | os.PathLike[str]) -> PreTrainedModel | PeftModel:
    """
    Loads the model that lies beside heads: a whole one, or an adapter over the base model that it names.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        `PreTrainedModel` or `PeftModel`: without a head of its own, the latter where the folder holds an adapter.

    Raises:
        `ValueError`: for an adapter that names no base model.
    """
    source = Path(folder)
    if not (source / "adapter_config.json").is_file():
        model: PreTrainedModel = AutoModel.from_pretrained(source)
        return model
    # Makes CGC-LoRA known to PEFT, which reads the type of the adapter first.
    from . import cgc_lora  # noqa: F401 - imported for what it does

    config = PeftConfig.from_pretrained(str(source))
    if not config.base_model_name_or_path:
        raise invalid(
            "backbone", None, "the adapted model, since the folder holds an adapter alone and names no base model"
        )
    base = AutoModel.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    return PeftModel.from_pretrained(base, str(source))
