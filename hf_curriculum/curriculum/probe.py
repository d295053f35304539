"""The throw-away model that the self-paced scorer fine-tunes, with the user's model bit-equal before and after."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from ..core.distributed import is_main_process, rank_and_world
from ..core.errors import invalid
from ..core.modes import evaluation_mode
from ..core.order import draw_order, group_by_length
from .scoring import ScoringInputs, autocast, collated, row_losses, token_budget_batches


__all__ = ["LORA_LEARNING_RATE", "LORA_RANK", "ProbeTraining", "open_probe"]

# Our choice: a small adapter on every linear layer, which has few steps to learn in.
LORA_LEARNING_RATE = 1e-3
LORA_RANK = 8
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 10


@contextmanager
def open_probe(kind: str, inputs: ScoringInputs) -> Iterator[tuple[nn.Module, float]]:
    """
    Opens the probe for training, and takes every trace of it away again.

    Args:
        kind (`str`):
            `"lora"`: a fresh LoRA on the model, or the model's own adapter if it is a PEFT model. `"full"`: the
            model's trainable weights. Anything else: Hub id or path of a model with the same vocabulary.
        inputs ([`~hf_curriculum.curriculum.scoring.ScoringInputs`]):
            The model, its device and the seed.

    Yields:
        `tuple[nn.Module, float]`: the probe and its default learning rate.

    Raises:
        `ValueError`: if `"full"` is asked of a PEFT model, nothing in the model can learn, or a named model has
            another vocabulary.
    """
    model = inputs.model
    if kind not in ("lora", "full"):
        yield _load_proxy(kind, inputs), inputs.learning_rate
        return
    if model is None:
        raise invalid("model", model, f"a model for `probe={kind!r}` to fine-tune")
    is_peft = isinstance(model, PeftModel)
    if kind == "full" and is_peft:
        raise invalid(
            "probe", kind, "'lora' with a PEFT model", "Then the probe is your adapter, put back afterwards."
        )
    if kind == "full" or is_peft:
        with _weights_put_back(model):
            yield model, inputs.learning_rate
    else:
        with _temporary_lora(model, inputs.seed) as probe:
            yield probe, LORA_LEARNING_RATE


def _load_proxy(name: str, inputs: ScoringInputs) -> nn.Module:
    proxy: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if inputs.processing_class is not None:
        ours, theirs = inputs.processing_class.get_vocab(), AutoTokenizer.from_pretrained(name).get_vocab()  # type: ignore[attr-defined]
        if ours != theirs:
            raise invalid(
                "probe",
                name,
                f"a model with the vocabulary of the training run ({len(ours)} tokens; {name} has {len(theirs)})",
                "Rows are tokenised once, for the model that will be trained.",
            )
    return proxy.to(inputs.device)


@contextmanager
def _weights_put_back(model: nn.Module) -> Iterator[None]:
    """Copies what can learn to the CPU, and back at the end, whatever happened."""
    saved = {name: parameter.detach().cpu().clone() for name, parameter in _trainable(model).items()}
    if not saved:
        raise invalid(
            "model",
            "no parameter with `requires_grad`",
            "a model in which something can learn",
            "Or use `probe='lora'`.",
        )
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in _trainable(model).items():
                parameter.copy_(saved[name])
                parameter.grad = None


def _trainable(model: nn.Module) -> Mapping[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def _temporary_lora(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """Wraps linear layers with LoRA, and unwraps them, restoring flags and attributes that PEFT sets on the model."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    attributes = set(vars(model))
    with torch.random.fork_rng(devices=_cuda_devices()):
        torch.manual_seed(seed)
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type=None)
        probe = get_peft_model(model, config)
    try:
        yield probe
    finally:
        probe.unload()
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count()))


@contextmanager
def _learning_mode(probe: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Evaluation mode, so without dropout; where activations are to be recomputed, the nearest mode that does so."""
    base = unwrap_peft_model(probe)
    with evaluation_mode(probe):
        if not (checkpointing and isinstance(base, PreTrainedModel) and base.supports_gradient_checkpointing):
            yield
            return
        probe.train()
        for module in probe.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        already = base.is_activation_checkpointing
        if not already:
            base.activation_checkpointing_enable()
        try:
            yield
        finally:
            if not already:
                base.activation_checkpointing_disable()


class ProbeTraining:
    """
    Plain weighted training of the probe, with the same global batches whatever the number of processes.

    AdamW without weight decay, a constant learning rate after ten warm-up steps, gradients clipped to norm 1, no
    dropout (it would make the result depend on the number of processes). Our choice.

    Args:
        inputs ([`~hf_curriculum.curriculum.scoring.ScoringInputs`]):
            The rows.
        probe (`nn.Module`):
            The model to train.
        learning_rate (`float`):
            Its learning rate.
        batch_size (`int`):
            Rows in a step over all processes.
    """

    def __init__(self, inputs: ScoringInputs, probe: nn.Module, learning_rate: float, batch_size: int) -> None:
        self.inputs = inputs
        self.probe = probe
        self.batch_size = batch_size
        self.parameters = [parameter for parameter in probe.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS)
        )

    def run(self, rows: np.ndarray, weights: np.ndarray, num_steps: int, phase: int) -> None:
        """
        Trains for some steps.

        Args:
            rows (`np.ndarray` of shape `(M,)`, int64):
                Indices of the rows to draw from, in seeded passes.
            weights (`np.ndarray` of shape `(M,)`, float64):
                Their weights in the loss, above 0.
            num_steps (`int`):
                Optimizer steps.
            phase (`int`):
                Which phase of the measurement this is; part of the seed.
        """
        bar = tqdm(
            total=num_steps,
            desc=f"Self-paced phase {phase + 1}: training on {len(rows):,} rows",
            leave=False,
            disable=not (self.inputs.progress and is_main_process()),
        )
        with _learning_mode(self.probe, self.inputs.gradient_checkpointing):
            for picked in self._batches(rows, num_steps, phase):
                self._step(rows[picked], weights[picked])
                bar.update()
        bar.close()

    def _batches(self, rows: np.ndarray, num_steps: int, phase: int) -> Iterator[np.ndarray]:
        order = draw_order(len(rows), num_steps * self.batch_size, self.inputs.seed, phase)
        # Longer stretches would reach from one pass into the next, where a row's two copies would share a step.
        stretch = max(1, len(rows) // (4 * self.batch_size))
        order = group_by_length(
            order, self.inputs.lengths[rows], self.batch_size, self.inputs.seed, phase, group_batches=stretch
        )
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _step(self, indices: np.ndarray, weights: np.ndarray) -> None:
        rank, world = rank_and_world()
        total = float(weights @ self.inputs.label_counts[indices])
        mine, mine_weights = indices[rank::world], weights[rank::world]
        for micro in token_budget_batches(self.inputs.batch_lengths[mine], self.inputs.batch_tokens):
            batch = collated(self.inputs, mine[micro])
            with autocast(self.inputs):
                losses, _ = row_losses(self.probe, batch)
            (
                losses @ torch.as_tensor(mine_weights[micro], dtype=losses.dtype, device=losses.device) / total
            ).backward()
        if world > 1:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
