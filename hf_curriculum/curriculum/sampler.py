"""The plan as a sampler of row indices."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from .plan import CurriculumPlan


__all__ = ["CurriculumSampler"]

_CHUNK = 4096


class CurriculumSampler(Sampler[int]):
    """
    Yields the rows of a plan in order, for any `DataLoader`.

    An index sampler without state: every pass, on every rank, yields all of the plan from the start, and no global
    random state is read or moved. Processes share it by batches (as Accelerate's `BatchSamplerShard` does), so one
    optimizer step holds the same rows whatever their number; a resumed run skips the rows already seen.

    Args:
        plan ([`~hf_curriculum.curriculum.plan.CurriculumPlan`]):
            The plan, built for the global batch size of the run.

    Example:

    ```python
    >>> from torch.utils.data import DataLoader
    >>> from hf_curriculum import CurriculumConfig, CurriculumSampler, build_plan

    >>> rows = ["easy 1", "hard 1", "easy 2", "hard 2"]
    >>> plan = build_plan([0, 1, 0, 1], CurriculumConfig(num_levels=2), global_batch_size=2)
    >>> for batch in DataLoader(rows, batch_size=2, sampler=CurriculumSampler(plan)):
    ...     print(sorted(batch))
    ['easy 1', 'easy 2']
    ['hard 1', 'hard 2']
    ```
    """

    def __init__(self, plan: CurriculumPlan) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[int]:
        # In chunks: ten million Python integers at once would take 400 MB.
        for start in range(0, len(self), _CHUNK):
            yield from self.plan.indices[start : start + _CHUNK].tolist()

    def __len__(self) -> int:
        return len(self.plan.indices)
