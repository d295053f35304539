"""
The language-model head over labelled positions only, in chunks, without a `(tokens, vocabulary)` tensor.

Shapes: B rows in the batch, S positions in a row, H hidden size, V vocabulary, T labelled positions in the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import unwrap_peft_model

from .errors import unsupported


__all__ = ["CausalLMHead", "LabelledPositions", "causal_lm_head", "gather_labelled", "is_causal_lm", "token_nll"]

# Elements of one chunk of logits. 2^24 float32 values are 64 MB: large enough for an efficient GEMM at any vocabulary,
# small beside the activations of one batch. Our choice, measured in benchmarks/scoring.py.
LOGITS_PER_CHUNK = 2**24


@dataclass(frozen=True)
class CausalLMHead:
    """
    A causal language model cut before its head.

    Args:
        backbone (`nn.Module`):
            Maps a batch without labels to an output with `last_hidden_state` of shape `(B, S, H)`.
        projection (`nn.Linear`, or a layer with its `weight`):
            Maps hidden states `(T, H)` to raw logits `(T, V)`; called as a module, so that adapters, quantisation and
            ZeRO-3 hooks on it work.
        logit_scale (`float`):
            Factor on the raw logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`, ...).
        softcap (`float`, *optional*):
            Gemma's `final_logit_softcapping` c (`logits_soft_cap`, `output_logit_soft_cap` elsewhere): logits become
            c * tanh(logits / c), after the scale.
    """

    backbone: nn.Module
    projection: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Projects hidden states.

        Args:
            hidden (`torch.Tensor` of shape `(T, H)`):
                Hidden states at any positions.

        Returns:
            `torch.Tensor` of shape `(T, V)`, float32: the logits as the model's own forward defines them.
        """
        logits: torch.Tensor = self.projection(hidden).float()
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@dataclass(frozen=True)
class LabelledPositions:
    """
    The positions of a batch that carry a label.

    Args:
        hidden (`torch.Tensor` of shape `(T, H)`):
            Hidden state that predicts each label.
        targets (`torch.Tensor` of shape `(T,)`, int64):
            The labels.
        rows (`torch.Tensor` of shape `(T,)`, int64):
            Row of the batch that each position is in.
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor


def _logit_scale(config: object) -> float:
    """Factor that the model's own forward puts on its logits; 1 where the architecture has none."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (value := getattr(config, name, None)) is not None:
            return float(value)
    if (value := getattr(config, "logits_scaling", None)) is not None:
        # Granite and MiniCPM divide by it, HyperCLOVA X multiplies.
        return float(value) if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / float(value)
    return 1.0


def _softcap(config: object) -> float | None:
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((value for name in names if (value := getattr(config, name, None))), None)


def is_causal_lm(model: nn.Module) -> bool:
    """
    Whether the class of a model is one of transformers' causal language models.

    GPT-2 and its time name no `loss_type`, by which the Trainer tells.

    Args:
        model (`nn.Module`):
            The model, maybe with adapters.

    Returns:
        `bool`
    """
    return type(unwrap_peft_model(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def causal_lm_head(model: nn.Module) -> CausalLMHead:
    """
    Cuts a causal language model into backbone and head.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model. Adapters that live in its modules (LoRA and the like) stay active.

    Returns:
        [`CausalLMHead`]

    Raises:
        `NotImplementedError`: if the model has no separate head, or if its PEFT method works on the inputs (prompt
            learning), which a call of the backbone would bypass.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise unsupported(
            f"A per-token loss with the PEFT method {model.active_peft_config.peft_type}",
            "its virtual tokens are added outside the backbone and would be left out",
            "Score first with the base model, then train with `scorer='column'`.",
        )
    base = unwrap_peft_model(model)
    if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None or base.base_model is base:
        raise unsupported(
            f"A per-token loss of {type(base).__name__}",
            "it has no language-model head to project labelled positions with",
            "Use a causal language model, or bring your own score with `scorer='column'`.",
        )
    config = base.config.get_text_config()
    return CausalLMHead(
        backbone=base.base_model,
        projection=base.get_output_embeddings(),
        logit_scale=_logit_scale(config),
        softcap=_softcap(config),
    )


def gather_labelled(hidden: torch.Tensor, labels: torch.Tensor) -> LabelledPositions:
    """
    Picks the positions that predict a label: position s predicts `labels[:, s + 1]`.

    Args:
        hidden (`torch.Tensor` of shape `(B, S, H)`):
            Last hidden states.
        labels (`torch.Tensor` of shape `(B, S)`, int64):
            Token ids, -100 where there is no label. The first column is never predicted.

    Returns:
        [`LabelledPositions`], in row-major order; empty, but connected to the graph, without any label.
    """
    shifted = labels[:, 1:]
    rows, columns = torch.nonzero(shifted != -100, as_tuple=True)
    return LabelledPositions(hidden=hidden[rows, columns], targets=shifted[rows, columns], rows=rows)


def _chunks(positions: LabelledPositions, vocabulary: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    for start in range(0, len(positions.targets), size):
        yield positions.hidden[start : start + size], positions.targets[start : start + size]


def token_nll(positions: LabelledPositions, head: CausalLMHead) -> torch.Tensor:
    r"""
    Negative log-likelihood of each label, -log softmax(logits)[target].

    Only one chunk of logits exists at a time, in the backward pass too, where each chunk is projected again.

    Args:
        positions ([`LabelledPositions`]):
            Hidden states and labels.
        head ([`CausalLMHead`]):
            The projection.

    Returns:
        `torch.Tensor` of shape `(T,)`, float32, in nats. With gradient to the hidden states and to a trainable head,
        in grad mode.
    """

    def chunk_nll(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head.logits(hidden), targets, reduction="none")

    if len(positions.targets) == 0:
        return positions.hidden.float().sum(dim=-1)
    vocabulary = head.projection.weight.shape[0]
    if not torch.is_grad_enabled():
        return torch.cat([chunk_nll(*chunk) for chunk in _chunks(positions, vocabulary)])
    return torch.cat([checkpoint(chunk_nll, *chunk, use_reentrant=False) for chunk in _chunks(positions, vocabulary)])
