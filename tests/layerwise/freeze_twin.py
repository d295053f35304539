"""A small model and its data, and what freezing must equal: AdamW of each parameter on its own, in one process."""

import itertools

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_curriculum.core.records import RunRecord


VOCABULARY, NUM_LAYERS, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 48, 5, 1e-2, 0.1, 2
# Large beside the rounding of a gradient: with the default a gradient of almost nothing is a step of the full length,
# in a direction that the order of the sums over processes chooses.
EPSILON = 1e-3
RAMP = 3


def llama(lora=False, num_layers=NUM_LAYERS):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            use_cache=False,
        )
    )
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules="all-linear"))
    return model


def rows(count=64):
    drawn = torch.randint(VOCABULARY, (count, 10), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def windows_of(callback, output_dir, num_steps):
    """Windows as recorded: first step, end, and the names of the parameters that learn."""
    lines = RunRecord(str(output_dir)).read("layers")
    ends = [*(line["first_step"] for line in lines[1:]), num_steps]
    blocks = callback.blocks.blocks
    return [
        (
            line["first_step"],
            end,
            {name for number in line["active"] for name in blocks[number].parameters} | set(callback.blocks.always),
        )
        for line, end in zip(lines, ends)
    ]


def twin(model, windows, num_steps, batch, *, accumulation=1, ramp=RAMP):
    """
    Steps each parameter in the windows that it is active in, with an optimizer of its own that is new in each.

    `batch` counts the rows of a micro-batch over all processes.
    """
    named, drawn = dict(model.named_parameters()), itertools.cycle(row["input_ids"] for row in rows())
    decay = set(Trainer.get_decay_parameter_names(None, model))
    optimizers, since = {}, {}
    model.train()
    for step in range(num_steps):
        first, active = next((first, active) for first, end, active in windows if first <= step < end)
        for name in optimizers.keys() - active:
            del optimizers[name], since[name]
        for name in sorted(active - optimizers.keys()):
            settings = {"eps": EPSILON, "weight_decay": WEIGHT_DECAY if name in decay else 0.0}
            optimizers[name] = torch.optim.AdamW([named[name]], lr=LEARNING_RATE, fused=True, **settings)
            since[name] = first if first else -ramp
        for name, parameter in named.items():
            parameter.requires_grad_(name in active)
        for _ in range(accumulation):
            ids = torch.stack(list(itertools.islice(drawn, batch)))
            tokens = torch.tensor(ids[:, 1:].numel() * accumulation)
            model(input_ids=ids, labels=ids, num_items_in_batch=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_([named[name] for name in named if name in active], 1.0)
        rate = step / WARMUP if step < WARMUP else (num_steps - step) / (num_steps - WARMUP)
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate * min(1.0, (step - since[name] + 1) / ramp)
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in named.items()}


def largest_difference(values, expected):
    """The largest norm of a difference, relative to the norm of what is expected."""
    return max(
        float(torch.linalg.vector_norm(values[name] - expected[name]) / torch.linalg.vector_norm(expected[name]))
        for name in expected
        if expected[name].any()
    )
