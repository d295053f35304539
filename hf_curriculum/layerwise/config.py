"""What a user can set about layer-wise fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..core.errors import invalid
from .policies import LayerPolicy, make_policy


__all__ = ["LayerwiseConfig"]


@dataclass
class LayerwiseConfig:
    r"""
    Which layers learn, and when that is decided anew.

    The abstract of ALF (Lee, IJASC 2025) names the signal (the weight change rate of each layer) and the share of the
    parameters that learn (20 to 30 %), nothing else: every other default is our choice.

    Args:
        policy (`str` or [`~hf_curriculum.layerwise.policies.LayerPolicy`], *optional*, defaults to `"adaptive"`):
            Who decides: `"adaptive"` (weight change rate, ours for ALF), `"random"` (LISA), `"cyclic"` (BAdam),
            `"gradient"` (gradient norm), `"spectrum"` (signal-to-noise ratio of the weights, once), `"last_n"` (the
            top of the model), `"gradual_unfreezing"` (from the top down), `"fixed"` (`blocks`), or an object of yours.
        active_fraction (`float`, *optional*, defaults to `0.25`):
            Share of the block parameters (of adapters: of theirs) that learns at once, in (0, 1]. Met within one block
            and never exceeded.
        interval_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two decisions, at least 1.
        warmup_steps (`int`, *optional*):
            Steps in which every block learns in turn, as many at once as the budget allows, so that each is measured
            before the first decision. Defaults to 10 for each turn, a fifth of the run at most. For policies by change
            rate, as `"adaptive"`.
        max_depth (`float`, *optional*, defaults to `1.0`):
            Share of the depth that back-propagation may cross, from the top down, in (0, 1]. Blocks below never learn:
            on adapters this alone saves time.
        smoothing (`float`, *optional*, defaults to `0.7`):
            Weight of the old score in the moving average of a block's measurements, in [0, 1).
        normalize_rates (`bool`, *optional*, defaults to `True`):
            Whether a change rate is divided by the sum of the learning rates of its steps, so that rates of different
            times can be compared while the learning rate changes.
        exploration (`float`, *optional*):
            Of `"adaptive"` and `"gradient"`: share of the budget for the blocks that have not learned for longest.
        aging (`float`, *optional*):
            Of `"adaptive"`: growth of a frozen block's score per decision.
        order (`str`, *optional*):
            Of `"cyclic"`: `"random"`, `"ascending"` or `"descending"`.
        blocks (`list[str]`, *optional*):
            Of `"fixed"`: names of the blocks that learn, such as `layers.3`.
        always_train (`list[str]`, *optional*, defaults to `[]`):
            Parts outside the blocks that learn beside them, such as `lm_head` or `norm`. Without, embeddings, final
            norm and output embeddings are frozen; a task head and the `modules_to_save` of an adapter always learn.
        block_modules (`list[str]`, *optional*, defaults to `[]`):
            Paths of the module lists (or modules) that are the blocks, where they cannot be found.
        ramp_steps (`int`, *optional*, defaults to `5`):
            Steps over which the learning rate of a newly active block rises to that of the others: its optimizer
            state is new, and the first steps of Adam are as long as the learning rate whatever the gradient. At least
            1, which is no ramp.
        free_prefix (`bool`, *optional*, defaults to `True`):
            Whether to take the hook off the embeddings that lets gradients run below the lowest active block, which
            transformers and PEFT put on for gradient checkpointing. Left on where checkpointing is reentrant.
        verify (`bool`, *optional*, defaults to `True`):
            Whether to check after the first switch that frozen blocks stand still, active ones move, and ranks agree.
        seed (`int`, *optional*):
            Of the policies that draw. Defaults to the training arguments' seed.

    Raises:
        `ValueError`: for a value out of range, or an option that the policy does not have.
    """

    policy: str | LayerPolicy = field(
        default="adaptive",
        metadata={
            "help": "Who decides which layers learn: adaptive, random, cyclic, gradient, spectrum, last_n, "
            "gradual_unfreezing, fixed.",
            "cli_type": str,
        },
    )
    active_fraction: float = field(
        default=0.25, metadata={"help": "Share of the block parameters that learns at once, in (0, 1]."}
    )
    interval_steps: int = field(default=50, metadata={"help": "Optimizer steps between two decisions."})
    warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps in which every block learns in turn. Default: 10 each turn, a fifth of the run at most."
        },
    )
    max_depth: float = field(
        default=1.0, metadata={"help": "Share of the depth that back-propagation may cross, in (0, 1]."}
    )
    smoothing: float = field(
        default=0.7, metadata={"help": "Weight of the old score in a block's average, in [0, 1)."}
    )
    normalize_rates: bool = field(
        default=True, metadata={"help": "Divide a change rate by the sum of the learning rates of its steps."}
    )
    exploration: float | None = field(
        default=None, metadata={"help": "adaptive, gradient: share of the budget for blocks long frozen."}
    )
    aging: float | None = field(
        default=None, metadata={"help": "adaptive: growth of a frozen block's score per decision."}
    )
    order: str | None = field(default=None, metadata={"help": "cyclic: random, ascending or descending."})
    blocks: list[str] | None = field(default=None, metadata={"help": "fixed: names of the blocks that learn."})
    always_train: list[str] | None = field(
        default=None, metadata={"help": "Parts outside the blocks that learn too, such as lm_head."}
    )
    block_modules: list[str] | None = field(
        default=None, metadata={"help": "Paths of the module lists that are the blocks, where they cannot be found."}
    )
    ramp_steps: int = field(
        default=5, metadata={"help": "Steps over which a newly active block's learning rate rises; 1 for none."}
    )
    free_prefix: bool = field(
        default=True, metadata={"help": "Stop back-propagation below the lowest active block where that is exact."}
    )
    verify: bool = field(
        default=True, metadata={"help": "Check after the first switch that what is frozen stands still."}
    )
    seed: int | None = field(default=None, metadata={"help": "Seed of the policies that draw. Default: --seed."})

    def __post_init__(self) -> None:
        for name in ("active_fraction", "max_depth"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0.0 < value <= 1.0:
                raise invalid(name, repr(value), "a float in (0, 1]")
        if not isinstance(self.smoothing, int | float) or not 0.0 <= self.smoothing < 1.0:
            raise invalid("smoothing", repr(self.smoothing), "a float in [0, 1)")
        for name in ("interval_steps", "ramp_steps"):
            _check_steps(name, getattr(self, name))
        if self.warmup_steps is not None:
            _check_steps("warmup_steps", self.warmup_steps)
        if self.policy != "fixed":
            self.make_policy()
        elif not self.blocks:
            raise invalid("blocks", self.blocks, "names of the blocks that learn, for `policy='fixed'`")

    def make_policy(self, **resolved: Any) -> LayerPolicy:
        """
        Makes the policy.

        Args:
            resolved:
                Options as the policy takes them, in place of the config's: the numbers of the `blocks`.

        Returns:
            [`~hf_curriculum.layerwise.policies.LayerPolicy`]

        Raises:
            `ValueError`: for an option that the policy does not have.
        """
        options = {name: getattr(self, name) for name in ("exploration", "aging", "order", "blocks")}
        options = {name: value for name, value in {**options, **resolved}.items() if value is not None}
        return make_policy(self.policy, **options)

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON, a policy object by its `repr`, or by its class where that is no more than an address."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        policy, kind = self.policy, type(self.policy)
        if not isinstance(policy, str):
            plain = kind.__repr__ is object.__repr__
            policy = f"{kind.__module__}.{kind.__qualname__}" if plain else repr(policy)
        return {**values, "policy": policy}


def _check_steps(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise invalid(name, value, "an integer >= 1")
