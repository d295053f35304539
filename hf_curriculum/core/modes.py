"""Modes that a model is put into for a while, and taken out of whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


__all__ = ["evaluation_mode"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Puts a model into evaluation mode and restores the mode of every module afterwards.

    Args:
        model (`nn.Module`):
            The model.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
