"""The files of a fused model: N plain LoRA folders, heads, and the fusion; never the base."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from ...core.errors import invalid
from ...core.files import write_atomic
from ..head_files import read_head_files, tensors_below, write_head_files
from ..lora_files import adapter_card, is_hub_id, write_lora
from .adapters import lora_config_of, lora_factors, put_adapter, read_adapter
from .config import AttentionFusionConfig
from .task_loras import task_lora_layers


if TYPE_CHECKING:
    from .model import AttentionFusionModel

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "FusionFiles"]

CONFIG_NAME = "fusion_config.json"
WEIGHTS_NAME = "fusion.safetensors"
# Buffers of shape (T, T).
TABLES = ("sees", "mean_attention")
EXPECTED = "a folder written by `AttentionFusionModel.save_pretrained`"


class FusionFiles:
    """The part of an [`AttentionFusionModel`] that writes and reads it."""

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """
        Writes the tasks, the fusion and, last, `fusion_config.json`; not the base.

        `<task>/` is a plain LoRA that stock PEFT loads, with the head of the task's own model; `task_heads.*` are the
        heads of fused outputs, beside `fusion.safetensors` and `README.md`.

        Args:
            folder (`str` or `os.PathLike`):
                The folder.
            state_dict (`Mapping[str, torch.Tensor]`, *optional*):
                The weights of this model by name, where its parameters do not hold them whole (ZeRO-3).
            is_main_process (`bool`, *optional*, defaults to `True`):
                Whether this process writes.
        """
        if not is_main_process:
            return
        model = cast("AttentionFusionModel", self)
        target = Path(folder)
        tensors = dict(model.state_dict() if state_dict is None else state_dict)
        of_base = tensors_below("backbone.", tensors)
        own_heads = tensors_below("own_classifier." if model.stage != "joint" else "classifier.", tensors)
        base_name = model.config._name_or_path or None
        for task, name in enumerate(model.heads):
            card = adapter_card(name, base_name, "a model of attention-fused LoRAs", has_head=True)
            factors = lora_factors(model.backbone, task, of_base)
            write_lora(target / name, lora_config_of(model.backbone, task), factors, card=card)
            own = {part: value[model.head_rows(name)] for part, value in own_heads.items()}
            write_head_files(target / name, model.head_settings([name]), own)
        model.save_heads(target, state_dict)
        fusion = {name: tensors[name].detach().cpu().contiguous() for name in self.fusion_names()}
        write_atomic(target / WEIGHTS_NAME, lambda file: file.write(save(fusion)))
        card = fusion_card(model)
        write_atomic(target / "README.md", lambda file: file.write(card.encode("utf-8")))
        settings = json.dumps(self._description(), indent=2, ensure_ascii=False, sort_keys=False) + "\n"
        write_atomic(target / CONFIG_NAME, lambda file: file.write(settings.encode("utf-8")))

    def fusion_names(self) -> list[str]:
        """Names of what is written beside adapters and heads: the fusion, who sees whom, and who listens to whom."""
        model = cast("AttentionFusionModel", self)
        prefixes = ["fusion."] + [f"backbone.{name}.fusion." for name, _ in task_lora_layers(model.backbone)]
        return [name for name in model.state_dict() if name in TABLES or name.startswith(tuple(prefixes))]

    def _description(self) -> dict[str, Any]:
        model = cast("AttentionFusionModel", self)
        return {
            "base_model_name_or_path": model.config._name_or_path or None,
            "base": _shape_of(model.config),
            "stage": model.stage,
            "fused_tasks": sorted(model.fused_tasks),
            **model.fusion_config.to_dict(),
            "pooling": model.pooling,
        }

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        """
        Reads what [`save_pretrained`] wrote of a model like this one: adapters, heads and fusion, in place.

        Args:
            folder (`str` or `os.PathLike`):
                The folder.

        Raises:
            `ValueError`: if a file is missing or unreadable, or it is of a model with another config or stage.
        """
        values = _read_description(Path(folder))
        ours: dict[str, Any] = json.loads(json.dumps(self._description()))
        for name in ("base", "heads", "level", "pooling", "fusion_dim", "num_attention_heads", "stage"):
            if values.get(name) != ours[name] or (name == "heads" and list(values[name]) != list(ours[name])):
                shown = list(values["heads"]) if name == "heads" else values.get(name)
                raise invalid(
                    "checkpoint", f"{folder}, with {name} {shown!r}", f"{name} as in the model: {ours[name]!r}"
                )
        self._read_parts(Path(folder), values)

    def _read_parts(self, folder: Path, values: Mapping[str, Any]) -> None:
        model = cast("AttentionFusionModel", self)
        for task, (name, head) in enumerate(model.heads.items()):
            loaded = read_adapter(str(folder / name), name, head, None, model.pooling)
            if loaded.head is None:
                raise invalid("folder", f"{folder / name}, without a head", EXPECTED)
            put_adapter(model.backbone, task, loaded, model.pass_state, len(model.heads))
            model.put_head(model.own_classifier, name, loaded.head)
        _, heads = read_head_files(folder)
        # Adapters may have brought layers that have no fusion yet.
        model.add_fusion()
        try:
            fusion = load_file(folder / WEIGHTS_NAME)
            model.classifier.load_state_dict(heads)
            missing = set(self.fusion_names()) ^ set(fusion)
            if missing:
                raise KeyError(sorted(missing)[0])
            model.load_state_dict(fusion, strict=False)
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise invalid("folder", f"{folder}, which cannot be read ({error})", EXPECTED) from error
        model.after_loading(values["fused_tasks"], values["stage"])

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], base: PreTrainedModel | None = None, **kwargs: Any
    ) -> AttentionFusionModel:
        """
        Reads what [`save_pretrained`], [`push_to_hub`] or a trainer wrote.

        Args:
            source (`str` or `os.PathLike`):
                A folder, or a Hub id.
            base ([`~transformers.PreTrainedModel`], *optional*):
                The base without adapters. By default the one that was trained on is loaded by its name.
            **kwargs:
                Passed on to `AutoModel.from_pretrained`, such as `dtype`.

        Returns:
            [`AttentionFusionModel`]: in evaluation mode, in the stage that it was saved in.

        Raises:
            `ValueError`: if a file is missing or unreadable, no base model is named, or it does not fit.

        Example:

        ```python
        >>> from hf_curriculum import AttentionFusionModel

        >>> model = AttentionFusionModel.from_pretrained("outputs/fusion")  # doctest: +SKIP
        >>> model.predict(["where is my card?"], task="intent", processing_class=tokenizer)  # doctest: +SKIP
        ```
        """
        try:
            folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source)))
        except HFValidationError as error:
            raise invalid("source", str(source), "an existing folder, or the id of a Hub repository") from error
        values = _read_description(folder)
        if base is None:
            name = values.get("base_model_name_or_path")
            if not name:
                raise invalid("base", None, "the base model, since the folder names none")
            base = AutoModel.from_pretrained(name, **kwargs)
        if values.get("base") != _shape_of(base.config):
            raise invalid("base", _shape_of(base.config), f"{values.get('base')}, as in {folder}")
        own = ("base_model_name_or_path", "base", "stage", "fused_tasks")
        try:
            config = AttentionFusionConfig.from_dict({key: v for key, v in values.items() if key not in own})
        except (TypeError, KeyError, AttributeError) as error:
            raise invalid("folder", f"{folder}, whose {CONFIG_NAME} cannot be read ({error})", EXPECTED) from error
        model = cast("type[AttentionFusionModel]", cls)(base, config)
        model._read_parts(folder, values)
        return model.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload attention-fused LoRAs",
    ) -> str:
        """
        Writes the model to a repository of the Hub, which is made when missing.

        Args:
            repo_id (`str`):
                Owner and name.
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to the owner's setting.
            token (`str`, *optional*):
                Defaults to the one of this machine.
            commit_message (`str`, *optional*, defaults to `"Upload attention-fused LoRAs"`):
                Of the commit.

        Returns:
            `str`: the address of the commit.
        """
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=commit_message)
        return str(commit)


def _shape_of(config: PretrainedConfig) -> dict[str, Any]:
    """What tells bases of one family apart."""
    text = config.get_text_config()
    sizes = {name: getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    return {"model_type": config.model_type, **sizes}


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise invalid("folder", f"{folder}, which has no {CONFIG_NAME}", EXPECTED)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise invalid("folder", f"{folder}, whose {CONFIG_NAME} cannot be read ({error})", EXPECTED) from error
    if not isinstance(values, dict) or not {"stage", "fused_tasks", "heads", "level"} <= set(values):
        raise invalid("folder", f"{folder}, whose {CONFIG_NAME} lacks what describes a model", EXPECTED)
    return values


def fusion_card(model: AttentionFusionModel) -> str:
    """
    The `README.md` of a fused model.

    Args:
        model ([`AttentionFusionModel`]):
            The model.

    Returns:
        `str`
    """
    base = model.config._name_or_path or None
    named = base is not None and is_hub_id(base)
    front = ["library_name: hf_curriculum", "pipeline_tag: text-classification", "tags:", "- lora", "- multi-task"]
    if named:
        front.insert(0, f"base_model: {base}")
    first = next(iter(model.heads))
    tasks = "\n".join(
        f"- `{name}`: {head.problem_type.replace('_', ' ')}, {head.num_labels} outputs"
        for name, head in model.heads.items()
    )
    layers = len(list(task_lora_layers(model.backbone)))
    where = "their pooled outputs" if model.level == "output" else f"their LoRA outputs in {layers} linears"
    return f"""---
{chr(10).join(front)}
---

# Attention-fused LoRAs

A LoRA and a head per task on one frozen base{f" (`{base}`)" if named else ""}, and attention over {where}.

{tasks}

```python
from hf_curriculum import AttentionFusionModel

model = AttentionFusionModel.from_pretrained("path/of/this/folder")
model.predict(["some text"], task={first!r}, processing_class=tokenizer)
```

Each folder is the model of one task alone, a standard LoRA over the base without a head (`AutoModel`):
`PeftModel.from_pretrained(base, {first!r})` with PEFT alone, or with its head `MultiTaskHeads.from_pretrained`.
"""
