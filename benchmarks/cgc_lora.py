"""
Step time and memory of CGC-LoRA: against plain LoRA of equal total rank, a loop over experts, PEFT's Poly and X-LoRA.

A step is forward and backward; optimizers cost the same per parameter everywhere. Arms are interleaved in one process
and medians compared: CPU time on a CPU, so that other work on the machine does not count, time between device events
on an accelerator. Memory is the peak of one process per arm, less what it held before its first step.

    OMP_NUM_THREADS=1 python benchmarks/cgc_lora.py
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import psutil
import torch
from peft import LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_curriculum.multitask.cgc_lora import CGCLoraConfig


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = 8


class ExpertLoop(nn.Module):
    """One plain LoRA per expert around a linear, in a Python loop, each under a gate per row."""

    def __init__(self, base, rank, gates):
        super().__init__()
        self.base, self.gates = base, gates
        self.down = nn.ModuleList(nn.Linear(base.in_features, rank, bias=False) for _ in range(EXPERTS))
        self.up = nn.ModuleList(nn.Linear(rank, base.out_features, bias=False) for _ in range(EXPERTS))
        self.logits = nn.Parameter(torch.zeros(EXPERTS, EXPERTS))

    def forward(self, x):
        result = self.base(x)
        gates = torch.softmax(self.logits, dim=-1)[self.gates["ids"]]
        for number, (down, up) in enumerate(zip(self.down, self.up)):
            result = result + up(down(x)) * (gates[:, number, None, None] * 2.0)
        return result


def make_base(options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=options.hidden, intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype))
    model.requires_grad_(False)
    # What adapters in every block make the base do anyway: a gradient for the input of each linear.
    model.enable_input_require_grads()
    return model


def cgc(options, tasks, **kwargs):
    names = [f"task{number}" for number in range(tasks)]
    config = {
        "task_type": "CAUSAL_LM",
        "task_names": names,
        "r": options.rank,
        "lora_alpha": 2 * options.rank,
        "target_modules": TARGETS,
    }
    return get_peft_model(make_base(options), CGCLoraConfig(**{**config, **kwargs}), autocast_adapter_dtype=False)


def lora(options, rank):
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    return get_peft_model(make_base(options), config, autocast_adapter_dtype=False)


def poly(options):
    config = PolyConfig(
        task_type="CAUSAL_LM", r=options.rank, n_tasks=EXPERTS, n_skills=EXPERTS, n_splits=1, target_modules=TARGETS
    )
    return get_peft_model(make_base(options), config, autocast_adapter_dtype=False)


def xlora(options):
    with tempfile.TemporaryDirectory() as folder:
        lora(options, options.rank).save_pretrained(folder)
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=options.hidden,
            adapters={str(number): folder for number in range(EXPERTS)}, use_trainable_adapters=True,
        )  # fmt: skip
        model = make_base(options)
        model.config.use_cache = False
        return get_peft_model(model, config)


def loop(options):
    model, gates = make_base(options), {}
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if name in TARGETS:
                    setattr(parent, name, ExpertLoop(child, options.rank, gates).to(child.weight))
    model.gates = gates
    return model


def arms(options):
    """Name -> (how to build it, number of tasks or 0, keyword of the tasks)."""
    own = 2 + EXPERTS  # two common experts, and one of each of eight tasks
    return {
        "bare base": (lambda: make_base(options), 0, None),
        "plain LoRA, rank of CGC 8": (lambda: lora(options, own * options.rank), 0, None),
        "CGC-LoRA, 8 tasks": (lambda: cgc(options, EXPERTS), EXPERTS, "tasks"),
        "CGC-LoRA, 2 tasks": (lambda: cgc(options, 2), 2, "tasks"),
        "CGC-LoRA, 64 tasks": (lambda: cgc(options, 64), 64, "tasks"),
        "all common, 8 experts": (
            lambda: cgc(options, EXPERTS, num_common_experts=EXPERTS, num_task_experts=0), EXPERTS, "tasks",
        ),
        "plain LoRA, rank of 8 experts": (lambda: lora(options, EXPERTS * options.rank), 0, None),
        "expert loop, 8 experts": (lambda: loop(options), EXPERTS, "gates"),
        "Poly, 8 skills": (lambda: poly(options), EXPERTS, "task_ids"),
        "X-LoRA, 8 adapters": (lambda: xlora(options), 0, None),
    }  # fmt: skip


def make_step(options, name):
    build, tasks, keyword = arms(options)[name]
    model = build().train()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1000, (options.batch, options.length), generator=generator).to(options.device)
    task_ids = (torch.arange(options.batch) * 7 % max(tasks, 1)).to(options.device)
    kwargs = {keyword: task_ids} if keyword in ("tasks", "task_ids") else {}
    if keyword == "gates":
        model.gates["ids"] = task_ids

    def step():
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, **kwargs).loss.backward()

    return step


def timed(step, device):
    if device == "cpu":
        started = time.process_time()
        step()
        return time.process_time() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak_memory(options, name):
    """MB above what was held before the first step, in this process."""
    step = make_step(options, name)
    if options.device != "cpu":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    held = psutil.Process().memory_info().rss
    for _ in range(2):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held) / 2**20


def measure_memory(options, names):
    found = {}
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4, help="of one expert")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--arms", nargs="*", help="all by default")
    parser.add_argument("--memory", action="store_true", help="measure memory too, in a process per arm")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(peak_memory(options, options.memory_of)))
        return
    names = options.arms or list(arms(options))
    steps = {name: make_step(options, name) for name in names}
    times = {name: [] for name in names}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            seconds = timed(step, options.device)
            if number > 0:  # the first warms up
                times[name].append(seconds)
    report(options, times, measure_memory(options, names) if options.memory else {})


def ratio(times, first, second, base=None):
    """Median over rounds of the ratio of neighbours in time."""
    less = times[base] if base else [0.0] * len(times[first])
    return statistics.median((a - c) / (b - c) for a, b, c in zip(times[first], times[second], less))


def report(options, times, memory):
    print(
        f"hidden {options.hidden}, {options.layers} layers, batch {options.batch} x {options.length}, "
        f"{options.rank} ranks per expert, {options.dtype}, {options.device}, {options.rounds} rounds"
    )
    for name, values in times.items():
        held = f"{memory[name]:8.0f} MB" if memory else ""
        print(f"{name:30} {statistics.median(values) * 1000:9.1f} ms {held}")
    plain, ours = "plain LoRA, rank of CGC 8", "CGC-LoRA, 8 tasks"
    for text, pair, base in (
        ("8 tasks / plain LoRA of equal total rank: {:.3f}x (bar: <= 1.10)", (ours, plain), None),
        ("64 tasks / 2 tasks: {:.3f}x (bar: <= 1.25)", ("CGC-LoRA, 64 tasks", "CGC-LoRA, 2 tasks"), None),
        ("8 experts / plain LoRA of equal total rank: {:.3f}x (bar: <= 1.10)",
         ("all common, 8 experts", "plain LoRA, rank of 8 experts"), None),
        ("adapter time, loop / ours: {:.2f}x (bar: >= 3)",
         ("expert loop, 8 experts", "all common, 8 experts"), "bare base"),
        ("Poly / ours, 8 tasks: {:.2f}x", ("Poly, 8 skills", ours), None),
        ("X-LoRA / ours, 8 tasks: {:.2f}x", ("X-LoRA, 8 adapters", ours), None),
    ):  # fmt: skip
        if all(name in times for name in (*pair, *([base] if base else []))):
            print(text.format(ratio(times, *pair, base)))


if __name__ == "__main__":
    main()
