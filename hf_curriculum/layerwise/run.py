"""One training with layer freezing: when a window ends, what was measured in it, and which blocks learn next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.torch import load, save
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core.distributed import is_main_process, on_main_process
from ..core.errors import invalid
from ..core.files import write_atomic
from ..core.parameters import parameters_by_name
from ..core.state import check_same
from .blocks import Blocks
from .check import FreezeCheck
from .config import LayerwiseConfig
from .importance import BlockScores
from .measurement import ChangeMeter, measure_signal_to_noise
from .optimizer import BlockOptimizer
from .policies import LayerHistory, decide, warmup_windows
from .switch import BlockSwitch


__all__ = ["LayerwiseRun", "Window"]

WARMUP_STEPS_PER_TURN = 10


@dataclass
class Window:
    """
    Consecutive optimizer steps with the same blocks learning.

    Args:
        active (`tuple[int, ...]`):
            Numbers of the blocks.
        first_step (`int`):
            Its first optimizer step, from 0.
        end_step (`int`, *optional*):
            The step after its last one; None for the rest of the run.
        turn (`int`, *optional*):
            Of a warm-up window, which one it is, from 0.
        rates (`dict[int, float]`):
            What was measured of blocks in the window before.
    """

    active: tuple[int, ...]
    first_step: int
    end_step: int | None
    turn: int | None = None
    rates: dict[int, float] = field(default_factory=dict)


class LayerwiseRun:
    """
    Lets the blocks of a model learn window by window.

    Args:
        config ([`~hf_curriculum.layerwise.config.LayerwiseConfig`]):
            What the user wants.
        model (`nn.Module`):
            The model that is trained, wrapped or not, nothing frozen yet.
        blocks ([`~hf_curriculum.layerwise.blocks.Blocks`]):
            Its blocks.
        optimizer (`torch.optim.Optimizer` or a wrapper):
            The trainer's; under DeepSpeed with groups per block.
        max_steps (`int`):
            Optimizer steps of the whole run, of which a warm-up that the user has not set takes a fifth at most.
        seed (`int`):
            Of the policies that draw.
        ddp (`DistributedDataParallel`, *optional*):
            The wrapper that trains the model.

    Attributes:
        window ([`Window`], *optional*):
            The current one; None before the first step.
        scores ([`~hf_curriculum.layerwise.importance.BlockScores`]):
            What is known of each block.
        decisions (`list[tuple[int, ...]]`):
            Blocks that the policy chose, decision by decision; warm-up turns are not among them.
    """

    def __init__(
        self,
        config: LayerwiseConfig,
        model: nn.Module,
        blocks: Blocks,
        optimizer: Any,
        *,
        max_steps: int,
        seed: int = 0,
        ddp: DistributedDataParallel | None = None,
    ) -> None:
        self.config, self.blocks, self.seed = config, blocks, seed
        numbers = {} if config.policy != "fixed" else {"blocks": blocks.resolve(config.blocks or [])}
        self.policy = config.make_policy(**numbers)
        self.budget = int(config.active_fraction * blocks.num_parameters + 0.5)
        self.allowed = [
            number for number in range(len(blocks.blocks)) if blocks.depth([number]) <= config.max_depth + 1e-9
        ]
        self._check_budget()
        named = parameters_by_name(model)
        parameters = [[named[name] for name in block.parameters] for block in blocks.blocks]
        self._model = model
        self._frozen = {name: named[name] for name in blocks.frozen}
        self._parameters = {name: named[name] for block in blocks.blocks for name in block.parameters}
        self._block_of = {name: number for number, block in enumerate(blocks.blocks) for name in block.parameters}
        self.optimizer = BlockOptimizer(optimizer, parameters, [named[name] for name in blocks.always])
        self.switch = BlockSwitch(model, parameters, self._frozen.values(), ddp)
        self.scores = BlockScores(len(blocks.blocks), smoothing=config.smoothing)
        self.decisions: list[tuple[int, ...]] = []
        self.window: Window | None = None
        self._meter = ChangeMeter(model, blocks) if self.policy.signal == "change_rate" else None
        self._turns = self._plan_turns(max_steps)
        self._newcomers: list[int] = []
        self._rates: dict[int, float] = {}
        self._since: dict[int, int] = {}
        self._squares: list[float] | None = None
        self._state: dict[str, Any] | None = None
        self._check: FreezeCheck | None = None
        self._checked = not config.verify

    def _check_budget(self) -> None:
        sizes = self.blocks.sizes
        if not self.allowed:
            raise invalid(
                "max_depth", self.config.max_depth, f"at least {self.blocks.depth([len(sizes) - 1]):.3g}",
                "The top block alone needs as much.",
            )  # fmt: skip
        smallest = int(sizes[self.allowed].min())
        if self.budget < smallest:
            raise invalid(
                "active_fraction",
                self.config.active_fraction,
                f"at least {smallest / self.blocks.num_parameters:.3g}, the share of the smallest block",
            )

    def _plan_turns(self, max_steps: int) -> list[tuple[tuple[int, ...], int]]:
        """Warm-up turns and their steps: blocks that learn are measured only while they learn."""
        if getattr(self.policy, "contiguous", False) or getattr(self.policy, "static", False):
            return []
        # Refuses a budget that some block would never fit into, for every policy that decides again and again.
        turns = warmup_windows(self.blocks.sizes, self.budget, allowed=self.allowed)
        if self.policy.signal == "gradient_norm":
            # The gradient of every block is looked at in the one step of this turn.
            return [(turns[0], 1)]
        if self.policy.signal != "change_rate":
            return []
        steps = self.config.warmup_steps
        if steps is None:
            steps = max(len(turns), min(WARMUP_STEPS_PER_TURN * len(turns), max_steps // 5))
        if steps < len(turns):
            raise invalid(
                "warmup_steps", steps, f"at least {len(turns)}", "Every block learns in one of as many turns."
            )
        bounds = [steps * turn // len(turns) for turn in range(len(turns) + 1)]
        return [(active, end - begin) for active, begin, end in zip(turns, bounds, bounds[1:])]

    @property
    def _measured_until(self) -> int:
        """Steps of the shortest window, after which the change of its new blocks is measured in every window."""
        return min([self.config.interval_steps, *(steps for _, steps in self._turns)])

    @property
    def warmup_steps(self) -> int:
        """Steps before the first decision of the policy."""
        return sum(steps for _, steps in self._turns)

    def begin_step(self, step: int) -> None:
        """
        To be called before the first forward of an optimizer step. Collective.

        Args:
            step (`int`):
                Optimizer steps done.
        """
        self.switch.wake()
        if self.window is not None and step == self.window.first_step + self._measured_until and self.is_measuring:
            self._measure_change()
        if self.window is None or step == self.window.end_step:
            self._open(self._next_window(step))
        assert self.window is not None
        if self._meter is not None and step == self.window.first_step + self._measured_until // 2 and self._newcomers:
            self._meter.start(self._newcomers)
            self.optimizer.reset_rates()
            self._state = None
        ramp = {number: (step - since + 1) / self.config.ramp_steps for number, since in self._since.items()}
        self.optimizer.begin_step({number: factor for number, factor in ramp.items() if factor < 1.0})
        if self.policy.signal == "gradient_norm" and step + 1 == self.window.end_step:
            self.optimizer.measure = True
            self.switch.learn(self.allowed)

    def end_step(self, stepped: bool) -> None:
        """
        To be called after an optimizer step. Collective.

        Args:
            stepped (`bool`):
                Whether the step had a learning rate above 0.

        Raises:
            `RuntimeError`: if freezing does not work.
        """
        assert self.window is not None
        if self.optimizer.measure:
            self._squares = self.optimizer.take_gradient_squares().tolist()
            self.optimizer.measure = False
            self.switch.learn(self.window.active)
        if self._check is not None and stepped and self._check.step([block.name for block in self.blocks.blocks]):
            self._check, self._checked = None, True
        if self.blocks.adapters:
            self.switch.rest()

    def close(self) -> dict[int, float]:
        """
        Ends the run: everything requires a gradient again. Collective.

        Returns:
            `dict[int, float]`: what was measured in the last window.
        """
        rates = {} if self.window is None else self._measured()
        self.switch.release()
        self.optimizer.close()
        return rates

    def _next_window(self, step: int) -> Window:
        rates = {} if self.window is None else self._measured()
        if self.window is not None:
            self.scores.update(self.window.active, rates)
        turn = 0 if self.window is None else self.window.turn
        if self.window is not None and turn is not None:
            turn += 1
        if turn is not None and turn < len(self._turns):
            active, steps = self._turns[turn]
            return Window(active, step, step + steps, turn, rates)
        if self.policy.signal == "signal_to_noise" and not self.decisions:
            ratios = measure_signal_to_noise(self._model, self.blocks)
            self.scores.update(range(len(ratios)), dict(enumerate(ratios)))
        history = LayerHistory(
            sizes=self.blocks.sizes,
            scores=self.scores.scores,
            ages=self.scores.ages,
            decisions=tuple(self.decisions),
        )
        active = on_main_process(
            lambda: decide(self.policy, history, self.budget, seed=self.seed, allowed=self.allowed)
        )  # fmt: skip
        self.decisions.append(active)
        static = getattr(self.policy, "static", False)
        return Window(active, step, None if static else step + self.config.interval_steps, None, rates)

    def _measured(self) -> dict[int, float]:
        """The signal of the window that ends."""
        if self._meter is not None:
            return self._rates
        if self._squares is not None:
            norms, self._squares = np.sqrt(self._squares), None
            total = float(np.linalg.norm(norms))
            return {number: float(norms[number]) / total for number in self.allowed} if total > 0.0 else {}
        return {}

    def _measure_change(self) -> None:
        """
        Takes the change rates of the blocks that began to learn with this window.

        Of each over steps of the same number and the same age of the optimizer's state, the later half of the shortest
        window: weights wander, so that a change grows more slowly than the steps, and the steps of a new Adam are
        longer than those of an old one. A block that stays active keeps its score: its state is older.
        """
        assert self._meter is not None
        self._rates = self._meter.rates(self.optimizer.learning_rates if self.config.normalize_rates else None)
        self._meter.reference = None
        self._state = None

    def _open(self, window: Window) -> None:
        before = set() if self.window is None else set(self.window.active)
        self._newcomers = [number for number in window.active if number not in before]
        self._rates = {}
        # Nothing is new against the blocks around it in the first window.
        since = window.first_step if self.window is not None else window.first_step - self.config.ramp_steps
        kept = {number: self._since[number] for number in window.active if number in before}
        self._since = {**dict.fromkeys(self._newcomers, since), **kept}
        self.window = window
        self._apply()

    def _apply(self) -> None:
        assert self.window is not None
        active = self.window.active
        self.switch.learn(active)
        self.optimizer.activate(active)
        self._state = None
        if not self._checked:
            self._check = FreezeCheck({**self._parameters, **self._frozen}, self._block_of, active)

    def state(self) -> dict[str, Any]:
        """
        What a checkpoint must hold, beside what [`~LayerwiseRun.write_reference`] writes.

        Returns:
            `dict[str, Any]`: JSON values, kept up to date until the window ends.
        """
        if self._state is None:
            self._state = self._fixed_state()
        self._state["squares"] = self._squares
        return self._state

    def _fixed_state(self) -> dict[str, Any]:
        """What a window does not change, and the list that its learning rates are added up in."""
        assert self.window is not None
        return {
            "config": self.config.to_dict(),
            "seed": self.seed,
            "blocks": self.blocks.fingerprint(),
            "window": {
                "active": list(self.window.active),
                "first_step": self.window.first_step,
                "end_step": self.window.end_step,
                "turn": self.window.turn,
            },
            "scores": self.scores.state(),
            "decisions": [list(decision) for decision in self.decisions],
            "turns": [[list(active), steps] for active, steps in self._turns],
            "since": [[number, since] for number, since in self._since.items()],
            "newcomers": self._newcomers,
            "rates": [[number, rate] for number, rate in self._rates.items()],
            "is_measuring": self.is_measuring,
            "learning_rates": self.optimizer.learning_rates,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """
        Goes on from a checkpoint, in the middle of a window.

        Args:
            state (`Mapping[str, Any]`):
                What [`~LayerwiseRun.state`] gave.

        Raises:
            `ValueError`: if it is the state of another model or configuration.
        """
        ours = {**self.config.to_dict(), "seed": self.seed, "blocks of the model": self.blocks.fingerprint()}
        saved = {**state["config"], "seed": state["seed"], "blocks of the model": state["blocks"]}
        check_same(
            "choice of layers", saved, ours, "the same model and `LayerwiseConfig`", "Or start a new run."
        )  # fmt: skip
        window = state["window"]
        self.window = Window(tuple(window["active"]), window["first_step"], window["end_step"], window["turn"])
        self.scores.restore(state["scores"])
        self.decisions = [tuple(decision) for decision in state["decisions"]]
        self._turns = [(tuple(active), steps) for active, steps in state["turns"]]
        self._since = dict(state["since"])
        self._newcomers, self._rates = list(state["newcomers"]), dict(state["rates"])
        self._squares = state["squares"]
        self._apply()
        self.optimizer.learning_rates[:] = state["learning_rates"]

    @property
    def is_measuring(self) -> bool:
        """Whether a checkpoint needs the reference that the blocks are measured against at this moment."""
        return self._meter is not None and self._meter.reference is not None

    def write_reference(self, path: Any) -> None:
        """
        Writes the reference of the current window. Collective.

        Args:
            path (`Path`):
                A safetensors file, written by rank 0.
        """
        assert self._meter is not None
        assert self._meter.reference is not None
        values = self._meter.reference.state()
        on_main_process(lambda: write_atomic(path, lambda file: file.write(save(values))))

    def read_reference(self, path: Any) -> None:
        """
        Takes over the reference of the window that a checkpoint stopped in, after [`~LayerwiseRun.restore`].

        Collective.

        Args:
            path (`Path`):
                The file that [`~LayerwiseRun.write_reference`] wrote; read by rank 0.
        """
        assert self._meter is not None
        assert self.window is not None
        self._meter.start(self._newcomers)
        assert self._meter.reference is not None
        self._meter.reference.load(load(path.read_bytes()) if is_main_process() else {})
