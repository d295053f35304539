"""The plan as a sampler of row indices."""

from ..core.sampler import RunSampler
from .plan import CurriculumPlan


__all__ = ["CurriculumSampler"]


class CurriculumSampler(RunSampler):
    """
    Yields the rows of a plan in order, for any `DataLoader`.

    Without state, and the same on every rank; see [`~hf_curriculum.core.sampler.RunSampler`].

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
        super().__init__(plan.indices)
        self.plan = plan
