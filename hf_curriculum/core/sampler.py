"""The order of a whole run as a sampler of row indices."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


__all__ = ["RunSampler"]

_CHUNK = 4096


class RunSampler(Sampler[int]):
    """
    Yields given rows in order.

    An index sampler without state: every pass, on every rank, yields all rows from the start, and no global random
    state is read or moved. Processes share it by batches (as Accelerate's `BatchSamplerShard` does), so one optimizer
    step holds the same rows whatever their number; a resumed run skips the rows already seen.

    Args:
        indices (`np.ndarray` of shape `(P,)`, int64):
            Rows in training order.

    Attributes:
        indices (`np.ndarray` of shape `(P,)`, int64):
            The same.
    """

    def __init__(self, indices: np.ndarray) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        # In chunks: ten million Python integers at once would take 400 MB.
        for start in range(0, len(self), _CHUNK):
            yield from self.indices[start : start + _CHUNK].tolist()

    def __len__(self) -> int:
        return len(self.indices)
