"""
The LoRA experts of one linear layer and their gates.

Shapes: n rows of ids, L positions of the input per row of ids, T tasks, R length of the rank vector, V experts that a
task sees, r rank of one expert; see `gate.py` for the order of the experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import xxhash
from torch import nn

from ...core.errors import invalid
from ..absent import TaskBlocks, task_owners
from ..tasks import COMMON_TASK_ID, UNIFORM_TASK_ID
from .config import CGCLoraConfig
from .gate import add_reserved_rows, expand_gates, normalise_gates
from .state import TaskBatch


__all__ = ["GATHER_MIN_IDLE_RANK", "CGCExperts"]

# From this many places of the rank vector that are zero in any one row, a row fetches its own experts instead of going
# through all of them. Our choice: at hidden size 1024 and 128 positions a row the two ways take the same time at about
# 80 idle places, and at 252 (64 tasks of rank 4) the fetching takes 0.4 of the other's.
GATHER_MIN_IDLE_RANK = 96


class CGCExperts(nn.Module):
    """
    Computes B (D_t (A x)) for rows of mixed tasks: two GEMMs whatever the number of experts.

    A (R, d_in) and B (d_out, R) hold all experts as blocks, and the gate D_t, which is zero for the experts of other
    tasks, multiplies the vector of length R between them. There are three ways through, the same function each; which
    one is taken follows from shapes and from what the CPU knows, never from values on a device:

    - all rows one task that is known (a name, ids on the CPU), in evaluation without gradients: its blocks alone;
    - ids per row, none reserved, and at least 96 places idle in each row: common experts by GEMM, each row's own by
      gather and batched GEMM, so that time does not grow with the number of tasks;
    - otherwise all blocks for all rows.

    All parameters are in the graph whatever the tasks of a batch: DDP needs no `find_unused_parameters`, and ZeRO-3
    ranks gather alike. They sit on this module, whose forward pass uses them, as ZeRO-3 needs.

    Args:
        in_features (`int`):
            d_in.
        out_features (`int`):
            d_out.
        config ([`CGCLoraConfig`]):
            Experts and gates.
    """

    gate_logits: nn.Parameter
    task_embedding: nn.Parameter
    gate_projection: nn.Parameter
    token_gate: nn.Parameter
    task_matrix: nn.Parameter

    def __init__(self, in_features: int, out_features: int, config: CGCLoraConfig) -> None:
        super().__init__()
        self.layout = config.layout
        self._task_names = config.registry().names
        self._names_hash = xxhash.xxh3_64_intdigest("\0".join(self._task_names).encode()) >> 1
        self.scale = config.lora_alpha / config.r
        self.gate = config.gate
        self.normalization = config.gate_normalization
        self.temperature = config.gate_temperature
        self.shared_down_projection = config.shared_down_projection
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        tasks, visible, total = self.layout.num_tasks, self.layout.visible, self.layout.total_rank
        self.A = nn.Parameter(torch.empty(config.r if config.shared_down_projection else total, in_features))
        self.B = nn.Parameter(torch.empty(out_features, total))
        # A task that sees one expert has nothing to gate.
        self.has_gate = visible > 1
        if self.has_gate and self.gate == "task":
            self.gate_logits = nn.Parameter(torch.empty(tasks, visible))
        elif self.has_gate and self.gate == "task_embedding":
            size = config.task_embedding_dim or 0
            self.task_embedding = nn.Parameter(torch.empty(tasks, size))
            self.gate_projection = nn.Parameter(torch.empty(visible, size))
        elif self.has_gate:
            self.token_gate = nn.Parameter(torch.empty(tasks, visible, in_features))
        self.has_task_matrix = config.task_matrix
        if config.task_matrix:
            self.task_matrix = nn.Parameter(torch.empty(tasks, config.r, config.r))
        self.reset_parameters(config.init_weights)

    def get_extra_state(self) -> torch.Tensor:
        """
        A number for the names of the tasks in their order, saved with the tensors, which know tasks by their place.

        Returns:
            `torch.Tensor` of shape `(1,)`, int64.
        """
        return torch.tensor([self._names_hash])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """
        Compares the tasks of the tensors that are being loaded with those of this module.

        Args:
            state (`torch.Tensor` of shape `(1,)`, int64):
                What [`get_extra_state`] gave.

        Raises:
            `ValueError`: if they have other names or another order.
        """
        if state.device.type != "meta" and int(state) != self._names_hash:
            raise invalid(
                "adapter file",
                "experts of tasks with other names or in another order",
                f"those of {', '.join(self._task_names)}, in this order",
                "Load it with `PeftModel.from_pretrained`, or make the model with the `task_names` of the file.",
            )

    def reset_parameters(self, init_weights: bool = True) -> None:
        """
        Draws A as `nn.Linear` draws its weight, sets B to zero and all gates equal.

        Args:
            init_weights (`bool`, *optional*, defaults to `True`):
                `False` draws B, logits of gates and task matrices too.
        """
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.B)
        else:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        if self.has_gate and self.gate == "task":
            nn.init.zeros_(self.gate_logits) if init_weights else nn.init.normal_(self.gate_logits)
        elif self.has_gate and self.gate == "task_embedding":
            nn.init.normal_(self.task_embedding)
            nn.init.kaiming_uniform_(self.gate_projection, a=math.sqrt(5))
        elif self.has_gate:
            # Zero, so that training starts from equal gates; the gradient is not zero once B is not.
            nn.init.zeros_(self.token_gate) if init_weights else nn.init.normal_(self.token_gate, std=0.1)
        if self.has_task_matrix:
            with torch.no_grad():
                self.task_matrix.copy_(torch.eye(self.layout.rank).expand_as(self.task_matrix))
                if not init_weights:
                    self.task_matrix.add_(torch.randn(self.task_matrix.shape), alpha=0.1)

    def task_blocks(self) -> tuple[int, list[TaskBlocks]]:
        """T, and the parts of the parameters that belong to single tasks: own experts, gates, task matrices."""
        tasks, blocks = self.layout.num_tasks, []
        if self.layout.num_own > 0:
            owners = task_owners(self.layout.own_rank, tasks)
            blocks += [TaskBlocks(self.A, owners, dim=0), TaskBlocks(self.B, owners, dim=1)]
        for name in ("gate_logits", "task_embedding", "token_gate", "task_matrix"):
            if (parameter := getattr(self, name, None)) is not None:
                blocks.append(TaskBlocks(parameter, task_owners(1, tasks)))
        return tasks, blocks

    def forward(self, x: torch.Tensor, tasks: TaskBatch) -> torch.Tensor:
        """
        Computes the update of each row under its task.

        Args:
            x (`torch.Tensor` of shape `(rows, ..., d_in)`):
                The linear's input. `rows` is a multiple of the number of rows of ids, each of which then counts for as
                many rows in sequence (beams, several samples, tokens of a flattened batch).
            tasks ([`TaskBatch`]):
                Ids per row, or per token in the shape of `x` without its last dimension.

        Returns:
            `torch.Tensor` of shape `(rows, ..., d_out)`.

        Raises:
            `ValueError`: if the shapes of input and ids do not go together.
        """
        tasks = tasks.to(x.device)
        grouped = self._group(x, tasks.ids)  # (n, L, d_in)
        ids = tasks.ids.reshape(-1)
        if self._can_slice(tasks):
            update = self._one_task(grouped, ids, tasks.single or 0)
        elif self._can_gather(tasks):
            update = self._gathered(grouped, ids)
        else:
            update = self._dense(grouped, ids, tasks.has_reserved)
        return update.reshape(*x.shape[:-1], update.shape[-1])

    def task_factors(self, task_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The plain LoRA that a task is.

        Args:
            task_id (`int`):
                In [-2, T).

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: A' of shape `(k, d_in)` and B' of shape `(d_out, k)`, float32 or
            wider, with the update B' A'. k is V r for a task (r with a shared A), N_c r for `"common"`, R for
            `"uniform"`.

        Raises:
            `ValueError`: for `"common"` where no expert is common.
        """
        layout = self.layout
        if task_id == COMMON_TASK_ID and layout.num_common == 0:
            raise invalid("task", "common", "a task of the adapter", "It has no common experts.")
        down, up = (weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in (self.A, self.B))
        gates = self.gate_rows(with_reserved=task_id < 0)[task_id]
        if self.shared_down_projection:
            merged = (up * gates).unflatten(-1, (layout.num_experts, layout.rank)).sum(dim=-2)
            if self.has_task_matrix:
                merged = merged @ self._matrices(task_id < 0)[task_id].to(merged.dtype)
            return down, merged
        if task_id == UNIFORM_TASK_ID:
            return down, up * gates
        places = self._places(task_id)
        return down[places], up[:, places] * gates[places]

    def gate_rows(self, with_reserved: bool = False) -> torch.Tensor:
        """
        Gates times scale over the rank vector, for each task.

        Args:
            with_reserved (`bool`, *optional*, defaults to `False`):
                Append the rows of `"uniform"` and `"common"`, which ids -2 and -1 then index.

        Returns:
            `torch.Tensor` of shape `(T, R)` or `(T + 2, R)`, float32 or wider.
        """
        logits = self._task_logits()
        gates = normalise_gates(logits, self.normalization, self.temperature) if self.has_gate else logits.exp()
        rows = expand_gates(gates, torch.eye(len(gates), dtype=gates.dtype, device=gates.device), self.layout)
        if with_reserved:
            rows = add_reserved_rows(rows, logits, self.layout, self.normalization, self.temperature)
        return rows * self.scale

    def _task_logits(self) -> torch.Tensor:
        """(T, V) logits of the gates; zeros where there is one expert to see."""
        if not self.has_gate:
            wide = torch.promote_types(self.A.dtype, torch.float32)
            return torch.zeros(self.layout.num_tasks, 1, dtype=wide, device=self.A.device)
        if self.gate == "task":
            return self.gate_logits
        if self.gate == "task_embedding":
            return F.linear(self.task_embedding, self.gate_projection)
        raise invalid("gate", "token", "'task' or 'task_embedding'", "A token's gates differ from token to token.")

    def _group(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(rows, ..., d_in) -> (n, L, d_in), so that each row of ids has its rows of input together."""
        if ids.dim() == 2:
            if x.shape[:-1].numel() != ids.numel():
                raise invalid(
                    "tasks",
                    f"ids of shape {tuple(ids.shape)} for an input of shape {tuple(x.shape)}",
                    "an id for every token, or for every row",
                    "Ids per token do not follow a batch that changes its shape, as `generate` does.",
                )
            return x.reshape(ids.numel(), 1, x.shape[-1])
        if x.shape[0] % ids.shape[0] != 0:
            raise invalid(
                "tasks",
                f"ids of {ids.shape[0]} rows for an input of shape {tuple(x.shape)}",
                "one task, one for each row, or one for each token",
                "Packed rows need an id for every token; experts of a mixture-of-experts layer cannot be adapted.",
            )
        return x.reshape(ids.shape[0], -1, x.shape[-1])

    def _can_slice(self, tasks: TaskBatch) -> bool:
        # Not while training, where a rank whose rows happen to share a task would take another way than the others;
        # nor compiled, where a graph would be made for every task.
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        known = tasks.single is not None and tasks.single != UNIFORM_TASK_ID
        return known and self.layout.idle_rank > 0

    def _can_gather(self, tasks: TaskBatch) -> bool:
        return self.layout.idle_rank >= GATHER_MIN_IDLE_RANK and tasks.ids.dim() == 1 and not tasks.has_reserved

    def _places(self, task_id: int) -> torch.Tensor:
        """Places in the rank vector that a task uses, (V r,) int64; those of the common experts for -1."""
        places = torch.arange(self.layout.total_rank, device=self.A.device)
        common = places[: self.layout.common_rank]
        return common if task_id == COMMON_TASK_ID else torch.cat([common, places[self.layout.own_slice(task_id)]])

    # ZeRO reduces gradients in the order in which they arrive, so all ways must have one order, whichever ranks take
    # them: B, A, gates. It is the reverse of the order in which the parameters are first used.

    def _one_task(self, x: torch.Tensor, ids: torch.Tensor, task_id: int) -> torch.Tensor:
        common = self.layout.common_rank
        own = slice(0, 0) if task_id == COMMON_TASK_ID else self.layout.own_slice(task_id)
        gates = self._gates(x, ids[:1], with_reserved=task_id < 0)
        gates = torch.cat([gates[..., :common], gates[..., own]], dim=-1)
        z = F.linear(self.dropout(x), torch.cat([self.A[:common], self.A[own]]))
        return F.linear(z * gates.to(z.dtype), torch.cat([self.B[:, :common], self.B[:, own]], dim=1))

    def _gathered(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        layout, common = self.layout, self.layout.common_rank
        gates = self._visible_gates(x, ids).repeat_interleave(layout.rank, dim=-1) * self.scale  # (n, 1 or L, V r)
        inputs = self.dropout(x)
        down = self.A[common:].unflatten(0, (layout.num_tasks, -1))[ids]  # (n, N_s r, d_in)
        own = torch.bmm(inputs, down.mT.to(inputs.dtype))
        shared = F.linear(inputs, self.A[:common])
        up = self.B[:, common:].unflatten(1, (layout.num_tasks, -1))[:, ids]  # (d_out, n, N_s r)
        own = torch.bmm(own * gates[..., common:].to(own.dtype), up.permute(1, 2, 0).to(own.dtype))
        if common == 0:
            return own
        return own + F.linear(shared * gates[..., :common].to(shared.dtype), self.B[:, :common])

    def _dense(self, x: torch.Tensor, ids: torch.Tensor, with_reserved: bool) -> torch.Tensor:
        gates = self._gates(x, ids, with_reserved)
        z = F.linear(self.dropout(x), self.A)
        if self.has_task_matrix:
            z = torch.bmm(z, self._matrices(with_reserved)[ids].mT.to(z.dtype))
        if self.shared_down_projection:
            z = z.repeat(1, 1, self.layout.num_experts)
        return F.linear(z * gates.to(z.dtype), self.B)

    def _gates(self, x: torch.Tensor, ids: torch.Tensor, with_reserved: bool) -> torch.Tensor:
        """Gates times scale of each row, or of each token: (n, 1 or L, R)."""
        if self.gate != "token":
            return self.gate_rows(with_reserved)[ids].unsqueeze(1)
        gates = self._visible_gates(x, ids.clamp(min=0))
        tasks = self.layout.num_tasks
        is_task = F.one_hot(ids.clamp(min=0), tasks).to(gates.dtype).unsqueeze(1)
        rows = expand_gates(gates, is_task.expand(-1, x.shape[1], -1), self.layout)
        if with_reserved:
            rows = torch.where((ids < 0)[:, None, None], self._reserved_token_rows(x, ids), rows)
        return rows * self.scale

    def _visible_gates(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Gates of the experts that each row sees: (n, 1, V), (n, L, V) with a token gate; ids in [0, T)."""
        if self.gate == "token" and ids.shape[0] > self.layout.num_tasks:
            # Ids per token: fetching a gate network for each token would cost V d_in numbers a token.
            each = F.linear(x, self.token_gate.flatten(0, 1)).unflatten(-1, (self.layout.num_tasks, -1))
            logits: torch.Tensor = each.take_along_dim(ids[:, None, None, None], dim=2).squeeze(2)
        elif self.gate == "token":
            logits = torch.bmm(x, self.token_gate[ids].mT.to(x.dtype))
        else:
            logits = self._task_logits()[ids].unsqueeze(1)
        if not self.has_gate:
            return logits.exp()
        return normalise_gates(logits, self.normalization, self.temperature)

    def _reserved_token_rows(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Gates (n, L, R) of the reserved tasks where gates depend on the token."""
        layout = self.layout
        logits = F.linear(x, self.token_gate.flatten(0, 1)).unflatten(-1, (layout.num_tasks, layout.visible))
        each = normalise_gates(logits, self.normalization, self.temperature)  # (n, L, T, V)
        places = expand_gates(each, torch.eye(layout.num_tasks, dtype=each.dtype, device=x.device), layout)
        rows = add_reserved_rows(places, logits, layout, self.normalization, self.temperature)
        uniform, common = rows[..., UNIFORM_TASK_ID, :], rows[..., COMMON_TASK_ID, :]
        return torch.where((ids == COMMON_TASK_ID)[:, None, None], common, uniform)

    def _matrices(self, with_reserved: bool) -> torch.Tensor:
        """(T, r, r), or (T + 2, r, r) with the mean for both reserved tasks."""
        if not with_reserved:
            return self.task_matrix
        mean = self.task_matrix.mean(dim=0, keepdim=True)
        return torch.cat([self.task_matrix, mean, mean])
