"""The model inside the wrappers of DDP, DeepSpeed and `torch.compile`."""

import sys

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .errors import unsupported


__all__ = ["unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """
    Takes the wrappers of DDP, DeepSpeed and `torch.compile` off a model.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.

    Returns:
        `nn.Module`: the innermost model. FSDP2 puts no wrapper on.

    Raises:
        `NotImplementedError`: under FSDP1.
    """
    # Not `accelerate.utils.extract_model_from_parallel`: it imports DeepSpeed wherever that is installed, and takes
    # FSDP1 off as well.
    wrappers: tuple[type, ...] = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if (deepspeed := sys.modules.get("deepspeed")) is not None:
        wrappers = (*wrappers, deepspeed.DeepSpeedEngine)
    while (inner := model._modules.get("module" if isinstance(model, wrappers) else "_orig_mod")) is not None:
        model = inner
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise unsupported(
            "FSDP1",
            "its flat parameters hold pieces of many parameters",
            "Use FSDP2 (`fsdp_version: 2`), DDP or ZeRO.",
        )
    return model
