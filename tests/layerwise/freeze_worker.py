"""Trains with frozen layers in several processes, looks at every step, and compares with one process."""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_curriculum.core.checksums import parameter_checksums
from hf_curriculum.core.distributed import end_processes, is_main_process, rank_and_world
from hf_curriculum.core.parameters import ParameterSnapshot, parameters_by_name
from hf_curriculum.layerwise.callback import LayerFreezeCallback


# A neighbour's file: what starts this one may have its own folder on the path.
_SPEC = importlib.util.spec_from_file_location("freeze_twin", Path(__file__).with_name("freeze_twin.py"))
freeze_twin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(freeze_twin)

STEPS = 16
TOLERANCE = 1e-6
CHECKPOINTING = {
    "plain": {},
    "nonreentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
}
DDP = {
    "unused": {"ddp_find_unused_parameters": True},
    "used": {"ddp_find_unused_parameters": False},
    "static": {"ddp_find_unused_parameters": False, "ddp_static_graph": True},
    "-": {},
}
REFUSED = {
    "unattached": ({}, ValueError, r"callback\.attach\(trainer\)"),
    "static-graph": (
        {**DDP["static"], "gradient_accumulation_steps": 2},
        NotImplementedError,
        "`ddp_static_graph` with gradient_accumulation_steps=2.*without gradient accumulation",
    ),
}


def over_ranks(value):
    everywhere = [None] * rank_and_world()[1]
    dist.all_gather_object(everywhere, value)
    return everywhere


class Watch(TrainerCallback):
    """After every step: what is frozen stands still, what is active moves, has state and is equal on all ranks."""

    def __init__(self, freezing, one_state_per_rank):
        self.freezing = freezing
        self.one_state_per_rank = one_state_per_rank
        self.seen = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.before = parameter_checksums(parameters_by_name(model))

    def on_step_begin(self, args, state, control, **kwargs):
        self.rate = self.freezing.run.optimizer.optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, model, **kwargs):
        run, blocks = self.freezing.run, self.freezing.blocks
        after = parameter_checksums(parameters_by_name(model))
        moved = {name for name in after if after[name] != self.before[name]}
        self.before = after
        active = run.window.active
        learning = {name for number in active for name in blocks.blocks[number].parameters} | set(blocks.always)
        assert moved <= learning, (state.global_step, sorted(moved - learning))
        for number in active if self.rate > 0.0 else ():
            assert moved & set(blocks.blocks[number].parameters), (state.global_step, number)
        assert all(theirs == (after, active) for theirs in over_ranks((after, active)))
        held = over_ranks(run.optimizer.state_bytes())
        expected = 2 * 4 * sum(blocks.blocks[number].num_parameters for number in active)
        total = max(held) if self.one_state_per_rank else sum(held)
        assert abs(total / expected - 1.0) < 0.02, (state.global_step, held, expected)
        if state.global_step > 1:
            assert self.rate > 0.0
        self.seen.append(frozenset(active))


def arguments(options, **changed):
    return TrainingArguments(
        **{
            "output_dir": options.output_dir,
            "use_cpu": True,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": options.accumulation,
            "learning_rate": freeze_twin.LEARNING_RATE,
            "weight_decay": freeze_twin.WEIGHT_DECAY,
            "adam_epsilon": freeze_twin.EPSILON,
            "lr_scheduler_type": "linear",
            "warmup_steps": freeze_twin.WARMUP,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **changed,
        }
    )


def check_launch(trainer, options):
    state = trainer.accelerator.state
    stage = f"-{state.deepspeed_plugin.zero_stage}" if state.deepspeed_plugin else ""
    assert f"{state.distributed_type.value}{stage} {state.num_processes}" == options.expect


def compare(options, case):
    method, checkpointing, ddp, policy = case.split(",")
    lora = method == "lora"
    more = {"warmup_steps": 6} if policy == "adaptive" else {}
    # 0.45 of five blocks: two at once.
    freezing = LayerFreezeCallback(policy, active_fraction=0.45, interval_steps=3, ramp_steps=freeze_twin.RAMP, **more)
    shutil.rmtree(f"{options.output_dir}/hf_curriculum", ignore_errors=True)
    dist.barrier() if dist.is_initialized() else None
    model = freeze_twin.llama(lora)
    trainer = Trainer(
        model=model,
        args=arguments(options, **CHECKPOINTING[checkpointing], **DDP[ddp]),
        train_dataset=freeze_twin.rows(),
    )
    check_launch(trainer, options)
    zero = trainer.is_deepspeed_enabled
    if options.attach or zero:
        freezing.attach(trainer)
    else:
        trainer.add_callback(freezing)
    watch = Watch(freezing, one_state_per_rank=not zero)
    trainer.add_callback(watch)
    wanted = {name: parameter.requires_grad for name, parameter in parameters_by_name(model).items()}
    trainer.train()
    assert {name: each.requires_grad for name, each in parameters_by_name(model).items()} == wanted
    check_toggling(watch.seen, case)
    values = ParameterSnapshot(parameters_by_name(model), model=trainer.model_wrapped).state()
    if is_main_process():
        windows = freeze_twin.windows_of(freezing, options.output_dir, STEPS)
        batch = 2 * options.accumulation * rank_and_world()[1]
        difference = freeze_twin.largest_difference(
            values, freeze_twin.twin(freeze_twin.llama(lora), windows, STEPS, batch)
        )
        sys.stdout.write(f"COMPARED {case} {difference:.2e}\n")
        assert difference <= TOLERANCE, (case, difference)
    dist.barrier()


def check_toggling(seen, case):
    """Blocks were frozen and woke up again, or the case shows nothing."""
    number = len(seen)
    assert number == STEPS
    woken = [
        block
        for block in range(5)
        if any(block in seen[i] and block not in seen[j] and block in seen[k]
               for i in range(number) for j in range(i, number) for k in range(j, number))
    ]  # fmt: skip
    assert woken, (case, seen)


def refuse(options, what):
    """Stops before the first step, with what to do about it."""
    changed, error, match = REFUSED[what]
    freezing = LayerFreezeCallback("random", active_fraction=0.45, interval_steps=3)
    trainer = Trainer(
        model=freeze_twin.llama(),
        args=arguments(options, **changed),
        train_dataset=freeze_twin.rows(),
        callbacks=[freezing],
    )
    check_launch(trainer, options)
    with pytest.raises(error, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    sys.stdout.write("REFUSED\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--expect", required=True)
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--attach", action="store_true")
    parser.add_argument("--refuse", choices=REFUSED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for case in options.cases:
        compare(options, case)
    if options.refuse:
        refuse(options, options.refuse)
    end_processes()


if __name__ == "__main__":
    main()
