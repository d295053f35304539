"""
Per-row losses of tokenised rows, without full logits: the engine under every scorer that uses a model.

Shapes: N rows, B rows in a batch, S positions in a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers.trainer_utils import unwrap_peft_model

from ..core.distributed import is_main_process, rank_and_world, sum_over_ranks
from ..core.errors import unsupported
from ..core.head import causal_lm_head, gather_labelled, token_nll
from ..core.modes import evaluation_mode


__all__ = [
    "Batch",
    "ScoringInputs",
    "autocast",
    "check_row_losses",
    "collated",
    "row_losses",
    "score_rows",
    "token_budget_batches",
]

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ScoringInputs:
    """
    What a scorer gets: the tokenised rows, the model, and how to run it.

    Args:
        model (`nn.Module`, *optional*):
            The model to be trained. A scorer leaves it as it was, bit by bit.
        rows ([`~datasets.Dataset`] of N rows):
            Tokenised rows, with all their columns.
        batch_columns (`Sequence[str]`):
            The columns that `collate` reads.
        collate (`Callable[[list[dict]], dict[str, torch.Tensor]]`):
            Makes a padded batch with `labels` out of rows: the trainer's data collator.
        lengths (`np.ndarray` of shape `(N,)`, int64):
            Tokens in each row.
        label_counts (`np.ndarray` of shape `(N,)`, int64):
            Labelled tokens in each row, at least 1.
        trainable (`np.ndarray` of shape `(N,)`, bool):
            False for evaluation rows, which are scored but must not be learned from.
        device (`torch.device`):
            Where batches go; the model is there already.
        autocast_dtype (`torch.dtype`, *optional*):
            bfloat16 if the run trains in it, else None: float16 would need loss scaling in the probe.
        learning_rate (`float`):
            The training run's.
        gradient_checkpointing (`bool`):
            Whether the training run recomputes activations; a probe then does so too.
        processing_class (`object`, *optional*):
            The run's tokenizer.
        seed (`int`, *optional*, defaults to `0`):
            The run's data seed.
        batch_tokens (`int`, *optional*, defaults to `2048`):
            Tokens, padding included, in one batch of one process.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.
        sizes (`np.ndarray` of shape `(N,)`, int64, *optional*):
            Tokens in each row with the padding that the rows themselves have. Defaults to `lengths`.
    """

    model: nn.Module | None
    rows: Dataset
    batch_columns: Sequence[str]
    collate: Callable[[list[dict[str, Any]]], Batch]
    lengths: np.ndarray
    label_counts: np.ndarray
    trainable: np.ndarray
    device: torch.device
    autocast_dtype: torch.dtype | None
    learning_rate: float
    gradient_checkpointing: bool
    processing_class: object | None = None
    seed: int = 0
    batch_tokens: int = 2048
    progress: bool = True
    sizes: np.ndarray | None = None

    @property
    def batch_lengths(self) -> np.ndarray:
        """Tokens that each row takes in a batch, `(N,)`, int64."""
        return self.lengths if self.sizes is None else self.sizes


def token_budget_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """
    Groups rows of similar length into batches of at most `batch_tokens` tokens after padding.

    Args:
        lengths (`np.ndarray` of shape `(N,)`, int64):
            Tokens in each row.
        batch_tokens (`int`):
            The budget; a longer row has a batch of its own.

    Returns:
        `list[np.ndarray]`: row indices of each batch, longest rows first, so that a batch too large for the memory
        fails at once. Every row is in exactly one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def row_losses(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sum of the loss over each row's labels, and how many they are.

    Args:
        model (`nn.Module`):
            A causal language model, which is run without its head, or a sequence classifier.
        batch (`dict[str, torch.Tensor]`):
            Inputs with `labels`: `(B, S)` with -100 where there is none, or one label per row for a classifier.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, both of shape `(B,)`: losses, float32, in nats (squared error for a
        regression head), with gradient in grad mode; counts, int64.

    Raises:
        `NotImplementedError`: for any other kind of model.
    """
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base = unwrap_peft_model(model)
    kind = getattr(base, "loss_type", None)
    if kind == "ForSequenceClassification":
        losses = _classification_losses(model(**inputs).logits.float(), labels, base.config.problem_type)
        return losses, torch.ones_like(losses, dtype=torch.int64)
    # GPT-2 and its time name no loss; `check_row_losses` tells whether they are what they seem.
    if kind not in ("ForCausalLM", None) or getattr(base.config, "is_encoder_decoder", False):
        raise unsupported(
            f"A loss-based difficulty of {type(base).__name__}",
            "only causal language models and sequence classifiers have one loss per row here",
            "Use `scorer='length'`, or bring your own score with `scorer='column'`.",
        )
    head = causal_lm_head(model)
    hidden = head.backbone(**inputs, use_cache=False).last_hidden_state  # [B, S, H]
    positions = gather_labelled(hidden, labels)
    nll = token_nll(positions, head)  # [T]
    losses = nll.new_zeros(labels.shape[0]).index_add(0, positions.rows, nll)
    return losses, torch.bincount(positions.rows, minlength=labels.shape[0])


def check_row_losses(inputs: ScoringInputs, model: nn.Module) -> None:
    """
    Compares the loss of one row with the model's own logits.

    Some architectures transform hidden states between backbone and head (RoBERTa's decoder, say); their losses would
    be wrong without a word.

    Args:
        inputs ([`ScoringInputs`]):
            The rows, of which the shortest is used.
        model (`nn.Module`):
            The model to score with.

    Raises:
        `NotImplementedError`: if the losses differ.
    """
    batch = collated(inputs, np.argmin(inputs.batch_lengths, keepdims=True))
    with evaluation_mode(model), torch.inference_mode(), autocast(inputs):
        ours = row_losses(model, batch)[0]
        if batch["labels"].ndim == 1 or batch["labels"].is_floating_point():
            return  # a classifier's loss comes from its own logits
        labels = batch["labels"][:, 1:]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1].float()
        theirs = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    exact = inputs.autocast_dtype is None and model.dtype == torch.float32
    if not torch.allclose(ours.sum(), theirs, rtol=1e-3 if exact else 2e-2, atol=1e-3):
        raise unsupported(
            f"A loss-based difficulty of {type(unwrap_peft_model(model)).__name__}",
            f"its head is more than a projection (a row's loss is {theirs.item():.4f}, the projection's is "
            f"{ours.sum().item():.4f})",
            "Use `scorer='length'`, or bring your own score with `scorer='column'`.",
        )


def _classification_losses(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    if logits.shape[-1] == 1 or problem_type == "regression":
        return (logits - labels.float().view(logits.shape)).square().sum(dim=-1)
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").sum(dim=-1)
    return F.cross_entropy(logits, labels, reduction="none")


def collated(inputs: ScoringInputs, indices: np.ndarray) -> Batch:
    """
    Makes a batch on the device.

    Args:
        inputs ([`ScoringInputs`]):
            Rows and collator.
        indices (`np.ndarray` of shape `(B,)`, int64):
            Which rows.

    Returns:
        `dict[str, torch.Tensor]`
    """
    columns = inputs.rows.select_columns(list(inputs.batch_columns))[indices.tolist()]
    examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {
        name: value.to(inputs.device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.collate(examples).items()
    }


def score_rows(inputs: ScoringInputs, model: nn.Module, description: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Loss of every row, forward only. Collective at the end.

    Batches are the same whatever the number of processes; each takes every so many of them and keeps its sums until
    one final exchange.

    Args:
        inputs ([`ScoringInputs`]):
            The rows.
        model (`nn.Module`):
            The model to score with, on `inputs.device`.
        description (`str`):
            Label of the progress bar.

    Returns:
        `tuple[np.ndarray, np.ndarray]`, both of shape `(N,)`, float64, equal on every rank: sum of the loss over each
        row's labels, and number of labels.
    """
    rank, world = rank_and_world()
    batches = token_budget_batches(inputs.batch_lengths, inputs.batch_tokens)[rank::world]
    found = np.zeros((2, len(inputs.lengths)))
    bar = tqdm(batches, desc=description, leave=False, disable=not (inputs.progress and is_main_process()))
    with evaluation_mode(model), torch.inference_mode(), autocast(inputs):
        for indices in bar:
            losses, counts = row_losses(model, collated(inputs, indices))
            found[0, indices], found[1, indices] = losses.cpu().numpy(), counts.cpu().numpy()
    losses_and_counts = sum_over_ranks(found, inputs.device)
    return losses_and_counts[0], losses_and_counts[1]


def autocast(inputs: ScoringInputs) -> torch.autocast:
    """The mixed precision of the run, as a context."""
    return torch.autocast(inputs.device.type, dtype=inputs.autocast_dtype, enabled=inputs.autocast_dtype is not None)
