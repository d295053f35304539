"""
Parameters under any backend: which ones learn, and a copy of their values that the model can compute with.

One process, DDP, ZeRO-1 and ZeRO-2 keep every parameter whole on every rank; ZeRO-3 and FSDP2 keep a part of each.
What differs is in `layouts.py`. Nothing here touches an optimizer: neither its state nor DeepSpeed's float32
partitions.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import nn

from .distributed import on_main_process, rank_and_world
from .errors import invalid, unsupported
from .layouts import Layout, layout_of, reshard
from .wrappers import unwrapped


__all__ = ["ParameterSnapshot", "learning_parameters", "parameters_by_name"]

# Names of the attributes under which wrappers inside a model keep the module they wrap: `torch.compile` and
# checkpointing of activations. They are not part of a parameter's name.
_WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.")

# Parameters that compute with a snapshot's values at this moment, by identity.
_EXCHANGED: set[int] = set()


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """
    Names all parameters of a model, those that learn and the others, as [`learning_parameters`] does.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.

    Returns:
        `dict[str, nn.Parameter]`: all parameters, tied ones once.
    """
    model = unwrapped(model)
    # While FSDP2 holds the full tensors, the model's parameters are others.
    reshard(model)
    found = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPER_NAMES:
            name = name.replace(wrapper, "")
        found[name] = parameter
    return found


def learning_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """
    Collects the parameters that learn.

    Args:
        model (`nn.Module`):
            The model, wrapped or not; under DeepSpeed and FSDP2 after the engine is built.

    Returns:
        `dict[str, nn.Parameter]`: the parameters with `requires_grad`, in the model's order, which is the same on
        every rank. The names are those of the model without wrappers (no `module.`, no `_orig_mod.`); tied parameters
        come once, under the name that the model registered first.

    Raises:
        `NotImplementedError`: under FSDP1.

    Example:

    ```python
    >>> from torch import nn

    >>> from hf_curriculum.core.parameters import learning_parameters

    >>> list(learning_parameters(nn.Linear(2, 2)))
    ['weight', 'bias']
    ```
    """
    return {name: parameter for name, parameter in parameters_by_name(model).items() if parameter.requires_grad}


class ParameterSnapshot:
    """
    A copy of the values of some parameters, with which the live model can compute for a while.

    The copy is taken when the object is made and again by [`~ParameterSnapshot.capture`]; it does not follow the live
    parameters otherwise. Each rank keeps what the backend keeps there: the full tensor (one process, DDP, ZeRO-1/2),
    the local partition (ZeRO-3) or the local shard (FSDP2), on the same device. Take it after the engine is built:
    ZeRO-3 and FSDP2 partition the parameters then.

    Every method marked as collective must be called by all ranks in the same order. Under ZeRO-3 and FSDP2 that holds
    for `exchanged` too, as for every forward.

    Args:
        parameters (`Mapping[str, nn.Parameter]`):
            The parameters by name, in the same order on every rank; they need not learn.
            [`learning_parameters`] gives those that do.
        model (`nn.Module`, *optional*):
            The model they are part of, wrapped or not. Required under ZeRO-3 and FSDP2, where modules hold full
            tensors that must be let go before and after an exchange.
        dtype (`torch.dtype`, *optional*):
            A floating dtype to keep the values in; by default each parameter's own. With `torch.float32` an average
            of bfloat16 parameters keeps its small steps; the live dtype is restored whenever the values are used.

    Raises:
        `ValueError`: if there are no parameters, if `dtype` is not a floating dtype, or if `model` is missing where
            it is required or does not hold the parameters.
        `NotImplementedError`: for ZeRO-3 with NVMe offload, quantised or hierarchical partitions, and for experts
            that differ from rank to rank.

    Example:

    ```python
    >>> import torch

    >>> from hf_curriculum.core.parameters import ParameterSnapshot, learning_parameters

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.fill_(1.0)
    >>> snapshot = ParameterSnapshot(learning_parameters(model), model=model)
    >>> _ = model.weight.data.fill_(5.0)
    >>> with snapshot.exchanged():
    ...     print(model(torch.ones(1, 2)))
    tensor([[2.]])
    >>> print(model(torch.ones(1, 2)).item())
    10.0
    ```
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        model: nn.Module | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not parameters:
            raise invalid("parameters", "none", "at least one parameter", "Is the whole model frozen?")
        if dtype is not None and not dtype.is_floating_point:
            raise invalid("dtype", dtype, "a floating dtype or None")
        for name, parameter in parameters.items():
            if not parameter.is_floating_point() or parameter.is_meta:
                raise unsupported(
                    f"A snapshot of {name}, which is {'offloaded' if parameter.is_meta else parameter.dtype},",
                    "its values are not in the parameter, or not in the parameter alone",
                    "Snapshot the parameters that learn.",
                )
        self._parameters = dict(parameters)
        self._model = model
        self._layouts = {name: layout_of(name, parameter) for name, parameter in self._parameters.items()}
        if model is None and any(layout.partitioned for layout in self._layouts.values()):
            raise invalid(
                "model",
                model,
                "the model that holds the parameters, as they are partitioned (ZeRO-3, FSDP2)",
                "Pass `model=trainer.model`.",
            )
        self._values: dict[str, torch.Tensor] = {}
        self._model_checked = False
        self._check_live()
        self._values = {
            name: torch.empty_like(self._local(name), dtype=dtype, requires_grad=False) for name in self._parameters
        }
        self.capture()

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    @property
    def nbytes(self) -> int:
        """Bytes that the values take on this rank."""
        return sum(value.numel() * value.element_size() for value in self._values.values())

    @property
    def full_nbytes(self) -> int:
        """Bytes of the full values, as [`~ParameterSnapshot.state`] returns them."""
        return sum(math.prod(self._shape(name)) * value.element_size() for name, value in self._values.items())

    @torch.no_grad()
    def capture(self) -> None:
        """
        Copies the live values in again, into the same memory.

        Raises:
            `RuntimeError`: inside an exchange.
            `ValueError`: if the parameters are no longer those of the model, or were partitioned since.
        """
        self._model_checked = False
        self._check_live()
        for name, value in self._follow():
            value.copy_(self._local(name))

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """
        Moves the values towards the live ones: value = decay * value + (1 - decay) * live.

        Args:
            decay (`float` in [0, 1]):
                Weight of the old values.

        Raises:
            `ValueError`: if `decay` is outside its range, or if the values are kept in half precision, where steps of
                1 - decay are lost to rounding and the average would stand still.
            `RuntimeError`: inside an exchange.
        """
        if not 0.0 <= decay <= 1.0:
            raise invalid("decay", decay, "a float in [0, 1]")
        self._check_not_exchanged()
        for name, value in self._follow():
            if torch.finfo(value.dtype).eps > torch.finfo(torch.float32).eps:
                raise invalid("dtype", value.dtype, "torch.float32 for an average", "Make it with `dtype`.")
            value.lerp_(self._local(name).to(value.dtype), 1.0 - decay)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """
        Inside, the live model computes with the snapshot's values; after it the live values are back bit by bit.

        For forward passes: gradients are off inside, and nothing inside may change a parameter. Modes (dropout) are
        the caller's. No value is copied on one process, DDP and ZeRO, unless the snapshot has another dtype or device.
        It may stand between a forward and its backward, but under ZeRO-3 is better before both: DeepSpeed counts the
        modules of one forward at a time, and in between it frees gathered parameters only at the end of the backward.

        Raises:
            `RuntimeError`: inside another exchange of the same parameters, and in the middle of a forward under
                ZeRO-3.
            `ValueError`: if the parameters are no longer those of the model, or were partitioned since.
        """
        self._check_live()
        groups: dict[Layout, list[str]] = {}
        for name, _ in self._follow():
            groups.setdefault(self._layouts[name], []).append(name)
        identities = {id(parameter) for parameter in self._parameters.values()}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.callback(_EXCHANGED.difference_update, identities)
            _EXCHANGED.update(identities)
            # Autocast keeps its casts of a parameter by identity, across the exchange.
            stack.callback(torch.clear_autocast_cache)
            for layout, names in groups.items():
                values = [self._values[name].to(self._local(name).dtype) for name in names]
                stack.enter_context(layout.exchange([self._parameters[name] for name in names], values, self._model))
            torch.clear_autocast_cache()
            yield

    @contextmanager
    def full(self, name: str) -> Iterator[torch.Tensor]:
        """
        The snapshot's full value of one parameter; the live one is not touched. Collective under ZeRO-3 and FSDP2.

        Args:
            name (`str`):
                Name of the parameter.

        Returns:
            A context manager that gives a `torch.Tensor` of the parameter's full shape, in its dtype, on its device,
            without gradient. To be read only: without partition and cast it is the snapshot's own memory. With one,
            it is gathered for the context and freed after it.

        Raises:
            `ValueError`: if the snapshot has no such parameter.
        """
        if name not in self._parameters:
            raise invalid("name", name, "a parameter of the snapshot")
        self._check_kept()
        parameter, layout = self._parameters[name], self._layouts[name]
        # Where an exchange moves contents, the snapshot's values are in the live parameter's place.
        inside = layout.moves_values and id(parameter) in _EXCHANGED
        with torch.no_grad():
            local = self._local(name) if inside else self._values[name]
            full = layout.full(parameter, local.to(parameter.dtype)).to(layout.device(parameter))
        yield full

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        """
        Gathers the full values, one parameter at a time. Collective.

        Returns:
            `dict[str, torch.Tensor]`: on rank 0 copies of the full values on the CPU, contiguous, by name; empty on
            the other ranks.

        Raises:
            `RuntimeError`: inside an exchange.
        """
        self._check_not_exchanged()
        self._check_kept()
        main = rank_and_world()[0] == 0
        state = {}
        for name, value in self._values.items():
            layout, parameter = self._layouts[name], self._parameters[name]
            if main or layout.partitioned:
                full = layout.full(parameter, value)
            if main:
                state[name] = full.detach().to("cpu", copy=True).contiguous()
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """
        Replaces the values by those that [`~ParameterSnapshot.state`] gave, at any world size and backend. Collective.

        Args:
            state (`Mapping[str, torch.Tensor]`):
                Full values by name. Rank 0's counts and is sent to the others one parameter at a time; what the other
                ranks pass is not read, an empty dict will do.

        Raises:
            `ValueError`: on rank 0, if names are missing or unexpected, if a shape differs, or if a dtype would lose
                digits (a `RuntimeError` with its text on the others). Nothing has changed then.
            `RuntimeError`: inside an exchange.
        """
        self._check_not_exchanged()
        self._check_kept()
        on_main_process(lambda: self._check_state(state))
        rank, world = rank_and_world()
        for name, value in self._follow():
            layout, parameter = self._layouts[name], self._parameters[name]
            device = layout.device(parameter)
            if rank == 0:
                full = state[name].to(device, value.dtype).contiguous()
            else:
                full = torch.empty(self._shape(name), device=device, dtype=value.dtype)
            if world > 1:
                dist.broadcast(full, src=0)
            layout.fill(parameter, value, full)

    def _local(self, name: str) -> torch.Tensor:
        return self._layouts[name].local(self._parameters[name])

    def _shape(self, name: str) -> torch.Size:
        return self._layouts[name].full_shape(self._parameters[name])

    def _follow(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values, which move along when the live parameters were moved to another device."""
        for name in self._values:
            self._values[name] = self._values[name].to(self._local(name).device)
            yield name, self._values[name]

    def _check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        fix = "The teacher in the checkpoint is that of another model or of other learning parameters."
        missing, unexpected = sorted(self._values.keys() - state.keys()), sorted(state.keys() - self._values.keys())
        if missing or unexpected:
            got = f"{len(missing)} names missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
            raise invalid("state", got, f"the snapshot's {len(self._values)} names", fix)
        for name, value in self._values.items():
            if state[name].shape != self._shape(name):
                raise invalid(
                    f"state[{name}]", f"shape {tuple(state[name].shape)}", f"{tuple(self._shape(name))}", fix
                )
            if torch.promote_types(state[name].dtype, value.dtype) != value.dtype:
                raise invalid(f"state[{name}]", state[name].dtype, f"{value.dtype}, or one that it can hold", fix)

    def _check_not_exchanged(self) -> None:
        if any(id(parameter) in _EXCHANGED for parameter in self._parameters.values()):
            raise RuntimeError(
                "The parameters are exchanged with those of a snapshot at this moment. Leave that exchange first: "
                "inside it only forward passes and `full` are possible."
            )

    def _check_kept(self) -> None:
        for name, parameter in self._parameters.items():
            if layout_of(name, parameter) is not self._layouts[name]:
                raise invalid(
                    "snapshot",
                    f"{name}, which was partitioned after the snapshot was taken",
                    "a snapshot taken after the engine is built",
                    "Take it in `on_train_begin` or later.",
                )
            if name in self._values and self._values[name].shape != self._local(name).shape:
                got = f"{name} of shape {tuple(self._local(name).shape)}"
                raise invalid("snapshot", got, f"{tuple(self._values[name].shape)}, as it was when taken")

    def _check_live(self) -> None:
        self._check_not_exchanged()
        self._check_kept()
        # Once for each capture: walking a large model costs milliseconds.
        if self._model is None or self._model_checked:
            return
        reshard(self._model)
        held = {id(parameter) for parameter in self._model.parameters()}
        for name, parameter in self._parameters.items():
            if id(parameter) not in held:
                raise invalid(
                    "parameters",
                    f"{name}, which is not a parameter of the model (any more)",
                    "parameters of `model`",
                    "Take the snapshot after the engine is built and after embeddings are resized.",
                )
        self._model_checked = True
