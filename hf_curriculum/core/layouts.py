"""
How a backend keeps a parameter on one rank: whole, as a ZeRO-3 partition, or as the shard of a `DTensor` (FSDP2).

One object per layout, without state, behind one protocol: where this rank's values lie, how the full tensor is put
together and cut up again, and how other values are put in their place for a while. `parameters.py` is its only user.
Shapes: a full tensor has the shape of the parameter before any partition; a local tensor has whatever shape the layout
keeps (the parameter's own, `(ceil(numel / world),)` under ZeRO-3, the shard of the first dimension under FSDP2).
"""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import unsupported


__all__ = ["Layout", "layout_of", "reshard"]


class Layout(Protocol):
    """One way to keep a parameter. `values` are tensors like `local(parameter)`, in the parameter's dtype."""

    partitioned: bool
    moves_values: bool

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        """The tensor with this rank's live values; not a copy, and no part of the graph."""

    def own(self, parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        """The elements of `local` that are the parameter's: without padding. A view."""

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of the full tensor."""

    def device(self, parameter: nn.Parameter) -> torch.device:
        """Device of full tensors and of the collectives."""

    def full(self, parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        """Puts the full tensor together from every rank's `local`, in its dtype. Collective."""

    def fill(self, parameter: nn.Parameter, local: torch.Tensor, full: torch.Tensor) -> None:
        """Copies this rank's part of a full tensor into `local`."""

    def exchange(
        self, parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor], model: nn.Module | None
    ) -> AbstractContextManager[None]:
        """Inside, the model computes with `values`; the live bits are back afterwards."""


class _WholeLayout:
    """Every rank has the whole parameter: one process, DDP, ZeRO-1 and ZeRO-2. Exchange is by pointer."""

    partitioned = False
    moves_values = False

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.data

    def own(self, parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        return local

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def device(self, parameter: nn.Parameter) -> torch.device:
        return parameter.device

    def full(self, parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        return local

    def fill(self, parameter: nn.Parameter, local: torch.Tensor, full: torch.Tensor) -> None:
        local.copy_(full)

    @contextmanager
    def exchange(
        self, parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor], model: nn.Module | None
    ) -> Iterator[None]:
        # Under ZeRO-1/2 `data` is a view into DeepSpeed's flat buffer: keep that very view and put it back.
        live = [parameter.data for parameter in parameters]
        try:
            for parameter, value in zip(parameters, values):
                parameter.data = value
            yield
        finally:
            for parameter, data in zip(parameters, live):
                parameter.data = data


class _ZeroLayout:
    """
    ZeRO-3: `ds_tensor` holds this rank's flat partition, padded; `data` is the full tensor while it is gathered.

    Read in deepspeed 0.19.8, `runtime/zero/partition_parameters.py`. The parameters bring their methods along, so
    deepspeed is not imported here.
    """

    partitioned = True
    moves_values = False

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        partition: torch.Tensor = _zero(parameter).ds_tensor
        return partition.data

    def own(self, parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        start = dist.get_rank(_zero(parameter).ds_process_group) * local.numel()
        return local[: max(0, self.full_shape(parameter).numel() - start)]

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        shape: torch.Size = _zero(parameter).ds_shape
        return shape

    def device(self, parameter: nn.Parameter) -> torch.device:
        # Of the (empty) full tensor: the partition itself may be offloaded to the CPU.
        return parameter.device

    def full(self, parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        group = _zero(parameter).ds_process_group
        partition = local.to(parameter.device)
        gathered = partition.new_empty(partition.numel() * dist.get_world_size(group))
        dist.all_gather_single(gathered, partition, group=group)
        shape = self.full_shape(parameter)
        return gathered[: shape.numel()].view(shape)

    def fill(self, parameter: nn.Parameter, local: torch.Tensor, full: torch.Tensor) -> None:
        start = dist.get_rank(_zero(parameter).ds_process_group) * local.numel()
        part = full.reshape(-1)[start : start + local.numel()]
        local[: part.numel()].copy_(part)

    @contextmanager
    def exchange(
        self, parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor], model: nn.Module | None
    ) -> Iterator[None]:
        inflight = _inflight_registry(model)
        partitioned = [_zero(parameter) for parameter in parameters]
        for parameter in partitioned:
            if parameter.ds_active_sub_modules or getattr(parameter, "_ds_z3_gathered_param_context_depth", 0):
                raise RuntimeError(
                    "Parameters cannot be exchanged in the middle of a forward or backward pass, nor inside "
                    "`deepspeed.zero.GatheredParameters`: a module holds the full tensor at this moment."
                )
        # What a student's backward expects to find gathered, small persistent parameters above all.
        gathered = [
            parameter
            for parameter in partitioned
            if parameter.ds_status.name == "AVAILABLE"
            or (parameter.ds_status.name == "INFLIGHT" and parameter.ds_persist)
        ]
        _partition(partitioned, inflight)
        live = [parameter.ds_tensor.data for parameter in partitioned]
        try:
            for parameter, value in zip(partitioned, values):
                parameter.ds_tensor.data = value
            yield
        finally:
            try:
                for parameter in partitioned:
                    # Left behind by a forward that raised; empty otherwise.
                    parameter.ds_active_sub_modules.clear()
                _partition(partitioned, inflight)
            finally:
                for parameter, data in zip(partitioned, live):
                    parameter.ds_tensor.data = data
            if gathered:
                gathered[0].all_gather(param_list=gathered)


class _ShardLayout:
    """FSDP2: a `DTensor` of which this rank has the local shard. FSDP keeps views of it, so its contents move."""

    partitioned = True
    moves_values = True

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        with torch.no_grad():
            shard: torch.Tensor = _as_dtensor(parameter).to_local()
        return shard

    def own(self, parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        return local

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def device(self, parameter: nn.Parameter) -> torch.device:
        mesh = _as_dtensor(parameter).device_mesh
        return parameter.device if parameter.device.type == mesh.device_type else torch.device(mesh.device_type)

    def full(self, parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        like = _as_dtensor(parameter)
        sharded = DTensor.from_local(
            local.to(self.device(parameter)),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        full: torch.Tensor = sharded.full_tensor()
        return full

    def fill(self, parameter: nn.Parameter, local: torch.Tensor, full: torch.Tensor) -> None:
        like = _as_dtensor(parameter)
        # Every rank has the full tensor already: without a source rank nothing is sent.
        sharded = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
        local.copy_(sharded.to_local())

    @contextmanager
    def exchange(
        self, parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor], model: nn.Module | None
    ) -> Iterator[None]:
        assert model is not None  # ParameterSnapshot asks for it
        reshard(model)
        pairs = [(self.local(parameter), value) for parameter, value in zip(parameters, values)]
        # One spare buffer for every swap, there before the first, so that running out of memory changes nothing.
        spare = {
            key: torch.empty(
                max(shard.numel() for shard, _ in pairs if (shard.device, shard.dtype) == key),
                device=key[0],
                dtype=key[1],
            )
            for key in {(shard.device, shard.dtype) for shard, _ in pairs}
        }
        swapped = []
        try:
            for shard, value in pairs:
                _swap(shard, value, spare[shard.device, shard.dtype])
                swapped.append((shard, value))
            yield
        except BaseException:
            for root in _fsdp_roots(model):
                root.reset_iter_state()
            raise
        finally:
            reshard(model)
            for shard, value in swapped:
                _swap(shard, value, spare[shard.device, shard.dtype])


_WHOLE, _ZERO, _SHARD = _WholeLayout(), _ZeroLayout(), _ShardLayout()


def layout_of(name: str, parameter: nn.Parameter) -> Layout:
    """
    Says how a parameter is kept at this moment.

    Args:
        name (`str`):
            Its name, for errors.
        parameter (`nn.Parameter`):
            The parameter.

    Returns:
        [`Layout`]

    Raises:
        `NotImplementedError`: for experts that differ between ranks, and for ZeRO-3 with NVMe offload,
            quantised partitions or hierarchical partitions (ZeRO++).
    """
    if getattr(parameter, "allreduce", True) is False:
        raise unsupported(
            f"A snapshot of {name}, an expert of DeepSpeed-MoE",
            "it differs from rank to rank, and a checkpoint would keep rank 0's alone",
            "Leave the experts out of the snapshot.",
        )
    if isinstance(parameter, DTensor):
        return _SHARD
    if not hasattr(parameter, "ds_id"):
        return _WHOLE
    _check_zero(name, parameter)
    return _ZERO


def _zero(parameter: nn.Parameter) -> Any:
    """The same parameter, for the type checker: DeepSpeed adds its attributes and methods at run time."""
    return parameter


def _check_zero(name: str, parameter: Any) -> None:
    reasons = {
        "offload to NVMe": parameter.ds_tensor.final_location == "nvme",
        "quantised partitions": hasattr(parameter.ds_tensor, "ds_quant_scale"),
        "hierarchical partitions (ZeRO++)": parameter.ds_secondary_tensor is not None
        or parameter.ds_zero_param_process_group is not None,
        "a partition over a part of the ranks": parameter.ds_zero_partition_world_size != dist.get_world_size(),
    }
    for reason, found in reasons.items():
        if found:
            raise unsupported(
                f"A snapshot of {name} under ZeRO-3 with {reason}",
                "the values lie where an exchange does not reach, and the model would go on computing with them",
                "Turn that option off, or use ZeRO-2.",
            )


def _as_dtensor(parameter: nn.Parameter) -> DTensor:
    data = parameter.data
    assert isinstance(data, DTensor)
    return data


def _swap(first: torch.Tensor, second: torch.Tensor, spare: torch.Tensor) -> None:
    with torch.no_grad():
        kept = spare[: first.numel()].view(first.shape)
        kept.copy_(first)
        first.copy_(second)
        second.copy_(kept)


def _inflight_registry(model: nn.Module | None) -> MutableMapping[nn.Parameter, Any]:
    """DeepSpeed's handles of parameters that are being prefetched, by parameter."""
    for module in model.modules() if model is not None else ():
        if (registry := module.__dict__.get("ds_inflight_param_registry")) is not None:
            found: MutableMapping[nn.Parameter, Any] = registry
            return found
    raise RuntimeError(
        "The model given to the snapshot is not the one that the DeepSpeed engine was built on. Give the snapshot "
        "`trainer.model` or the engine, after the engine is built."
    )


def _partition(parameters: Sequence[Any], inflight: MutableMapping[nn.Parameter, Any]) -> None:
    """Frees every full tensor, prefetched ones too: at the next use each is gathered anew."""
    for parameter in parameters:
        # A prefetch that is left in the registry would be taken for the parameter's values, and block a new gather.
        if parameter in inflight:
            inflight.pop(parameter).wait()
    parameters[0].partition(param_list=parameters)


def _fsdp_roots(module: nn.Module) -> Iterator[FSDPModule]:
    if isinstance(module, FSDPModule):
        yield module
        return
    for child in module.children():
        yield from _fsdp_roots(child)


def reshard(model: nn.Module) -> None:
    """
    Frees every full tensor of FSDP2: the root's stay after a forward, and would be taken for the values.

    Args:
        model (`nn.Module`):
            The model, or a module around it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
