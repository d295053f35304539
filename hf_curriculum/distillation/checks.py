"""What a run with a teacher is refused for before it starts."""

from collections.abc import Sequence

from accelerate import Accelerator
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..core.errors import invalid, unsupported
from ..core.stages import Stage
from .config import DistillationConfig


__all__ = ["check_adapter_off", "check_arguments", "check_loss", "check_snapshot", "check_stages", "check_trainer"]

# Whose `compute_loss` is known: the Trainer's, TRL's, and those of the mixins beside this one.
_KNOWN = ("hf_curriculum", "transformers", "trl")
_SHOWN_NAMES = 3


def check_trainer(trainer: Trainer) -> None:
    """
    Refuses what would change the loss behind the back of the distillation, or split what it is computed on.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.

    Raises:
        `NotImplementedError`: for another loss than the plain cross-entropy, for `model_init`, and for
            `nn.DataParallel`, FSDP1, and context, sequence or tensor parallelism.
    """
    model_init: object = trainer.model_init
    if model_init is not None:
        raise unsupported(
            "Distillation with `model_init`",
            "training then begins with a new model, and the teacher belongs to the one before",
            "Pass `model=model_init()`, and build one trainer for each run.",
        )
    check_arguments(trainer.args, trainer.compute_loss_func)
    _check_backend(trainer.accelerator, trainer.args)


def check_arguments(args: TrainingArguments, compute_loss_func: object) -> None:
    """
    Refuses arguments of the Trainer that would change the loss behind the back of the distillation.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The training arguments.
        compute_loss_func (`object`):
            The user's own loss, if there is one.

    Raises:
        `NotImplementedError`: for another loss than the plain cross-entropy.
    """
    if compute_loss_func is not None:
        raise unsupported(
            "Distillation with `compute_loss_func`",
            "both define the loss, and one of them would be left out",
            "Leave it out, or override `compute_loss` in a subclass and call `super()`.",
        )
    if args.label_smoothing_factor:
        raise unsupported(
            "Distillation with `label_smoothing_factor`",
            "the teacher's distribution takes the place of the smoothed label",
            "Set it to 0.",
        )
    # A field of TRL's; the other name of the same loss is deprecated there.
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type not in ("nll", "chunked_nll"):
        raise unsupported(
            f"Distillation with `loss_type={loss_type!r}`",
            "its weight on each label would also weigh the divergence",
            "Set `loss_type='nll'`.",
        )
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        raise unsupported(
            "Distillation with Liger's fused cross-entropy",
            "it replaces the model's forward when training starts, and the teacher would never be asked",
            "Set `liger_kernel_config={'fused_linear_cross_entropy': False}`, or `use_liger_kernel=False`.",
        )
    if args.torch_compile:
        raise unsupported(
            "Distillation with `torch_compile`",
            "each step runs the model twice, once with the values of the teacher, and was not measured compiled",
            "Set it to False.",
        )
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise unsupported(
            f"Distillation with `hub_strategy={HubStrategy(args.hub_strategy).value!r}`",
            "checkpoints hold the teacher, which is never pushed, and are of no use without it",
            "Set `hub_strategy='every_save'` or `'end'`.",
        )


def check_loss(trainer: type, mixin: type) -> None:
    """
    Refuses a trainer class with a loss of its own, where the distillation takes the place of the Trainer's.

    Args:
        trainer (`type`):
            Class of the trainer.
        mixin (`type`):
            The mixin of the distillation: what stands after it is looked at.

    Raises:
        `NotImplementedError`: if a class that is not known overrides `compute_loss`.
    """
    after = trainer.__mro__[trainer.__mro__.index(mixin) + 1 :]
    for base in after:
        if "compute_loss" in vars(base) and base.__module__.partition(".")[0] not in _KNOWN:
            raise unsupported(
                f"Distillation with the `compute_loss` of {base.__name__}",
                "both define the loss, and one of them would be left out",
                "Put what it adds into a class before the mixin, whose `compute_loss` calls `super().compute_loss()`.",
            )


def _check_backend(accelerator: Accelerator, args: TrainingArguments) -> None:
    parallelism = getattr(accelerator, "parallelism_config", None)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    for found, name, instead in (
        (args.n_gpu > 1, "`nn.DataParallel`", "Start one process per device with `accelerate launch`."),
        (plugin is not None and plugin.fsdp_version != 2, "FSDP1", "Use FSDP2 (`fsdp_version: 2`) or DeepSpeed."),
        (
            parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled),
            "context, sequence or tensor parallelism",
            "Use data parallelism: DDP, ZeRO or FSDP2.",
        ),
    ):
        if found:
            raise unsupported(
                f"Distillation with {name}", "the teacher's signal is computed whole, position by position", instead
            )


def check_snapshot(model: nn.Module) -> None:
    """
    Refuses adapters whose values are not all in parameters that learn, which a snapshot could not hold.

    Args:
        model (`nn.Module`):
            The student.

    Raises:
        `NotImplementedError`: for AdaLoRA and X-LoRA.
    """
    if not isinstance(model, PeftModel):
        return
    method = model.active_peft_config.peft_type
    reasons = {
        PeftType.ADALORA: "it changes the rank of its matrices while it trains, beside the values",
        PeftType.XLORA: "its mixture depends on a second pass of the model, which would see the student's values",
    }
    if method in reasons:
        raise unsupported(
            f"A teacher that is a snapshot with the PEFT method {PeftType(method).value}",
            reasons[method],
            "Use LoRA or another method whose parameters hold all of it, or `teacher='base'`.",
        )


def check_adapter_off(model: nn.Module) -> None:
    """
    Refuses adapters that cannot be switched off layer by layer.

    Args:
        model (`nn.Module`):
            The student, the base of whose adapter is to be the teacher.

    Raises:
        `NotImplementedError`: for prompt learning, and for parameters that learn beside the adapter.
    """
    if not isinstance(model, PeftModel):
        return
    if not isinstance(model.base_model, BaseTuner):
        method = PeftType(model.active_peft_config.peft_type).value
        raise unsupported(
            f"`teacher='base'` with the PEFT method {method}",
            "it is no layer that could be switched off",
            "Name the base model as the teacher, by its Hub id or path.",
        )
    switched = (model.base_model.prefix, "modules_to_save", "trainable_tokens")
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if beside := [name for name in learning if not any(part in name for part in switched)]:
        raise unsupported(
            f"`teacher='base'` with parameters that learn beside the adapter ({', '.join(beside[:_SHOWN_NAMES])})",
            "they are not the base model's any more when the adapter is switched off",
            "Freeze them, or name the base model as the teacher, by its Hub id or path.",
        )


def check_stages(distillation: DistillationConfig, stages: Sequence[Stage]) -> None:
    """
    Compares the config with the stages of the run.

    Args:
        distillation ([`~hf_curriculum.DistillationConfig`]):
            The config.
        stages (`Sequence[Stage]`):
            The stages; empty for a run without.

    Raises:
        `ValueError`: for `"previous_stage"` without stages, a schedule with another number of values, `distill_on`
            without replay.
    """
    if distillation.teacher == "previous_stage" and len(stages) < 2:
        raise invalid(
            "teacher",
            f"previous_stage in a run with {len(stages) or 'no'} stage{'s' * (len(stages) != 1)}",
            "a run with two stages or more",
            "Train with a curriculum (`CurriculumSFTTrainer`), or name another teacher: `base`, `ema`, a model.",
        )
    for name in ("alpha", "temperature"):
        values = getattr(distillation, name)
        if isinstance(values, list) and len(values) != len(stages):
            raise invalid(name, values, f"one value, or {len(stages)}: one for each stage of the run")
    if isinstance(distillation.alpha, list) and distillation.teacher == "previous_stage" and distillation.alpha[0]:
        raise invalid("alpha", distillation.alpha, "0 for the first stage, which has no previous one")
    if distillation.distill_on != "all" and not any(stage.num_replayed for stage in stages):
        raise invalid(
            "distill_on",
            distillation.distill_on,
            "all in a run that replays no rows",
            "Set `replay_fraction` of the curriculum, or leave `distill_on` out.",
        )
