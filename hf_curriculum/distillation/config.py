"""What a distillation run is told, checked when it is made."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedModel

from ..core.errors import invalid
from .losses import DIVERGENCES


__all__ = ["DISTILL_ON", "TEACHERS", "TEACHER_CACHES", "DistillationConfig", "described"]

TEACHERS = ("previous_stage", "base", "ema", "none")
TEACHER_CACHES = ("none", "top_k")
DISTILL_ON = ("all", "current", "replay")

DEFAULT_BETA = 0.5
DEFAULT_EMA_DECAY = 0.999
DEFAULT_TOP_K = 64


@dataclass
class DistillationConfig:
    r"""
    What the model must not forget, and how strongly it is held to it.

    The loss of one labelled token is

    $$(1 - \alpha)\, \mathrm{CE} + \alpha\, T^2\, D(p_\text{teacher}^{1/T}, p_\text{student}^{1/T})$$

    after Hinton et al. (2015), whose T^2 keeps the size of the gradient when the temperature T changes. CL-Tuning
    distils from the model as it was at the end of the previous stage; the numbers in its loss are not public, so all
    defaults are ours, measured in docs/distillation.md. While there is no teacher (in the first stage), the loss is
    the cross-entropy alone, at weight 1. The evaluation loss is always the cross-entropy.

    Args:
        teacher (`str` or [`~transformers.PreTrainedModel`], *optional*, defaults to `"previous_stage"`):
            `"previous_stage"` (the model at the end of the stage before; needs stages), `"base"` (the model before
            training; with an adapter, the model without it), `"ema"` (running average of the student), `"none"`, or
            another model of the same vocabulary: an object, a Hub id or a path. A path that is called like one of
            the words is written `./base`.
        alpha (`float` or `list[float]`, *optional*, defaults to `0.25`):
            Weight of the distillation, in [0, 1]. A list has one value per stage; with `teacher="previous_stage"`
            its first value is 0, since the first stage has no teacher.
        temperature (`float` or `list[float]`, *optional*, defaults to `1.0`):
            T > 0 of both distributions, in the distillation alone. A list has one value per stage.
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            D: `"forward_kl"` (KL(teacher || student)), `"reverse_kl"` (KL(student || teacher)) or `"jsd"`
            (generalized Jensen-Shannon divergence).
        beta (`float`, *optional*):
            Interpolation of `divergence="jsd"`, in [0, 1], as in TRL: 0 is the forward, 1 the reverse KL. Defaults to
            0.5 there.
        distill_on (`str`, *optional*, defaults to `"all"`):
            Rows with a distillation term: `"all"`, those of the stage itself (`"current"`), or those replayed from
            earlier stages (`"replay"`); the last two need stages with replay. Other rows have the cross-entropy alone.
        teacher_cache (`str`, *optional*, defaults to `"none"`):
            `"top_k"` writes the teacher's k largest log-probabilities of each labelled token to disk, in one pass at
            the stage boundary (or before training, for a teacher that stays), instead of running the teacher at each
            step. The rest of its probability is one more outcome, the tail.
        cache_top_k (`int`, *optional*):
            k of `teacher_cache="top_k"`, at least 1. Defaults to 64 there.
        ema_decay (`float`, *optional*):
            Decay of `teacher="ema"` per optimizer step, in (0, 1). Defaults to 0.999 there.
        offload_teacher (`bool`, *optional*, defaults to `False`):
            Whether a teacher that is another model waits in CPU memory between its forward passes.

    Raises:
        `ValueError`: for a value out of range, or one that does nothing beside the others.

    Example:

    ```python
    >>> from hf_curriculum import DistillationConfig

    >>> DistillationConfig(alpha=[0.0, 0.3, 0.5], temperature=2.0).teacher
    'previous_stage'
    ```
    """

    teacher: str | PreTrainedModel = field(
        default="previous_stage",
        metadata={
            "help": f"One of {', '.join(TEACHERS)}, or the Hub id or path of a model of the same vocabulary.",
            "cli_type": str,
        },
    )
    alpha: float | list[float] = field(
        default=0.25,
        metadata={
            "help": "Weight of the distillation in [0, 1]; one value, or one per stage.",
            "cli_type": list[float],
        },
    )
    temperature: float | list[float] = field(
        default=1.0,
        metadata={
            "help": "Temperature of the distillation, > 0; one value, or one per stage.",
            "cli_type": list[float],
        },
    )
    divergence: str = field(default="forward_kl", metadata={"help": f"One of {', '.join(DIVERGENCES)}."})
    beta: float | None = field(
        default=None, metadata={"help": "Interpolation of `divergence=jsd`: 0 forward KL, 1 reverse KL. None: 0.5."}
    )
    distill_on: str = field(
        default="all", metadata={"help": f"Rows with a distillation term: one of {', '.join(DISTILL_ON)}."}
    )
    teacher_cache: str = field(
        default="none", metadata={"help": f"What is kept instead of a teacher: one of {', '.join(TEACHER_CACHES)}."}
    )
    cache_top_k: int | None = field(
        default=None, metadata={"help": "Log-probabilities kept per token with `teacher_cache=top_k`. None: 64."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay per optimizer step of `teacher=ema`. None: 0.999."}
    )
    offload_teacher: bool = field(
        default=False, metadata={"help": "Keep a teacher that is another model in CPU memory between its passes."}
    )

    def __post_init__(self) -> None:
        self.alpha = _scalar_or_list(self.alpha)
        self.temperature = _scalar_or_list(self.temperature)
        self._check_choices()
        self._check_ranges()
        if self.enabled:
            self._check_combinations()

    @property
    def enabled(self) -> bool:
        """Whether there is a teacher at all."""
        return self.teacher != "none"

    @property
    def names_model(self) -> bool:
        """Whether the teacher is another model than the one that learns."""
        return self.teacher not in TEACHERS

    def alpha_in(self, stage: int) -> float:
        """
        Weight of the distillation in a stage.

        Args:
            stage (`int`):
                Index of the stage; 0 in a run without stages.

        Returns:
            `float`: alpha.
        """
        return self.alpha[stage] if isinstance(self.alpha, list) else self.alpha

    def temperature_in(self, stage: int) -> float:
        """
        Temperature in a stage.

        Args:
            stage (`int`):
                Index of the stage; 0 in a run without stages.

        Returns:
            `float`: T.
        """
        return self.temperature[stage] if isinstance(self.temperature, list) else self.temperature

    def _check_choices(self) -> None:
        for name, choices in (
            ("divergence", DIVERGENCES),
            ("distill_on", DISTILL_ON),
            ("teacher_cache", TEACHER_CACHES),
        ):
            if getattr(self, name) not in choices:
                raise invalid(name, getattr(self, name), f"one of {', '.join(choices)}")
        if not isinstance(self.teacher, str | PreTrainedModel) or self.teacher == "":
            raise invalid(
                "teacher",
                self.teacher if isinstance(self.teacher, str) else type(self.teacher).__name__,
                f"one of {', '.join(TEACHERS)}, the Hub id or path of a model, or a `PreTrainedModel`",
            )

    def _check_ranges(self) -> None:
        for name, low_open, high in (("alpha", False, 1.0), ("temperature", True, float("inf"))):
            values = getattr(self, name)
            listed = values if isinstance(values, list) else [values]
            expected = "a float > 0" if low_open else "a float in [0, 1]"
            for value in listed:
                inside = isinstance(value, int | float) and (0 < value < high if low_open else 0 <= value <= high)
                if not inside or isinstance(value, bool):
                    raise invalid(name, values, expected + (" for each stage" if isinstance(values, list) else ""))
            if not listed:
                raise invalid(name, values, "one value, or one per stage")
        for name, valid, expected in (
            ("beta", self.beta is None or 0 <= self.beta <= 1, "a float in [0, 1]"),
            ("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "a float in (0, 1)"),
            ("cache_top_k", self.cache_top_k is None or self.cache_top_k >= 1, "an integer >= 1"),
        ):
            if not valid:
                raise invalid(name, getattr(self, name), expected)

    def _check_combinations(self) -> None:
        for name, unused, where in (
            ("beta", self.divergence != "jsd", "`divergence='jsd'`"),
            ("ema_decay", self.teacher != "ema", "`teacher='ema'`"),
            ("cache_top_k", self.teacher_cache != "top_k", "`teacher_cache='top_k'`"),
        ):
            if unused and getattr(self, name) is not None:
                raise invalid(name, getattr(self, name), f"None: only {where} reads it")
        if self.offload_teacher and not self.names_model:
            raise invalid(
                "offload_teacher",
                True,
                f"False with `teacher={self.teacher!r}`, which is not a model of its own",
            )
        if self.teacher == "ema" and self.teacher_cache != "none":
            raise invalid("teacher_cache", self.teacher_cache, "none with `teacher='ema'`, which moves at every step")


def _scalar_or_list(values: float | Sequence[float]) -> float | list[float]:
    """A list of one value is what a command line makes of a number."""
    if isinstance(values, list | tuple):
        return values[0] if len(values) == 1 else list(values)
    return values  # type: ignore[return-value]


def described(config: DistillationConfig) -> dict[str, Any]:
    """
    A config as JSON values, without what changes no number.

    Args:
        config ([`DistillationConfig`]):
            The config.

    Returns:
        `dict[str, Any]`: values by name; the teacher alone where there is none.
    """
    if not config.enabled:
        return {"teacher": "none"}
    values = {item.name: getattr(config, item.name) for item in fields(config) if item.name != "offload_teacher"}
    if not isinstance(config.teacher, str):
        values["teacher"] = config.teacher.name_or_path or type(config.teacher).__name__
    return values
