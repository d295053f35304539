"""The user's epochs as stages of a run whose order is fixed as a whole."""

from ..core.stages import Stage


__all__ = ["epoch_stages"]


def epoch_stages(num_rows: int, global_batch_size: int, num_steps: int) -> tuple[Stage, ...]:
    """
    Cuts a run into epochs.

    Args:
        num_rows (`int`):
            N: an epoch is as many draws, completed to a full global batch.
        global_batch_size (`int`):
            Rows in one optimizer step.
        num_steps (`int`):
            Optimizer steps of the run, at least 1.

    Returns:
        `tuple[Stage, ...]`: one per epoch, the last one possibly shorter; one per step where an epoch is less.

    Example:

    ```python
    >>> from hf_curriculum.multitask.epochs import epoch_stages

    >>> [(stage.first_step, stage.end_step) for stage in epoch_stages(10, 4, 6)]
    [(0, 3), (3, 5), (5, 6)]
    ```
    """
    ends: list[int] = []
    epoch = 1
    while not ends or ends[-1] < num_steps:
        # Small data sets end more than one epoch in a step.
        epoch = max(epoch, (ends[-1] * global_batch_size // num_rows if ends else 0) + 1)
        ends.append(min(num_steps, -(-epoch * num_rows // global_batch_size)))
        epoch += 1
    return tuple(
        Stage(
            index=index,
            levels=(),
            introduces=(),
            first_step=first,
            end_step=end,
            num_samples=(end - first) * global_batch_size,
        )
        for index, (first, end) in enumerate(zip([0, *ends], ends))
    )
