"""What a base model must be to carry the LoRAs of several tasks."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ...core.errors import invalid, unsupported


__all__ = ["check_base", "default_pooling", "is_read"]

# Their layers see positions before rows, which nothing but the model's code tells.
POSITIONS_FIRST = ("led", "longformer", "xlnet")


def check_base(base: object) -> None:
    """
    Refuses what is no base model without head and adapters.

    Args:
        base (`object`):
            The user's.

    Raises:
        `ValueError`: naming what to pass.
        `NotImplementedError`: for an architecture whose layers see positions before rows.
    """
    if isinstance(base, PeftModel) or not isinstance(base, PreTrainedModel):
        raise invalid("base", f"a {type(base).__name__}", "a `PreTrainedModel` without adapters, from `AutoModel`")
    if base.base_model is not base:
        raise invalid("base", f"a {type(base).__name__}", "a model without a head, from `AutoModel`")
    if any(isinstance(module, BaseTunerLayer) or hasattr(module, "lora_A") for module in base.modules()):
        raise invalid("base", "a model with adapters", "one without, from `AutoModel`", "Load them by `load_task`.")
    if base.config.model_type in POSITIONS_FIRST:
        raise unsupported(
            f"Task LoRAs on a {base.config.model_type}",
            "its layers see positions before rows, so rows cannot be told apart there",
            "Use another architecture.",
        )


def is_read(name: str) -> bool:
    """
    Whether the last hidden states depend on a module.

    Args:
        name (`str`):
            Name of the module in the base model.

    Returns:
        `bool`: False for parts of the base's own pooler.
    """
    return "pooler" not in name.split(".")


def default_pooling(base: PreTrainedModel) -> str:
    """
    What of a row says most about it: of causal attention only the last token has seen all.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The base model.

    Returns:
        `str`: `"last"` where an attention layer is causal, else `"mean"`.
    """
    causal = any(getattr(module, "is_causal", False) for module in base.modules())
    return "last" if causal else "mean"
