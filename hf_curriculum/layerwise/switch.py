"""
Which blocks compute gradients: `requires_grad`, and what each backend must be told when it changes.

Read in torch 2.13. DDP hooks the parameters that require a gradient when its reducer is built, so one that is frozen
later breaks the next reduction, and one that is unfrozen later is silently not reduced: the reducer is rebuilt in
place. FSDP2 settles the dtypes of a group at its first forward, from the parameters that require a gradient then.
"""

import gc
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..core.wrappers import unwrapped


__all__ = ["BlockSwitch", "find_ddp"]


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """
    Finds the DDP wrapper of a model, which knows its model, while a callback is given the model alone.

    Args:
        model (`nn.Module`):
            The model, unwrapped.

    Returns:
        `DistributedDataParallel`, *optional*: the wrapper; None if there is none.
    """
    if not dist.is_initialized():
        return None
    # `type` and not `isinstance`, which would wake lazy modules among the objects of the process.
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return next((wrapper for wrapper in wrappers if unwrapped(wrapper) is unwrapped(model)), None)


class BlockSwitch:
    """
    Turns the gradients of blocks on and off.

    Args:
        model (`nn.Module`):
            The model; under FSDP2 after sharding.
        blocks (`Sequence[Sequence[nn.Parameter]]`):
            The parameters of each block that may learn, all requiring a gradient now.
        frozen (`Iterable[nn.Parameter]`):
            Parameters outside the blocks that do not learn, all requiring a gradient now.
        ddp (`DistributedDataParallel`, *optional*):
            The wrapper that trains the model.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Sequence[nn.Parameter]],
        frozen: Iterable[nn.Parameter] = (),
        ddp: DistributedDataParallel | None = None,
    ) -> None:
        self.blocks = [list(block) for block in blocks]
        self.frozen = list(frozen)
        self.ddp = ddp
        self._resting: list[nn.Parameter] = []
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._sharded:
            # Settles the dtypes of every group while all of it requires a gradient.
            module._get_fsdp_state()._lazy_init()

    def learn(self, active: Iterable[int]) -> None:
        """
        Lets these blocks compute gradients, and no others. Between steps only; collective under DDP.

        Args:
            active (`Iterable[int]`):
                Block numbers.
        """
        learning = set(active)
        wanted = [(parameter, False) for parameter in self.frozen]
        wanted += [(parameter, number in learning) for number, block in enumerate(self.blocks) for parameter in block]
        self._turn(wanted)

    def release(self) -> None:
        """Everything computes gradients again, as before the first switch. Collective under DDP."""
        self._turn([(parameter, True) for block in [self.frozen, *self.blocks] for parameter in block])

    def rest(self) -> None:
        """
        Between two steps, marks what sleeps as learning, until [`~BlockSwitch.wake`].

        Of adapters, DeepSpeed and FSDP2 save only what requires a gradient at that moment: a checkpoint would lack
        those of frozen blocks without a word, and what is loaded from it would have others in their place.
        """
        self._resting = [each for block in [self.frozen, *self.blocks] for each in block if not each.requires_grad]
        for parameter in self._resting:
            parameter.requires_grad_(True)

    def wake(self) -> None:
        """Before a step, takes back what [`~BlockSwitch.rest`] marked."""
        for parameter in self._resting:
            parameter.requires_grad_(False)
        self._resting = []

    def _turn(self, wanted: Sequence[tuple[nn.Parameter, bool]]) -> None:
        self.wake()
        changed = [(parameter, learns) for parameter, learns in wanted if parameter.requires_grad != learns]
        for parameter, learns in changed:
            parameter.requires_grad_(learns)
            # A gradient that is left over would still be stepped with.
            parameter.grad = None
        if changed and self.ddp is not None:
            _rebuild_reducer(self.ddp)
        if changed:
            for module in self._sharded:
                if (group := module._get_fsdp_state()._fsdp_param_group) is not None:
                    group._init_mp_dtypes()


def _rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Makes DDP reduce the gradients of the parameters that require one now, as if it was wrapped now."""
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp.reducer = None  # type: ignore[assignment]
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        assert ddp.logger is not None
        ddp.logger._set_static_graph()
        # The new reducer reduces nothing in its first step unless the wrapper asks it to once more.
        ddp._static_graph_delay_allreduce_enqueued = False
