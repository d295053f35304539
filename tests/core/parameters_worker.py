"""Trains in several processes, with and without forwards on a snapshot's values, and compares the bits."""

import argparse
import json
import sys
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_curriculum.core.checksums import parameter_checksums
from hf_curriculum.core.distributed import end_processes, rank_and_world
from hf_curriculum.core.modes import evaluation_mode
from hf_curriculum.core.parameters import ParameterSnapshot, learning_parameters
from hf_curriculum.core.wrappers import unwrapped


STEPS, CAPTURE_AT, BREAK_AT = 7, 3, 5
VOCABULARY = 61  # odd, so that partitions are padded


def build(lora):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            use_cache=False,
            attention_dropout=0.1,
        )
    )
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=3, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    return model


def fixed_batch():
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(7))


def rows():
    tokens = torch.randint(VOCABULARY, (STEPS * 4, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Interrupted(Exception):
    pass


def interrupt(module, inputs):
    raise Interrupted


@torch.no_grad()
def logits_of(model):
    with evaluation_mode(model):
        return model(input_ids=fixed_batch()).logits.clone()


class PlainTrainer(Trainer):
    """Keeps every loss to the last bit; the log rounds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        self.losses.append(loss.item())
        return loss


class TeacherTrainer(PlainTrainer):
    """From `CAPTURE_AT` on, runs a forward on the values of that step before each student's."""

    snapshot = None
    student_first = False
    seen: ClassVar[set[str]] = set()

    def compute_loss(self, model, inputs, **kwargs):
        if self.state.global_step == CAPTURE_AT and self.snapshot is None:
            parameters = learning_parameters(model)
            self.first = ParameterSnapshot(parameters, model=model).state()
            self.expected = logits_of(model)
            self.snapshot = ParameterSnapshot(parameters, model=model)
            self.mean = ParameterSnapshot(parameters, model=model, dtype=torch.float64)
            self.naive = {name: value.double() for name, value in self.mean.state().items()}
        if self.snapshot is not None and not self.student_first:
            self.check(model)
        loss = super().compute_loss(model, inputs, **kwargs)
        if self.snapshot is not None and self.student_first:
            self.check(model)
        return loss

    def check(self, model):
        parameters = learning_parameters(model)
        before = parameter_checksums(parameters)
        if self.state.global_step % 2:
            logits_of(model)  # leaves prefetched parameters behind under ZeRO-3, as an evaluation does
        self.seen.update(parameter.ds_status.name for parameter in parameters.values() if hasattr(parameter, "ds_id"))
        with self.snapshot.exchanged():
            assert torch.equal(logits_of(model), self.expected)
            if self.state.global_step > CAPTURE_AT:
                assert parameter_checksums(parameters) != before
        if self.state.global_step == BREAK_AT:
            self.check_interrupted(model)
        assert parameter_checksums(parameters) == before
        with self.snapshot.full(next(iter(parameters))) as full:
            if rank_and_world()[0] == 0:
                assert torch.equal(full, self.first[next(iter(parameters))])
        assert parameter_checksums(parameters) == before
        self.mean.average(0.75)
        live = ParameterSnapshot(parameters, model=model).state()
        self.naive = {name: 0.75 * self.naive[name] + 0.25 * live[name] for name in live}

    def check_interrupted(self, model):
        (hook,) = [
            module.register_forward_pre_hook(interrupt)
            for name, module in model.named_modules()
            if name.endswith("layers.1.mlp")
        ]
        with pytest.raises(Interrupted), self.snapshot.exchanged():
            logits_of(model)
        hook.remove()


def train(options, lora, checkpointing, bf16, trainer_class):
    model = build(lora)
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            use_cpu=True,
            bf16=bf16,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            gradient_checkpointing=checkpointing,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
        ),
        train_dataset=rows(),
    )
    early = ParameterSnapshot(learning_parameters(model))
    state = trainer.accelerator.state
    stage = f"-{state.deepspeed_plugin.zero_stage}" if state.deepspeed_plugin else ""
    assert f"{state.distributed_type.value}{stage} {state.num_processes}" == options.expect
    if state.deepspeed_plugin:
        # Small enough that matrices are partitioned, norms stay gathered, and a forward ends in the middle of a
        # prefetch.
        state.deepspeed_plugin.deepspeed_config["zero_optimization"].update(
            {
                "stage3_param_persistence_threshold": 100,
                "stage3_prefetch_bucket_size": options.prefetch,
                "stage3_max_reuse_distance": 0,
            }
        )
    trainer.train()
    wrapped = trainer.model_wrapped
    check_refusals(early, learning_parameters(wrapped), wrapped)
    return trainer, ParameterSnapshot(learning_parameters(wrapped), model=wrapped)


def compare(options, scenario):
    """Two runs in one process, the second with the teacher."""
    method, *modes = scenario.split("-")
    lora, checkpointing, bf16 = method == "lora", "checkpointing" in modes, "bf16" in modes
    without, plain = train(options, lora, checkpointing, bf16, PlainTrainer)
    trainer, end = train(options, lora, checkpointing, bf16, TeacherTrainer)
    assert len(without.losses) == STEPS
    assert without.losses == trainer.losses
    names = list(learning_parameters(trainer.model_wrapped))
    assert names == list(learning_parameters(trainer.model))
    assert not [name for name in names if "_orig_mod" in name or name.startswith("module.")]
    expected, reached, first = plain.state(), end.state(), trainer.snapshot.state()
    mean = trainer.mean.state()
    for name in expected:
        assert torch.equal(expected[name], reached[name]), name
        assert torch.equal(first[name], trainer.first[name]), name
        torch.testing.assert_close(mean[name], trainer.naive[name], rtol=1e-12, atol=0)
    assert rank_and_world()[0] == 0 or not expected
    check_round_trip(options, trainer, end, first, scenario)


def check_refusals(early, parameters, model):
    """What ZeRO-3 cannot do is refused; the other backends may take a snapshot before the engine is built."""
    name, parameter = next(iter(parameters.items()))
    if not hasattr(parameter, "ds_id"):
        early.capture()
        assert torch.equal(early.state().get(name, parameter), parameter)
        return
    with pytest.raises(ValueError, match="after the engine is built"), early.exchanged():
        pass
    with pytest.raises(ValueError, match=r"model=trainer\.model"):
        ParameterSnapshot(parameters)
    snapshot = ParameterSnapshot(parameters, model=model)
    parameter.ds_tensor.final_location = "nvme"
    with pytest.raises(NotImplementedError, match="offload to NVMe"):
        snapshot.capture()
    parameter.ds_tensor.final_location = None
    with (
        sys.modules["deepspeed"].zero.GatheredParameters([parameter]),
        pytest.raises(RuntimeError, match="a module holds the full tensor"),
        snapshot.exchanged(),
    ):
        pass
    snapshot.capture()


def check_round_trip(options, trainer, end, first, label):
    end.load(first)
    again = end.state()
    for name, value in first.items():
        assert torch.equal(again[name], value), name
    with end.exchanged():
        assert torch.equal(logits_of(trainer.model_wrapped), trainer.expected)
    broken = {name: value[..., :-1] for name, value in first.items()}
    with pytest.raises((ValueError, RuntimeError), match=r"got shape .*, expected"):
        end.load(broken)
    kept = end.state()
    for name, value in first.items():
        assert torch.equal(kept[name], value), name
    if first:
        save_file({**first, "expected_logits": trainer.expected}, f"{options.output_dir}/{label}.safetensors")
        print("COMPARED", label, end.nbytes, end.full_nbytes, flush=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 7)  # 7 rows over two processes: shards of unequal size
        self.outer = nn.Linear(7, 6)

    def forward(self, hidden):
        return hidden + self.outer(torch.tanh(self.inner(hidden)))


def build_blocks(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 3))
    if wrap == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for block in model[1:3]:
        fully_shard(block)
    # The root stays whole after a forward, as FSDP2 does by default.
    return fully_shard(model)


def train_blocks(wrap, teacher, teacher_first=True):
    """Losses and full values after some steps; with a forward on the first step's values in each step, or without."""
    model = build_blocks(wrap)
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    snapshot = ParameterSnapshot(learning_parameters(model), model=model)
    mean = ParameterSnapshot(learning_parameters(model), model=model, dtype=torch.float64)
    naive = {name: value.clone() for name, value in mean.state().items()}
    first = snapshot.state()
    with torch.no_grad():
        expected = model(inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = []

    def check_teacher(step):
        if not teacher:
            return
        before = ParameterSnapshot(learning_parameters(model), model=model).state()
        if step == 2:
            check_interrupted_blocks(model, snapshot, inputs)
        with snapshot.exchanged():
            assert torch.equal(model(inputs), expected)
            with snapshot.full("1.inner.weight") as full:
                assert full.shape == (7, 6)
                assert not first or torch.equal(full, first["1.inner.weight"])
        after = ParameterSnapshot(learning_parameters(model), model=model).state()
        for name in before:
            assert torch.equal(before[name], after[name])
            naive[name] = 0.5 * naive[name] + 0.5 * before[name].double()
        mean.average(0.5)
        with mean.exchanged():
            assert model(inputs).dtype == torch.float32

    for step in range(4):
        if teacher_first:
            check_teacher(step)
        loss = model(inputs + dist.get_rank()).square().sum()
        if not teacher_first:
            check_teacher(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for name, value in mean.state().items() if teacher else ():
        torch.testing.assert_close(value, naive[name], rtol=1e-12, atol=1e-15)
    end = ParameterSnapshot(learning_parameters(model), model=model)
    values = end.state()
    end.load(first)
    for name, value in end.state().items():
        assert torch.equal(value, first[name])
    with end.exchanged():
        assert torch.equal(model(inputs), expected)
    return losses, values


def check_interrupted_blocks(model, snapshot, inputs):
    hook = unwrapped(model)[2].inner.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted), snapshot.exchanged():
        model(inputs)
    hook.remove()


def compare_blocks(wrap):
    losses, values = train_blocks(wrap, teacher=False)
    for teacher_first in (True, False):
        teacher_losses, teacher_values = train_blocks(wrap, teacher=True, teacher_first=teacher_first)
        assert losses == teacher_losses
        for name in values:
            assert torch.equal(values[name], teacher_values[name]), name
    model = build_blocks(wrap)
    sums = [None, None]
    dist.all_gather_object(sums, parameter_checksums(learning_parameters(model)))
    assert sums[0] == sums[1]
    assert list(sums[0])[:3] == ["0.weight", "0.bias", "1.inner.weight"]
    if wrap == "fsdp2":
        check_too_early()
    if values:
        print("BLOCKS", wrap, json.dumps(sums[0]), flush=True)


def check_too_early():
    model = nn.Sequential(nn.Linear(4, 6))
    snapshot = ParameterSnapshot(learning_parameters(model), model=model)
    fully_shard(model)
    with pytest.raises(ValueError, match="after the engine is built"):
        snapshot.capture()
    with pytest.raises(ValueError, match=r"model=trainer\.model"):
        ParameterSnapshot(learning_parameters(model))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir")
    parser.add_argument("--expect")
    parser.add_argument("--scenarios", nargs="*", default=[])
    parser.add_argument("--prefetch", type=int, default=2000)
    parser.add_argument("--blocks", nargs="*", default=[])
    parser.add_argument("--student_first", action="store_true")
    options = parser.parse_args()
    TeacherTrainer.student_first = options.student_first
    torch.set_num_threads(1)
    if options.blocks:
        dist.init_process_group("gloo")
    for wrap in options.blocks:
        compare_blocks(wrap)
    for scenario in options.scenarios:
        compare(options, scenario)
    print("SEEN", sorted(TeacherTrainer.seen), flush=True)
    end_processes()


if __name__ == "__main__":
    main()
