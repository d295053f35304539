"""Whether freezing works: what is frozen stands still, what is active moves, and the ranks agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import nn

from ..core.checksums import parameter_checksums
from ..core.distributed import rank_and_world


__all__ = ["FreezeCheck"]

# Steps with a learning rate that an active block is given to move: float16 skips the first ones of a run.
PATIENCE = 20


class FreezeCheck:
    """
    Compares sums over the bits of all blocks before and after the first steps of an active set.

    The worst failures of layer freezing raise no error: replicas that drift apart, frozen weights that go on moving
    on momentum, active ones that an optimizer never sees. It costs one pass over the weights at the switch and one
    after each step until every active block has moved, which is the first step as a rule.

    Args:
        parameters (`Mapping[str, nn.Parameter]`):
            All parameters of the blocks, and those outside that do not learn, by name.
        block_of (`Mapping[str, int]`):
            Block of each; the others must stand still.
        active (`Sequence[int]`):
            Blocks that learn.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], block_of: Mapping[str, int], active: Sequence[int]
    ) -> None:
        self._parameters = parameters
        self._block_of = block_of
        self._active = frozenset(active)
        self._before = parameter_checksums(parameters)
        self._unmoved = set(active)
        self._steps = 0

    def step(self, names: Sequence[str]) -> bool:
        """
        Looks at the parameters after an optimizer step that had a learning rate. Collective.

        Args:
            names (`Sequence[str]`):
                Names of the blocks, for the error.

        Returns:
            `bool`: whether every active block has moved, so that the check is done.

        Raises:
            `RuntimeError`: if something frozen moved, if an active block stands still for long, or if ranks differ.
        """
        self._steps += 1
        after = parameter_checksums(self._parameters)
        moved = [name for name, value in after.items() if value != self._before[name]]
        if astray := [name for name in moved if self._block_of.get(name) not in self._active]:
            raise RuntimeError(
                f"{len(astray)} frozen parameters moved in an optimizer step, {astray[0]} for one. Something steps "
                "them beside the optimizer of the trainer, or changes `requires_grad` on its own."
            )
        self._unmoved -= {self._block_of[name] for name in moved}
        if rank_and_world()[1] > 1:
            _check_ranks_agree(after)
        if self._unmoved and self._steps >= PATIENCE:
            still = ", ".join(names[number] for number in sorted(self._unmoved))
            raise RuntimeError(
                f"Blocks that should learn did not move in {self._steps} steps: {still}. Either they get no gradient "
                "(reentrant checkpointing without `enable_input_require_grads`, a forward that skips them), or their "
                "weights are in half precision and the steps round to nothing: load the model in float32 and train "
                "with `bf16=True`."
            )
        return not self._unmoved


def _check_ranks_agree(sums: Mapping[str, int]) -> None:
    everywhere: list[Mapping[str, int]] = [{}] * rank_and_world()[1]
    dist.all_gather_object(everywhere, dict(sums))
    for rank, theirs in enumerate(everywhere):
        if different := [name for name, value in sums.items() if theirs[name] != value]:
            raise RuntimeError(
                f"{len(different)} parameters differ between this process and rank {rank}, {different[0]} for one: "
                "their gradients are not reduced over the processes."
            )
