"""Sums over the bits of parameters, under any backend."""

from collections.abc import Mapping

import torch
from torch import nn

from .layouts import layout_of


__all__ = ["parameter_checksums"]


@torch.no_grad()
def parameter_checksums(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """
    Sums up the bits of parameters, to see whether one moved and whether the ranks agree. Collective.

    Args:
        parameters (`Mapping[str, nn.Parameter]`):
            The parameters by name, in the same order on every rank; after the engine is built.

    Returns:
        `dict[str, int]`: for each name the sum of the full tensor's elements read as signed integers, modulo 2^64: the
        same for the same values at any world size, partition or order of summation. Where every rank has the whole
        tensor it is the sum of this rank's, so that replicas that have drifted apart differ.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {}
    for name, parameter in parameters.items():
        layout = layout_of(name, parameter)
        full = layout.full(parameter, layout.local(parameter)).contiguous()
        sums[name] = int(full.view(integers[full.element_size()]).sum(dtype=torch.int64))
    return sums
