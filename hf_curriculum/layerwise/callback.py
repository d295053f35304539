"""The callback that decides, while any Trainer trains, which layers learn."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..core.console import say
from ..core.distributed import is_main_process, on_main_process
from ..core.errors import invalid, unsupported
from ..core.parameters import parameters_by_name
from ..core.records import RunRecord
from .backend import check_backend
from .blocks import Blocks, find_blocks
from .config import LayerwiseConfig
from .forecast import tell_cost
from .optimizer import ALWAYS, BLOCK_KEY, FROZEN, base_optimizer, refresh_weights, split_groups
from .policies import LayerPolicy
from .report import END_EVENT, EVENT
from .run import LayerwiseRun
from .savings import input_gradient_hooks, is_reentrant
from .switch import find_ddp


if TYPE_CHECKING:
    import torch

__all__ = ["LayerFreezeCallback"]

# The key under which `trainer_state.json` holds the state.
STATE_KEY = "hf_curriculum.layerwise"
REFERENCE_NAME = "layerwise_reference.safetensors"


class LayerFreezeCallback(TrainerCallback):
    """
    Lets a share of a model's layers learn, and decides again and again which (ALF, layer-wise fine-tuning).

    One line in any Trainer script, on one device, DDP and FSDP2; under DeepSpeed a second one,
    `callback.attach(trainer)`, since the optimizer must get groups per layer before the engine is built (the trainers
    of this package do it themselves). Full fine-tuning and adapters (LoRA, DoRA, CGC-LoRA: the adapters of a layer are
    what freezes). Frozen layers do not move by a bit, have no gradient and no optimizer state, and nothing is computed
    backwards below the lowest active one. What was found and what it will cost is printed when training begins;
    decisions and change rates are logged and kept in the run record.

    Args:
        policy (`str` or [`~hf_curriculum.layerwise.policies.LayerPolicy`], *optional*, defaults to `"adaptive"`):
            Who decides. See [`~hf_curriculum.layerwise.config.LayerwiseConfig`].
        config ([`~hf_curriculum.layerwise.config.LayerwiseConfig`], *optional*):
            All settings at once, in place of `policy` and `options`.
        **options:
            The fields of [`~hf_curriculum.layerwise.config.LayerwiseConfig`], such as `active_fraction` and
            `interval_steps`.

    Attributes:
        blocks ([`~hf_curriculum.layerwise.blocks.Blocks`], *optional*):
            The blocks of the model, from the beginning of training on.
        run ([`~hf_curriculum.layerwise.run.LayerwiseRun`], *optional*):
            The current or last training.

    Raises:
        `ValueError`: for settings out of range; when training begins, for a model whose blocks cannot be found, a
            budget below the smallest block, or a checkpoint of another model or configuration.
        `NotImplementedError`: for wrappers and optimizers that are not supported.
        `RuntimeError`: in training, if what should be frozen moves or what should learn does not.

    Example:

    ```python
    >>> from hf_curriculum import LayerFreezeCallback

    >>> callback = LayerFreezeCallback(policy="adaptive", active_fraction=0.25, interval_steps=50)
    >>> # trainer = Trainer(..., callbacks=[callback])
    ```
    """

    def __init__(
        self, policy: str | LayerPolicy | None = None, *, config: LayerwiseConfig | None = None, **options: Any
    ) -> None:
        if config is not None and (policy is not None or options):
            raise invalid("config", "a config beside other settings", "either of them")
        if policy is not None:
            options["policy"] = policy
        self.config = LayerwiseConfig(**options) if config is None else config
        self.blocks: Blocks | None = None
        self.run: LayerwiseRun | None = None
        self._trainer: weakref.ref[Trainer] | None = None
        self._logged: dict[str, float] = {}
        self._unrecorded = False
        self._untold = False
        self._learning_rate = 0.0
        self._written_at = -1
        self._hooks: list[tuple[nn.Module, int, Callable[..., Any]]] = []

    def attach(self, trainer: Trainer) -> None:
        """
        Makes the callback a part of a trainer, before training. Needed under DeepSpeed, harmless elsewhere.

        Args:
            trainer ([`~transformers.Trainer`]):
                The trainer; the callback is added if it is not there yet.

        Raises:
            `ValueError`: if the trainer has another freezing callback.
            `NotImplementedError`: under DeepSpeed, if its configuration brings the optimizer, or the trainer was given
                a learning rate scheduler, which counts the groups.
        """
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(other, LayerFreezeCallback) and other is not self for other in callbacks):
            raise _two_callbacks()
        if self._trainer is not None and self._trainer() is trainer:
            return
        if trainer.model is not None:
            _recover(trainer.model)
        self._trainer = weakref.ref(trainer)
        if self not in callbacks:
            trainer.add_callback(self)
        # First in the list, so that loggers see what it adds to a log.
        callbacks.remove(self)
        callbacks.insert(0, self)
        if trainer.is_deepspeed_enabled:
            self._group_optimizer(trainer)

    def release(self) -> None:
        """
        Lets everything require a gradient again after a training that an error or Ctrl-C broke off.

        The trainers of this package call it themselves, and a next training with a freezing callback does as much. A
        plain Trainer does not tell its callbacks of errors: without this call, one without the callback would train
        what was awake alone.
        """
        for model, claim in list(_CLAIMS.items()):
            if claim.callback() is self:
                _recover(model)

    def _group_optimizer(self, trainer: Trainer) -> None:
        plugin = trainer.accelerator.state.deepspeed_plugin
        if "optimizer" in plugin.deepspeed_config:
            raise unsupported(
                "Freezing with an optimizer from the DeepSpeed configuration",
                "it gets all parameters in one group",
                "Remove its `optimizer` block (and `scheduler`), and name the optimizer by `TrainingArguments.optim`.",
            )
        if trainer.lr_scheduler is not None:
            raise unsupported(
                "Freezing with a learning rate scheduler that was made beside the trainer",
                "it counts the parameter groups, of which every block gets its own under DeepSpeed",
                "Name the scheduler by `TrainingArguments.lr_scheduler_type`.",
            )
        create = trainer.create_optimizer

        def create_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            optimizer = create(*args, **kwargs)
            base = base_optimizer(optimizer)
            if not all(BLOCK_KEY in group for group in base.param_groups):
                model: Any = trainer.model
                split_groups(base, _block_of(model, self._find(model)))
            return optimizer

        trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]

    def _find(self, model: nn.Module) -> Blocks:
        config = self.config
        return find_blocks(
            model, block_modules=config.block_modules or (), always_train=config.always_train or ()
        )  # fmt: skip

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undoes what an earlier training of the model left behind, before an optimizer is made for it."""
        _recover(kwargs["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Finds the blocks, tells what freezing will cost, and takes over the state of a checkpoint."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        _check_alone(model, self, state)
        _recover(model)
        self.blocks, ddp = self._find(model), find_ddp(model)
        check_backend(args, optimizer, adapters=self.blocks.adapters, ddp=ddp)
        learning = {name for name, parameter in parameters_by_name(model).items() if parameter.requires_grad}
        _CLAIMS[model] = _Claim(weakref.ref(self), weakref.ref(state), frozenset(learning))
        seed = args.seed if self.config.seed is None else self.config.seed
        self.run = LayerwiseRun(
            self.config, model, self.blocks, optimizer, seed=seed, max_steps=state.max_steps, ddp=ddp
        )  # fmt: skip
        self._logged, self._unrecorded, self._untold, self._written_at = {}, False, True, -1
        self._hooks = []
        self._free_prefix(args, model)
        saved = _saved_states(state).get(STATE_KEY) if state.global_step > 0 else None
        if saved is None and state.global_step > 0:
            say("The checkpoint was written without layer freezing, which begins here.")
        if saved is not None:
            refresh_weights(optimizer)
            self.run.restore(saved)
            if saved["is_measuring"]:
                self.run.read_reference(_reference_path(args, state, self._resumed_from()))
        for event in (EVENT, END_EVENT):
            RunRecord(str(args.output_dir), enabled=is_main_process()).rewind(event, state.global_step)

    def _running(self) -> LayerwiseRun:
        assert self.run is not None
        return self.run

    def _resumed_from(self) -> Path | None:
        trainer = None if self._trainer is None else self._trainer()
        return getattr(trainer, "_resumed_from", None)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets other blocks learn when a window ends."""
        run = self._running()
        window = run.window
        run.begin_step(state.global_step)
        self._learning_rate = max(group["lr"] for group in run.optimizer.optimizer.param_groups)
        if run.window is not window:
            self._unrecorded = True
        if self._untold:
            tell_cost(run, kwargs["model"], args, state)
            self._untold = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Records a new window, checks that freezing works, and keeps the state for a checkpoint."""
        run = self._running()
        run.end_step(self._learning_rate > 0.0)
        if self._unrecorded:
            self._record(args, state)
            self._unrecorded = False
        _saved_states(state)[STATE_KEY] = run.state()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the reference of the current window into the checkpoint of a plain Trainer."""
        # Our trainers had it written before they closed the checkpoint; others have just finished one.
        if self._written_at != state.global_step and not args.save_only_model:
            self.write_run_files(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def write_run_files(self, folder: Path) -> None:
        """
        Writes what a checkpoint needs beside the state in `trainer_state.json`. Collective.

        Args:
            folder (`Path`):
                The checkpoint.
        """
        if self.run is not None and self.run.is_measuring:
            self.run.write_reference(folder / REFERENCE_NAME)
            self._written_at = int(folder.name.rpartition("-")[2])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds what learns to training logs, and the change rates to the first one after they were measured."""
        if logs is None or "loss" not in logs or self.run is None or self.run.window is None:
            return
        assert self.blocks is not None
        active = self.run.window.active
        added = {
            "active_fraction": self.blocks.share(active),
            "active_blocks": len(active),
            "backward_depth": self.blocks.depth(active),
            **self._logged,
        }
        self._logged = {}
        logs.update(added)
        # The entry of this log is in the history already.
        state.log_history[-1].update(added)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets everything require a gradient again, as before training."""
        run = self._running()
        rates = {run.blocks.blocks[number].name: rate for number, rate in run.close().items()}
        RunRecord(str(args.output_dir), enabled=is_main_process()).append(END_EVENT, state.global_step, rates=rates)
        self._break_off()
        _CLAIMS.pop(kwargs["model"], None)

    def _break_off(self) -> None:
        """Takes everything off that a training put on, but for `requires_grad`."""
        if self.run is not None:
            self.run.optimizer.close()
        for module, key, hook in self._hooks:
            module._forward_hooks[key] = hook
        self._hooks = []

    def _free_prefix(self, args: TrainingArguments, model: nn.Module) -> None:
        """Lets back-propagation end at the lowest active block: reentrant checkpointing alone cannot do without."""
        if self.config.free_prefix and not is_reentrant(model, args):
            for module, key in input_gradient_hooks(model):
                self._hooks.append((module, key, module._forward_hooks.pop(key)))

    def _record(self, args: TrainingArguments, state: TrainerState) -> None:
        run = self._running()
        assert run.window is not None
        window, names = run.window, [block.name for block in run.blocks.blocks]
        rates = {names[number]: rate for number, rate in window.rates.items()}
        self._logged |= {f"{run.policy.signal}/{name}": rate for name, rate in rates.items()}
        scores = dict(zip(names, run.scores.scores.tolist()))
        RunRecord(str(args.output_dir), enabled=is_main_process()).append(
            EVENT,
            state.global_step,
            first_step=window.first_step,
            signal=run.policy.signal,
            policy=self.config.to_dict()["policy"],
            turn=window.turn,
            blocks=names,
            sizes=run.blocks.sizes.tolist(),
            active=list(window.active),
            active_fraction=run.blocks.share(window.active),
            rates=rates,
            scores=scores,
        )


def _saved_states(state: TrainerState) -> dict[str, Any]:
    """What `trainer_state.json` holds of callbacks, by name; it is a list only until the state is made."""
    return cast(dict[str, Any], state.stateful_callbacks)


def _block_of(model: nn.Module, blocks: Blocks) -> dict[int, int]:
    """Number of each parameter's block, or where it stands outside, by identity."""
    found = {name: number for number, block in enumerate(blocks.blocks) for name in block.parameters}
    found |= dict.fromkeys(blocks.always, ALWAYS)
    return {id(each): found.get(name, FROZEN) for name, each in parameters_by_name(model).items()}


def _two_callbacks() -> ValueError:
    return invalid("callbacks", "two of `LayerFreezeCallback`", "one", "They would undo each other's choice.")


@dataclass(frozen=True)
class _Claim:
    """Which callback freezes a model, in which training, and what learned before."""

    callback: weakref.ref[LayerFreezeCallback]
    state: weakref.ref[TrainerState]
    learning: frozenset[str]


_CLAIMS: weakref.WeakKeyDictionary[nn.Module, _Claim] = weakref.WeakKeyDictionary()


def _check_alone(model: nn.Module, callback: LayerFreezeCallback, state: TrainerState) -> None:
    claim = _CLAIMS.get(model)
    if claim is not None and claim.state() is state and claim.callback() not in (None, callback):
        raise _two_callbacks()


def _recover(model: nn.Module) -> None:
    """Undoes the freezing of a training that an error broke off, or its frozen blocks would be left out for ever."""
    claim = _CLAIMS.pop(model, None)
    if claim is None:
        return
    if (callback := claim.callback()) is not None:
        callback._break_off()
    for name, parameter in parameters_by_name(model).items():
        if name in claim.learning:
            parameter.requires_grad_(True)


def _reference_path(args: TrainingArguments, state: TrainerState, resumed_from: Path | None) -> Path:
    """Where the checkpoint that is resumed from lies: a callback is not told."""
    folders = [resumed_from, args.resume_from_checkpoint]
    folders.append(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
    paths = [Path(folder) / REFERENCE_NAME for folder in folders if isinstance(folder, str | Path)]
    found = on_main_process(lambda: next((str(path) for path in paths if path.is_file()), None))
    if found is None:
        raise invalid(
            "resume_from_checkpoint",
            f"a checkpoint whose {REFERENCE_NAME} is not in {', '.join(str(path.parent) for path in paths)}",
            "the file that the change rates of the current window are measured against",
            "Set `TrainingArguments.resume_from_checkpoint` to the checkpoint's path, or resume from an earlier one: "
            "a checkpoint that was cut off while it was written lacks it.",
        )
    return Path(found)
