"""What of a model outside its blocks keeps learning while layers are frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..core.errors import invalid
from .towers import outermost_models, plain_name


__all__ = ["keeps_learning"]

# Heads that transformers puts into models which are their own base model, such as `CLIPForImageClassification`.
_HEADS = ("classifier", "score", "classification_head", "qa_outputs")
_SHOWN_NAMES = 12


def keeps_learning(
    model: nn.Module, outside: Mapping[str, nn.Parameter], always_train: Sequence[str]
) -> tuple[bool, set[str]]:
    """
    Chooses the parameters outside the blocks that keep learning. See [`find_blocks`] for the rule.

    Args:
        model (`nn.Module`):
            The model without wrappers.
        outside (`Mapping[str, nn.Parameter]`):
            Its parameters outside the blocks, by name.
        always_train (`Sequence[str]`):
            What the user names.

    Returns:
        `tuple[bool, set[str]]`: whether the model carries adapters, and names of parameters.

    Raises:
        `ValueError`: for a name that fits nothing that may learn.
    """
    if isinstance(always_train, str) or not all(isinstance(name, str) for name in always_train):
        raise invalid("always_train", always_train, 'a list of names, such as `["lm_head"]`')
    learning = {name: parameter for name, parameter in outside.items() if parameter.requires_grad}
    adapters = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    wanted = {name for pattern in always_train for name in _matches(model, pattern, outside, learning)}
    if adapters:
        return True, set(learning)
    pretrained = _pretrained(model)
    return False, wanted | {name for name, parameter in learning.items() if id(parameter) not in pretrained}


def _matches(
    model: nn.Module, pattern: str, outside: Mapping[str, nn.Parameter], learning: Mapping[str, nn.Parameter]
) -> list[str]:
    def fits(name: str) -> bool:
        return name == pattern or name.endswith(f".{pattern}")

    # By identity: output embeddings that are tied go by the name of the input embeddings.
    named = {
        id(parameter)
        for name, module in model.named_modules()
        if name and fits(plain_name(name))
        for parameter in module.parameters()
    } | {id(parameter) for name, parameter in outside.items() if fits(name)}
    found = [name for name, parameter in learning.items() if id(parameter) in named]
    if not found:
        candidates = list(dict.fromkeys(name.rpartition(".")[0] or name for name in learning))
        stands_still = any(id(parameter) in named for parameter in outside.values())
        raise invalid(
            "always_train",
            pattern + (", which has `requires_grad=False`" if stands_still else ""),
            f"parts outside the blocks that may learn: {', '.join(candidates[:_SHOWN_NAMES]) or 'there are none'}",
            "Under PEFT name it in `modules_to_save`." if stands_still else "",
        )
    return found


def _pretrained(model: nn.Module) -> set[int]:
    """Parameters that came with the weights of a base model, by identity; all of a model that is not transformers'."""
    roots = list(outermost_models(model))
    if not roots:
        return set(map(id, model.parameters()))
    found: list[Iterable[nn.Parameter]] = []
    for root in roots:
        base = root.base_model
        if root.get_output_embeddings() is not None:
            found.append(root.parameters())
        elif base is not root:
            found.append(base.parameters())
        else:
            heads = [getattr(root, name) for name in _HEADS if isinstance(getattr(root, name, None), nn.Module)]
            fresh = {id(parameter) for head in heads for parameter in head.parameters()}
            found.append(parameter for parameter in root.parameters() if id(parameter) not in fresh)
    return {id(parameter) for parameters in found for parameter in parameters}
