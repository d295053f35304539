"""How far parameters have moved since a moment, under any backend."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from .parameters import ParameterSnapshot


__all__ = ["RollingReference"]


class RollingReference(ParameterSnapshot):
    """
    The values that parameters are compared with: a snapshot, taken again as training goes.

    Takes the arguments of [`~hf_curriculum.core.parameters.ParameterSnapshot`], and each rank keeps what that keeps.
    Sums are taken in float64 over differences in float32, so that parameters in half precision lose nothing more than
    their own rounding.

    Example:

    ```python
    >>> import torch

    >>> from hf_curriculum.core.changes import RollingReference

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.fill_(3.0)
    >>> reference = RollingReference({"weight": layer.weight})
    >>> _ = layer.weight.data.fill_(5.0)
    >>> reference.squared_sums({"weight": 0}, 1).round().tolist()
    [[8.0, 18.0]]
    ```
    """

    @torch.no_grad()
    def squared_sums(self, group_of: Mapping[str, int], num_groups: int) -> torch.Tensor:
        """
        Sums up squared changes and squared values, group by group. Collective under ZeRO-3 and FSDP2.

        Args:
            group_of (`Mapping[str, int]`):
                Group, from 0, of each parameter that counts, by name; the others are left out.
            num_groups (`int`):
                G.

        Returns:
            `torch.Tensor` of shape (G, 2), float64, on the CPU: the sums of (live - reference)^2 and of reference^2,
            over the full parameters.
        """
        self._check_live()
        names = [name for name, _ in self._follow() if name in group_of]
        partitioned = any(self._layouts[name].partitioned for name in names)
        norms = []
        for name in names:
            layout, parameter = self._layouts[name], self._parameters[name]
            live = layout.own(parameter, self._local(name)).float()
            reference = layout.own(parameter, self._values[name]).float()
            pair = (live - reference, reference)
            norms.append(torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in pair]))
        device = norms[0].device if norms else torch.device("cpu")
        sums = torch.zeros(num_groups, 2, dtype=torch.float64, device=device)
        if names:
            groups = torch.tensor([group_of[name] for name in names], device=device)
            sums.index_add_(0, groups, torch.stack([norm.to(device) for norm in norms]).square())
        if partitioned:
            on_device = sums.to(self._layouts[names[0]].device(self._parameters[names[0]]))
            dist.all_reduce(on_device)
            sums = on_device
        return sums.cpu()

    @torch.no_grad()
    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """
        One parameter in full, as it is and as it was. Collective under ZeRO-3 and FSDP2.

        Args:
            name (`str`):
                Its name.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: live and reference values, of the full shape; to be read only.
        """
        layout, parameter = self._layouts[name], self._parameters[name]
        live = layout.full(parameter, self._local(name))
        with self.full(name) as reference:
            return live, reference
