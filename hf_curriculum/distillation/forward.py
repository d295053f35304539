"""
What happens inside a causal language model's forward: the backbone once, then the loss over labelled positions.

A request travels through PEFT, DDP, DeepSpeed and autocast wrappers as one keyword argument, `distillation`, and is
answered inside the forward of the model itself, where a partitioned head is gathered. This works on top of the fused
head that SFTTrainer installs: with `fused_lm_head=True` the answer has TRL's format, so that TRL's reduction of the
loss and its metrics apply unchanged.

Shapes: B rows, S positions in a row, H hidden size, V vocabulary, T labelled positions in the batch.
"""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, ModelOutput
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.trainer_utils import unwrap_peft_model
from trl.trainer.utils import FusedCausalLMOutput

from ..core.errors import unsupported
from ..core.head import CausalLMHead, LabelledPositions, causal_lm_head, gather_labelled
from ..core.modes import evaluation_mode
from ..core.wrappers import unwrapped
from .chunked import HeadTeacher, TokenLosses, TopKTeacher, chunked_token_losses
from .loss_sums import LossSums, loss_sums
from .losses import Divergence
from .projection import HeadWeights


__all__ = ["StudentPass", "TeacherPass", "check_logits", "head_weights", "install", "projection_of"]

NOT_FOR_BACKBONE = {"labels", "shift_labels", "num_items_in_batch", "use_cache", "fused_lm_head"}


class Request(Protocol):
    """Answers the forward call that carries it."""

    def answer(
        self, model: PreTrainedModel, forward: Callable[..., ModelOutput], arguments: dict[str, Any]
    ) -> ModelOutput:
        """Runs `model`, whose own forward is `forward`, on the keyword arguments of the call."""


def install(model: nn.Module) -> None:
    """
    Lets the forward of a model answer requests. Calls without one get the forward it had.

    Args:
        model (`nn.Module`):
            A causal language model, maybe with adapters.
    """
    base = unwrap_peft_model(model)
    # Unbound where it is a method, so that a copy of the model runs its own.
    forward = getattr(base.forward, "__func__", None) or _without_self(base.forward)

    # With the signature of the class: the Trainer reads from it the columns to keep, `generate` what it may pass.
    @functools.wraps(type(base).forward)
    def answering(self: PreTrainedModel, *args: Any, distillation: Request | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return forward(self, *args, **kwargs)
        return distillation.answer(self, functools.partial(forward, self), kwargs)

    base.forward = types.MethodType(answering, base)


def _without_self(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: forward(*args, **kwargs)


def projection_of(head: CausalLMHead) -> nn.Module:
    """
    The module whose weight projects hidden states to logits.

    Args:
        head ([`~hf_curriculum.core.head.CausalLMHead`]):
            The model's head. A copy that PEFT trains in full (`modules_to_save`) counts as the head.

    Returns:
        `nn.Module`: with `weight` of shape `(V, H)` and maybe `bias` of shape `(V,)`.

    Raises:
        `NotImplementedError`: for a head with adapters or of integers, which is more than one weight.
    """
    module: nn.Module = head.projection
    if isinstance(module, ModulesToSaveWrapper):
        disabled = module.disable_adapters or not module.active_adapters
        module = module.original_module if disabled else module.modules_to_save[module.active_adapters[0]]
    # Its own parameter: the tokens that PEFT trains, for one, make an attribute `weight` of two.
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if isinstance(module, BaseTunerLayer) or weight is None or not weight.is_floating_point():
        raise unsupported(
            f"Distillation with a language-model head of type {type(module).__name__}",
            "the chunked loss reads one floating-point weight and would leave out what stands beside it",
            "Keep the head, and embeddings tied to it, out of `target_modules`, `trainable_token_indices` and the "
            "quantization; `modules_to_save` may name it.",
        )
    return module


def head_weights(projection: nn.Module, head: CausalLMHead) -> HeadWeights:
    """
    The weights of a head as they are now.

    Args:
        projection (`nn.Module`):
            What [`projection_of`] gave, gathered.
        head ([`~hf_curriculum.core.head.CausalLMHead`]):
            Scale and soft-cap.

    Returns:
        [`~hf_curriculum.distillation.projection.HeadWeights`]
    """
    # Under FSDP2 the parameters of the root module can still be sharded here.
    whole = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in projection.named_parameters(recurse=False)
    }
    return HeadWeights(whole["weight"], whole.get("bias"), logit_scale=head.logit_scale, softcap=head.softcap)


def _as_forward(module: nn.Module, function: Callable[..., Any], *args: torch.Tensor) -> Any:
    """
    Calls a function as if it were the forward of a module.

    So the hooks of the module run: under ZeRO-3 they gather its weight for the function, and again before the gradient
    of the weight arrives. What the function returns must be a tuple of tensors, or they do not see it.
    """
    own = vars(module).get("forward")
    module.forward = function
    try:
        return module(*args)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _labelled(
    model: PreTrainedModel, head: CausalLMHead, arguments: dict[str, Any]
) -> tuple[LabelledPositions, ModelOutput]:
    """Runs the backbone; gives the labelled positions and the backbone's output."""
    if arguments.get("shift_labels") is not None:
        raise unsupported(
            "Distillation with `shift_labels` (context or sequence parallelism)",
            "a row is split over processes there, and a position and its label are on different ones",
            "Leave the parallelism out.",
        )
    passed = {name: value for name, value in arguments.items() if name not in NOT_FOR_BACKBONE}
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        passed.setdefault("output_router_logits", True)
    outputs = head.backbone(**passed, use_cache=False)
    hidden = outputs.last_hidden_state.to(head.projection.weight.device)
    return gather_labelled(hidden, arguments["labels"].to(hidden.device)), outputs


@dataclass(frozen=True)
class TeacherPass:
    """A forward that gives the last hidden states at the labelled positions, `(T, H)`, and no logits."""

    def answer(
        self, model: PreTrainedModel, forward: Callable[..., ModelOutput], arguments: dict[str, Any]
    ) -> ModelOutput:
        """See [`Request`]."""
        positions, _ = _labelled(model, causal_lm_head(model), arguments)
        return BaseModelOutput(last_hidden_state=positions.hidden)


@dataclass
class LogitsPass:
    """
    A forward that holds the model's own logits of the last position against those of its head.

    Attributes:
        own (`torch.Tensor` of shape `(B, V)`):
            The model's. Filled by the forward, as the next.
        projected (`torch.Tensor` of shape `(B, V)`):
            Those of the last hidden state.
    """

    own: torch.Tensor = field(init=False)
    projected: torch.Tensor = field(init=False)

    def answer(
        self, model: PreTrainedModel, forward: Callable[..., ModelOutput], arguments: dict[str, Any]
    ) -> ModelOutput:
        """See [`Request`]."""
        head = causal_lm_head(model)
        passed = {name: value for name, value in arguments.items() if name not in NOT_FOR_BACKBONE}
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
        self.own = forward(**passed, **few, use_cache=False)["logits"][:, -1].float()
        hidden = head.backbone(**passed, use_cache=False).last_hidden_state[:, -1]
        self.projected = head.logits(hidden.to(head.projection.weight.device))
        return BaseModelOutput(last_hidden_state=hidden)


def check_logits(student: nn.Module, inputs: dict[str, Any]) -> None:
    """
    Refuses a model whose logits are not its last hidden states, projected. Collective under ZeRO-3.

    Some architectures transform hidden states between backbone and head (RoBERTa's decoder, say); the loss would be
    wrong without a word.

    Args:
        student (`nn.Module`):
            The wrapped student.
        inputs (`dict[str, Any]`):
            A batch.

    Raises:
        `NotImplementedError`: if the logits of the last position differ by more than rounding explains.
    """
    request = LogitsPass()
    with evaluation_mode(student), torch.no_grad():
        student(**{name: value for name, value in inputs.items() if name != "labels"}, distillation=request)
    largest = request.own.abs().max()
    difference = (request.own - request.projected).abs().max()
    if difference > 2e-2 * largest + 1e-3:
        raise unsupported(
            f"Distillation of {type(unwrap_peft_model(unwrapped(student))).__name__}",
            f"its head is more than a projection (of logits up to {largest:.3g} the projection's differ by "
            f"{difference:.3g})",
            "Train it without a teacher.",
        )


@dataclass
class StudentPass:
    """
    A forward that gives the loss against a teacher's signal.

    Args:
        divergence ([`~hf_curriculum.distillation.losses.Divergence`]):
            D and T.
        alpha (`float` or `torch.Tensor` of shape `(T,)`, float32, *optional*, defaults to `0.0`):
            Weight of the distillation, for all labelled positions or for each.
        teacher ([`HeadTeacher`], [`TopKTeacher`] or `torch.Tensor` of shape `(T, H)`, *optional*):
            The teacher's signal at the labelled positions; hidden states alone are projected by the student's head.
        evaluates (`bool`, *optional*, defaults to `False`):
            Whether the loss is the cross-entropy alone, and the divergence only measured.
        needs_logits (`bool`, *optional*, defaults to `False`):
            Whether the output must hold logits, as an evaluation by the plain Trainer expects.

    Attributes:
        sums ([`LossSums`], *optional*):
            Filled by the forward.
    """

    divergence: Divergence
    alpha: float | torch.Tensor = 0.0
    teacher: HeadTeacher | TopKTeacher | torch.Tensor | None = None
    evaluates: bool = False
    needs_logits: bool = False
    sums: LossSums | None = field(default=None, init=False)

    def answer(
        self, model: PreTrainedModel, forward: Callable[..., ModelOutput], arguments: dict[str, Any]
    ) -> ModelOutput:
        """See [`Request`]."""
        if "labels" not in arguments:
            return forward(**arguments)
        head = causal_lm_head(model)
        positions, outputs = _labelled(model, head, arguments)
        mask = arguments["labels"][:, 1:] != -100
        losses = self._losses(positions, head)
        aux_loss = _aux_loss(model, outputs, arguments)
        if arguments.get("fused_lm_head"):
            return _fused_output(losses, mask, aux_loss)
        count = arguments.get("num_items_in_batch")
        loss = losses.total / (mask.sum().clamp(min=1) if count is None else count)
        if aux_loss is not None:
            loss = loss + model.config.get_text_config().router_aux_loss_coef * aux_loss
        logits = head.logits(outputs["last_hidden_state"]) if self.needs_logits else None
        return CausalLMOutput(loss=loss, logits=logits)

    def _losses(self, positions: LabelledPositions, head: CausalLMHead) -> TokenLosses:
        """Losses of the labelled positions; in an evaluation the loss is the cross-entropy."""
        projection = projection_of(head)
        alpha = self.alpha
        if self.teacher is None:
            alpha = 0.0
        elif self.evaluates:
            # At weight 1 every position is measured; the loss is replaced below.
            alpha = 1.0

        def compute(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            weights = head_weights(projection, head)
            teacher = self.teacher
            if isinstance(teacher, torch.Tensor):
                teacher = HeadTeacher(teacher, weights)
            losses = chunked_token_losses(
                hidden, positions.targets, weights, teacher=teacher, alpha=alpha, divergence=self.divergence
            )
            return tuple(getattr(losses, item.name) for item in fields(losses))

        losses = TokenLosses(*_as_forward(projection, compute, positions.hidden))
        self.sums = loss_sums(losses.ce, losses.kd, alpha)
        return replace(losses, total=losses.ce.sum(), loss=losses.ce) if self.evaluates else losses


def _aux_loss(model: PreTrainedModel, outputs: ModelOutput, arguments: dict[str, Any]) -> torch.Tensor | None:
    """Load-balancing loss of a mixture of experts, where its router's logits were asked for."""
    if outputs.get("router_logits") is None:
        return None
    config = model.config.get_text_config()
    # Mixtral, Granite and Phi call them local.
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    loss = load_balancing_loss_func(
        outputs["router_logits"], experts, config.num_experts_per_tok, arguments.get("attention_mask")
    )
    return torch.as_tensor(loss)


def _fused_output(losses: TokenLosses, mask: torch.Tensor, aux_loss: torch.Tensor | None) -> FusedCausalLMOutput:
    """
    The losses in TRL's format.

    TRL's loss is the sum of `-log_probs` over a number of tokens: so `log_probs` holds the losses with a minus, and
    the gradient of their sum is that of the total.
    """

    def scatter(labelled: torch.Tensor) -> torch.Tensor:
        return labelled.new_zeros(mask.shape).masked_scatter(mask, labelled)

    # Zero, with the gradient of the total: on one element of the sum, since shares of it would round.
    gradient = losses.total - losses.total.detach()
    first, others = scatter(-losses.loss).flatten().tensor_split([1])
    log_probs = torch.cat([first - gradient, others]).view(mask.shape)
    return FusedCausalLMOutput(
        loss=losses.total / mask.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=scatter(losses.entropy),
        is_top1=scatter(losses.is_top1),
        label_mask=mask,
        aux_loss=aux_loss,
    )
