"""Trains a model that FSDP2 shards block by block, in a loop of its own, with layers frozen and woken up."""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Trainer

from hf_curriculum.core.checksums import parameter_checksums
from hf_curriculum.core.distributed import end_processes, is_main_process, rank_and_world
from hf_curriculum.core.parameters import ParameterSnapshot, parameters_by_name
from hf_curriculum.layerwise.blocks import find_blocks
from hf_curriculum.layerwise.config import LayerwiseConfig
from hf_curriculum.layerwise.run import LayerwiseRun


_SPEC = importlib.util.spec_from_file_location("freeze_twin", Path(__file__).with_name("freeze_twin.py"))
freeze_twin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(freeze_twin)

STEPS = 16
TOLERANCES = {"float32": 1e-6, "bfloat16": 3e-2}


def build(lora, checkpointing, precision):
    model = freeze_twin.llama(lora)
    decay = set(Trainer.get_decay_parameter_names(None, model))
    if checkpointing != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    kept = torch.bfloat16 if precision == "bfloat16" else None
    settings = {
        "mesh": init_device_mesh("cpu", (rank_and_world()[1],)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=kept, reduce_dtype=torch.float32 if kept else None),
    }
    base = model.base_model.model if lora else model
    for layer in base.model.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if p.requires_grad and (name in decay) == decays],
            "weight_decay": freeze_twin.WEIGHT_DECAY if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return model, torch.optim.AdamW(groups, lr=freeze_twin.LEARNING_RATE, eps=freeze_twin.EPSILON)


def rate(step):
    if step < freeze_twin.WARMUP:
        return step / freeze_twin.WARMUP
    return (STEPS - step) / (STEPS - freeze_twin.WARMUP)


def start(model, optimizer, policy):
    more = {"warmup_steps": 6} if policy == "adaptive" else {}
    config = LayerwiseConfig(
        policy, active_fraction=0.45, interval_steps=3, ramp_steps=freeze_twin.RAMP, **more
    )  # fmt: skip
    return LayerwiseRun(config, model, find_blocks(model), optimizer, seed=42, max_steps=STEPS)


def train_step(model, optimizer, run, step):
    data = freeze_twin.rows()
    run.begin_step(step)
    for group in optimizer.param_groups:
        group["lr"] = freeze_twin.LEARNING_RATE * rate(step)
    places = [(step * 4 + 2 * rank_and_world()[0] + row) % len(data) for row in range(2)]
    ids = torch.stack([data[place]["input_ids"] for place in places])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    run.end_step(rate(step) > 0.0)
    optimizer.zero_grad()


def check_step(model, run, before, step):
    after = parameter_checksums(parameters_by_name(model))
    moved = {name for name in after if after[name] != before[name]}
    active, blocks = run.window.active, run.blocks
    assert moved <= {name for number in active for name in blocks.blocks[number].parameters}, step
    for number in active if rate(step) > 0.0 else ():
        assert moved & set(blocks.blocks[number].parameters), (step, number)
    everywhere = [None] * rank_and_world()[1]
    dist.all_gather_object(everywhere, (after, active, run.optimizer.state_bytes()))
    assert all(theirs[:2] == (after, active) for theirs in everywhere)
    expected = 2 * 4 * sum(blocks.blocks[number].num_parameters for number in active)
    held = sum(theirs[2] for theirs in everywhere)
    assert abs(held / expected - 1.0) < 0.02, (step, held, expected)
    return after


def values_of(model):
    return ParameterSnapshot(parameters_by_name(model), model=model).state()


def compare(case):
    method, checkpointing, precision, policy = case.split(",")
    lora = method == "lora"
    model, optimizer = build(lora, checkpointing, precision)
    if lora:
        model.enable_input_require_grads()
    run = start(model, optimizer, policy)
    model.train()
    windows, sums = [], parameter_checksums(parameters_by_name(model))
    for step in range(STEPS):
        train_step(model, optimizer, run, step)
        sums = check_step(model, run, sums, step)
        if run.window.first_step == step:
            windows.append((step, run.window.active))
    if policy == "random" and precision == "float32":
        check_optimizer_state(model, optimizer, run, lora, policy)
    seen = [set(active) for _, active in windows]
    assert any(
        (first & third) - second for i, first in enumerate(seen) for j, second in enumerate(seen[i + 1 :], i + 1)
        for third in seen[j + 1 :]
    ), seen  # fmt: skip
    if lora:
        check_adapters(model, run)
    run.close()
    values = values_of(model)
    if is_main_process():
        ends = [*(first for first, _ in windows[1:]), STEPS]
        names = [
            (first, end, {name for number in active for name in run.blocks.blocks[number].parameters})
            for (first, active), end in zip(windows, ends)
        ]
        expected = freeze_twin.twin(freeze_twin.llama(lora), names, STEPS, 4)
        difference = freeze_twin.largest_difference(values, expected)
        sys.stdout.write(f"COMPARED {case} {difference:.2e}\n")
        assert difference <= TOLERANCES[precision], (case, difference)
    dist.barrier()


def check_adapters(model, run):
    """What Accelerate saves of adapters under FSDP2 with a full state dict holds those of frozen blocks too."""
    saved = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))
    if is_main_process():
        adapters = {name for block in run.blocks.blocks for name in block.parameters}
        assert {name for name in saved if "lora_" in name} == adapters
        assert len(run.window.active) < len(run.blocks.blocks)


def check_optimizer_state(model, optimizer, run, lora, policy):
    """A checkpoint holds a state for what is frozen too, as loading asks for one; it is dropped again at once."""
    saved = get_optimizer_state_dict(model, optimizer)
    again, fresh = build(lora, "plain", "float32")
    set_optimizer_state_dict(again, fresh, saved)
    resumed = start(again, fresh, policy)
    resumed.restore(run.state())
    assert resumed.optimizer.state_bytes() == run.optimizer.state_bytes() > 0
    mine, theirs = parameters_by_name(model), parameters_by_name(again)
    for name, parameter in mine.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found = fresh.state[theirs[name]][key]
            found, value = (each.to_local() if hasattr(each, "to_local") else each for each in (found, value))
            assert torch.equal(found, value), (name, key)
    resumed.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in options.cases:
        compare(case)
    end_processes()


if __name__ == "__main__":
    main()
