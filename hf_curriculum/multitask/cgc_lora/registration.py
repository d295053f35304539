"""Makes CGC-LoRA known to PEFT (read and tested at peft 0.21.2)."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


__all__ = ["PEFT_TYPE_NAME", "PREFIX", "register_cgc_lora"]

PEFT_TYPE_NAME = "CGC_LORA"
PREFIX = "cgc_lora_"


def _extend_peft_type() -> None:
    """
    Adds a member to the enum `PeftType`.

    `register_peft_method` refuses a name that is no member, and PEFT reads `.value` of the type in places, so a plain
    string in its tables is not enough.
    """
    if PEFT_TYPE_NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, PEFT_TYPE_NAME)
    member._name_ = PEFT_TYPE_NAME
    member._value_ = PEFT_TYPE_NAME
    PeftType._member_map_[PEFT_TYPE_NAME] = member
    PeftType._value2member_map_[PEFT_TYPE_NAME] = member
    PeftType._member_names_.append(PEFT_TYPE_NAME)
    # `EnumType.__setattr__` refuses members, and since Python 3.12 attribute access no longer looks at the map.
    type.__setattr__(PeftType, PEFT_TYPE_NAME, member)


def register_cgc_lora() -> None:
    """
    Registers [`CGCLoraConfig`] and [`CGCLoraModel`] with PEFT; does nothing the second time.

    Runs when a CGC-LoRA name is first imported. Loading an adapter of this type needs that import before
    `PeftModel.from_pretrained`.

    Raises:
        `RuntimeError`: if another package has registered the type `CGC_LORA`.
    """
    from .config import CGCLoraConfig
    from .model import CGCLoraModel

    _extend_peft_type()
    registered = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(PEFT_TYPE_NAME))
    if registered is CGCLoraModel:
        return
    if registered is not None:
        raise RuntimeError(f"The PEFT type {PEFT_TYPE_NAME} is already taken by {registered!r}.")
    register_peft_method(name=PEFT_TYPE_NAME.lower(), config_cls=CGCLoraConfig, model_cls=CGCLoraModel, prefix=PREFIX)
