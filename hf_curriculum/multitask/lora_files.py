"""The files of one plain LoRA adapter, as PEFT writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.files import write_atomic
from .head_files import CONFIG_NAME, WEIGHTS_NAME


__all__ = ["adapter_card", "is_hub_id", "is_transposed", "saved_classes", "target_modules_of", "write_lora"]

# Names under which transformers' classifiers have their last layer.
_CLASSIFIERS = re.compile(r"\b(score|classifier)(\.out_proj)?\.weight$")

# The call needs this package; the formula is for those who do without.
HEAD_CARD = f"""
Its head lies beside: `{WEIGHTS_NAME}` holds `weight` (outputs, hidden size) and `bias` (outputs), `{CONFIG_NAME}`
names the labels, the problem type and the pooling. Over the last hidden states of the adapted model the outputs are
`weight @ pooled + bias`, in the order of `id2label`. With the package `hf_curriculum`:

```python
from hf_curriculum.multitask.heads import MultiTaskHeads

model = MultiTaskHeads.from_pretrained("path/of/this/adapter")
model.decode(model(**inputs).logits, 0)
```
"""


def saved_classes(adapter: str) -> int | None:
    """
    Outputs of the classification head that is saved with an adapter, of which its base knows nothing.

    Args:
        adapter (`str`):
            Folder or Hub id of an adapter.

    Returns:
        `int`, *optional*: None where there is no such head.
    """
    weights = load_peft_weights(adapter, device="cpu")
    return next((len(weight) for name, weight in weights.items() if _CLASSIFIERS.search(name)), None)


def is_hub_id(name: str) -> bool:
    """Whether a name is an id of the Hub: its cards name a model by it, and refuse a local path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def adapter_card(task: str, base_model: str | None, origin: str, has_head: bool = False) -> str:
    """
    The `README.md` of one adapter.

    Args:
        task (`str`):
            Its task.
        base_model (`str`, *optional*):
            Name of the base model.
        origin (`str`):
            What kind of model it is a part of.
        has_head (`bool`, *optional*, defaults to `False`):
            Whether the head of the task lies beside.

    Returns:
        `str`
    """
    named = base_model is not None and is_hub_id(base_model)
    front = "---\nlibrary_name: peft\n" + (f"base_model: {base_model}\n" if named else "") + "tags:\n- lora\n---\n"
    return (
        f"{front}\nThe task `{task}` of {origin}, as a standard LoRA adapter: "
        "`PeftModel.from_pretrained(base_model, path)` with PEFT alone.\n"
    ) + (HEAD_CARD if has_head else "")


def target_modules_of(base: nn.Module, adapted: Sequence[str]) -> list[str]:
    """
    How an adapter's config names the linears that it adapts.

    Args:
        base (`nn.Module`):
            The base model.
        adapted (`Sequence[str]`):
            Names of the linears in it.

    Returns:
        `list[str]`: endings of names where they mean exactly these modules, and full names otherwise.
    """
    endings = {name.rpartition(".")[2] for name in adapted}
    matched = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in endings}
    return sorted(endings if matched == set(adapted) else adapted)


def is_transposed(layers: Sequence[nn.Module]) -> bool:
    """Whether linears store their weights as (in, out): all of them, as GPT-2's do."""
    return {isinstance(layer, Conv1D) for layer in layers} == {True}


def write_lora(
    folder: Path,
    config: LoraConfig,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    auxiliary: Mapping[str, torch.Tensor] | None = None,
    auto_mapping: dict[str, str] | None = None,
    card: str = "",
) -> None:
    """
    Writes one adapter.

    Args:
        folder (`Path`):
            The folder; made when missing.
        config ([`~peft.LoraConfig`]):
            Its config.
        factors (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`):
            A (r, d_in) and B (d_out, r) by the name of the linear in the base model.
        auxiliary (`Mapping[str, torch.Tensor]`, *optional*):
            Trained modules and tokens, by the names that PEFT gives them.
        auto_mapping (`dict[str, str]`, *optional*):
            Class and library of the base model, where the adapter has no task type.
        card (`str`, *optional*, defaults to `""`):
            Its `README.md`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder), auto_mapping_dict=auto_mapping)
    tensors = dict(auxiliary or {})
    for name, (down, up) in factors.items():
        for kind, factor in (("A", down), ("B", up)):
            tensors[f"base_model.model.{name}.lora_{kind}.weight"] = factor.detach().cpu().contiguous()
    data = save(tensors, metadata={"format": "pt"})
    write_atomic(folder / SAFETENSORS_WEIGHTS_NAME, lambda file: file.write(data))
    if card:
        write_atomic(folder / "README.md", lambda file: file.write(card.encode("utf-8")))
