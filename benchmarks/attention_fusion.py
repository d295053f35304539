"""
What attention fusion costs: its second stage with and without cached features, parameters, inference, training steps.

- `second_stage`: `MultiTaskTrainer` in stage `"fusion"`, on cached features and on tokens. A process for each, which
  take epochs in turn; making the cache, and the epoch from which it has paid for itself.
- `parameters`: what the fusion adds to a model of the shape of Llama 2 7B with 8 tasks, on the meta device.
- `inference`: fused passes over N tasks against a pass of one task's own model, in the same process and in turn.
- `training`: steps (forward, backward, AdamW, tasks that are absent left alone) against those of one plain LoRA of
  PEFT of the same rank with the same heads on the same rows.

Time is CPU time of one thread on a CPU, so that other work on the machine counts little, and time until the device is
done on an accelerator. Every time is compared with those of the reference right before and after it; what is shown is
the median of these ratios and their quartiles. Memory is the peak of a process per arm, less what it held before.
Weights are random unless `--model` names some.

    OMP_NUM_THREADS=1 python benchmarks/attention_fusion.py
"""

import argparse
import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaModel,
    TrainerCallback,
    TrainingArguments,
)

from hf_curriculum import (
    AttentionFusionConfig,
    AttentionFusionModel,
    MultiTaskHeads,
    MultiTaskTrainer,
    TaskHead,
    cache_features,
)
from hf_curriculum.demo.model import build_tokenizer
from hf_curriculum.multitask.absent import freeze_absent_tasks


PARTS = ("parameters", "second_stage", "inference", "training")
COUNTS = (2, 4, 8, 16)
CLASSES = 8


def memory(field):
    """`VmRSS` or its peak `VmHWM`, in MB."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


class Watch:
    """Time, and memory above what was held at the start: of this thread and process, or of the device."""

    def __init__(self, device):
        self.device = device

    def now(self):
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self):
        gc.collect()
        if self.device == "cpu":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the steps, not of building the model
            self.held = memory("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated() / 2**20

    def peak(self):
        return (memory("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20) - self.held


# Models


def make_base(options, shape):
    torch.manual_seed(0)
    if options.model:
        base = AutoModel.from_pretrained(options.model)
    elif shape == "encoder":  # MiniLM-L6
        config = BertConfig(
            vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
        )
        base = BertModel(config, add_pooling_layer=False)
    else:  # the width of SmolLM2-135M, fewer blocks
        config = LlamaConfig(
            vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
            num_key_value_heads=3, pad_token_id=0, use_cache=False,
        )  # fmt: skip
        base = LlamaModel(config)
    return base.to(options.device, torch.bfloat16 if options.bf16 else torch.float32)


def blocks_of(base):
    return max((module for module in base.modules() if isinstance(module, nn.ModuleList)), key=len)


def first_of_upper_half(base):
    return len(blocks_of(base)) // 2


def make_lora(options, base, upper_half):
    targets = {"target_modules": "all-linear"} if options.targets == "all-linear" else {}
    if upper_half:
        blocks = blocks_of(base)
        pattern = next(name for name, module in base.named_modules() if module is blocks).split(".")[-1]
        targets["layers_to_transform"] = list(range(first_of_upper_half(base), len(blocks)))
        targets["layers_pattern"] = pattern
        if "target_modules" in targets:  # this shorthand knows no layers
            names = {name for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)}
            targets["target_modules"] = sorted(names)
    return LoraConfig(r=options.rank, lora_alpha=2 * options.rank, **targets)


def make_heads(count):
    return {f"task{number}": TaskHead(CLASSES) for number in range(count)}


def make_fusion(options, shape, count, level="output", stage="fusion", upper_half=False):
    base = make_base(options, shape)
    config = AttentionFusionConfig(heads=make_heads(count), level=level, lora=make_lora(options, base, upper_half))
    model = AttentionFusionModel(base, config)
    model.set_stage(stage)
    return model


def make_plain(options, shape, count):
    """One LoRA of PEFT, which all tasks share, under the same heads."""
    base = make_base(options, shape)
    pooling = "mean" if shape == "encoder" else "last"
    adapted = get_peft_model(base, make_lora(options, base, False))
    return MultiTaskHeads(adapted, make_heads(count), pooling=pooling).to(options.device)


def make_batch(options, base, count):
    """Rows of 2/3 to all of the length, padded, of `count` tasks in turn."""
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch, options.length)
    ids = torch.randint(1, base.config.vocab_size, shape, generator=generator)
    lengths = torch.randint(options.length * 2 // 3, options.length + 1, shape[:1], generator=generator)
    lengths[0] = options.length
    batch = {
        "input_ids": ids,
        "attention_mask": (torch.arange(options.length) < lengths[:, None]).long(),
        "labels": torch.randint(0, CLASSES, shape[:1], generator=generator),
        "tasks": torch.arange(options.batch) % count,
    }
    return {name: value.to(options.device) for name, value in batch.items()}


def autocast(options):
    return torch.autocast(options.device, torch.bfloat16) if options.bf16 else contextlib.nullcontext()


# Arms: what makes a step


def inference_step(options, model, run):
    model.eval()

    def step():
        with torch.inference_mode(), autocast(options):
            run()

    return step


def fused(options, shape, count, level="output", stage="fusion", upper_half=False):
    """A pass for rows of one task, as `predict(texts, task=...)` runs it."""
    model = make_fusion(options, shape, count, level, stage, upper_half)
    batch = make_batch(options, model, 1)
    del batch["labels"]
    return inference_step(options, model, lambda: model(**batch))


def pruned(options, shape, count, top_k):
    """The same with `top_k`: the row's own task and others, and no LoRA beside theirs."""
    model = make_fusion(options, shape, count)
    batch = make_batch(options, model, 1)
    sources = torch.arange(top_k, device=options.device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def run():
        pooled = model.pooled_outputs(sources=sources, **inputs)
        vectors, _ = model.fusion(pooled, batch["tasks"], sources)
        model.answer(vectors, batch["tasks"], None)

    return inference_step(options, model, run)


def more_rows(options, shape, times):
    """One task's own model on so many times the rows: what a fused pass of outputs would cost without a fusion."""
    many = argparse.Namespace(**{**vars(options), "batch": times * options.batch})
    return fused(many, shape, count=8, stage="tasks")


def plain(options, shape):
    model = make_plain(options, shape, 8)
    batch = make_batch(options, model, 1)
    del batch["labels"]
    return inference_step(options, model, lambda: model(**batch))


def below(options, shape):
    """The base cut at its middle block: what rows pass once where LoRAs are on the upper half."""
    base = make_base(options, shape)
    batch = make_batch(options, base, 1)
    del blocks_of(base)[first_of_upper_half(base) :]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return inference_step(options, base, lambda: base(**inputs))


def training_step(options, shape, make, count):
    """A step on rows of all tasks, as `MultiTaskTrainer` takes it."""
    model = make(options, shape, count).train()
    batch = make_batch(options, model, count)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    freeze_absent_tasks(optimizer, model)

    def step():
        with autocast(options):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


OWN, CUT = "one task's own model", "base below the middle block"
ROWS = "its own model, {} x the rows"
PLAIN = "plain PEFT LoRA, shared"


def inference_arms(upper_half):
    """Name -> how to make its step; the reference first."""
    arms = {OWN: partial(fused, count=8, stage="tasks", upper_half=upper_half)}
    if upper_half:
        arms[CUT] = below
    else:
        arms[PLAIN] = plain
        arms |= {ROWS.format(count): partial(more_rows, times=count) for count in (8, 16)}
    for count in COUNTS:
        arms[f"output, N = {count}"] = partial(fused, count=count, upper_half=upper_half)
    if not upper_half:
        arms["output, N = 8, top_k = 2"] = partial(pruned, count=8, top_k=2)
        for count in COUNTS:
            arms[f"layer, N = {count}"] = partial(fused, count=count, level="layer")
    return arms


def training_arms():
    def arm(count, **kwargs):
        return partial(training_step, make=partial(make_fusion, **kwargs), count=count)

    arms = {PLAIN: partial(training_step, make=make_plain, count=8)}
    arms |= {f"tasks, N = {count}": arm(count, stage="tasks") for count in COUNTS}
    for stage in ("fusion", "joint"):
        for level in ("output", "layer"):
            arms[f"{stage}, {level}, N = 8"] = arm(8, stage=stage, level=level)
    return arms


GROUPS = {
    "inference": partial(inference_arms, False),
    "inference, LoRAs on the upper half": partial(inference_arms, True),
    "training": training_arms,
}


# Measuring


def compare(options, shape, arms):
    """Seconds, (rounds,), and ratios to the reference, (rounds,), of each arm."""
    watch = Watch(options.device)
    steps = {name: make(options, shape) for name, make in arms.items()}
    reference, *others = steps

    def seconds(name):
        started = watch.now()
        steps[name]()
        return watch.now() - started

    for step in steps.values():
        step()
    times, ratios = {name: [] for name in steps}, {name: [] for name in others}
    for _ in range(options.rounds):
        before = seconds(reference)
        for name in others:
            found, after = seconds(name), seconds(reference)
            times[name].append(found)
            times[reference].append(after)
            ratios[name].append(2 * found / (before + after))
            before = after
    return times, ratios


def count_products(options, shape, arms):
    """Operations of all matrix products in a step of each arm."""
    found = {}
    for name, make in arms.items():
        step = make(options, shape)
        with FlopCounterMode(display=False) as counter:
            step()
        found[name] = counter.get_total_flops()
    return found


def measure_memory(options, shape, group):
    """MB of each arm above what was held before its first step, in a process of its own."""
    # A device cannot be used in a copy of this process; elsewhere that spares each arm the imports.
    context = multiprocessing.get_context("fork" if options.device == "cpu" else "spawn")
    found = {}
    for name in GROUPS[group]():
        ours, theirs = context.Pipe()
        process = context.Process(target=run_for_memory, args=(options, shape, group, name, theirs), daemon=True)
        process.start()
        theirs.close()
        found[name] = ours.recv()
        process.join()
    return found


def run_for_memory(options, shape, group, name, pipe):
    torch.set_num_threads(1)
    step = GROUPS[group]()[name](options, shape)
    watch = Watch(options.device)
    watch.begin()
    for _ in range(2):  # the first makes what the optimizer holds
        step()
    pipe.send(watch.peak())


def bar_of(name, group, share):
    """What the ratio may be, if anything was promised."""
    count = int(match.group(1)) if (match := re.search(r"N = (\d+)", name)) else 0
    if group == "training" or not count:
        return None
    if "top_k = 2" in name:
        return 1.05 * 2
    if name.startswith("output"):
        return 1.05 * (share + count * (1 - share))
    return 1.5 if count == 8 else None


def show_group(options, shape, group, held):
    arms = GROUPS[group]()
    times, ratios = compare(options, shape, arms)
    products = count_products(options, shape, arms)
    reference = next(iter(arms))
    share = float(np.median(ratios[CUT])) if CUT in ratios else 0.0
    print(f"\n{group}: {shape}, {options.batch} rows of up to {options.length} tokens, LoRAs {options.targets}")
    if share:
        counted = products[CUT] / products[reference]
        print(f"share of the work below the first adapted block: {share:.3f} by time, {counted:.3f} by products")
    print(f"{'':29} {'time':>9}   {'ratio':>6}  quartiles         by products    bar   {'memory':>9}")
    for name in arms:
        text = f"{name:29} {np.median(times[name]) * 1e3:6.1f} ms"
        if name in ratios:
            low, middle, high = np.percentile(ratios[name], [25, 50, 75])
            bar = bar_of(name, group, share)
            verdict = f"{bar:6.2f} {'ok' if middle <= bar else 'NO'}" if bar else " " * 9
            counted = products[name] / products[reference]
            text += f"   {middle:6.3f}  [{low:6.3f}, {high:6.3f}]  {counted:8.3f}   {verdict}"
        else:
            text += " " * 48
        print(text + (f"  {held[name]:7.0f} MB" if held else ""), flush=True)


# The second stage, by the Trainer


class Turns(TrainerCallback):
    """Waits for its turn before every epoch, and says how long the epoch took and how much memory the run has used."""

    def __init__(self, pipe, watch, steps):
        self.pipe, self.watch, self.steps = pipe, watch, steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.watch.begin()
        self.pipe.recv()
        self.started = self.watch.now()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.pipe.send((self.watch.now() - self.started, self.watch.peak()))
            if state.global_step < state.max_steps:
                self.pipe.recv()
            self.started = self.watch.now()


def make_rows(options, model):
    generator = np.random.default_rng(0)
    count, vocabulary = options.tasks * options.rows, model.config.vocab_size
    lengths = generator.integers(options.length * 2 // 3, options.length + 1, count)
    return Dataset.from_dict(
        {
            "input_ids": [generator.integers(1, vocabulary, length).tolist() for length in lengths],
            "labels": generator.integers(0, CLASSES, count).tolist(),
            "task": [f"task{number % options.tasks}" for number in range(count)],
        }
    )


def run_second_stage(options, cached, pipe):
    torch.set_num_threads(1)
    # The parent prints the result; what the libraries say goes to the errors.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    watch = Watch(options.device)
    model = make_fusion(options, "encoder", options.tasks)
    rows, collator = make_rows(options, model), DataCollatorWithPadding(build_tokenizer())
    steps = math.ceil(len(rows) / options.train_batch)
    with tempfile.TemporaryDirectory() as folder:
        if cached:
            for _ in range(2):  # made, and found
                pipe.recv()
                started = watch.now()
                with autocast(options):
                    features = cache_features(model, rows, folder, collator=collator)
                pipe.send((watch.now() - started, features.vectors.nbytes))
            rows, collator = features.rows, features.collator
        args = TrainingArguments(
            output_dir=f"{folder}/run", use_cpu=options.device == "cpu", bf16=options.bf16, report_to="none",
            per_device_train_batch_size=options.train_batch, num_train_epochs=1 + options.rounds, save_strategy="no",
            disable_tqdm=True, logging_steps=10_000,
        )  # fmt: skip
        turns = Turns(pipe, watch, steps)
        trainer = MultiTaskTrainer(
            model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[turns]
        )
        trainer.train()


def show_second_stage(options):
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for cached in (False, True):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=run_second_stage, args=(options, cached, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[cached] = ours

    def turn(cached):
        pipes[cached].send("your turn")
        return pipes[cached].recv()

    (made, size), (found, _) = turn(True), turn(True)
    times, peaks = {False: [], True: []}, {}
    for number in range(1 + options.rounds):
        for cached in pipes:
            seconds, peaks[cached] = turn(cached)
            if number > 0:  # the first warms up
                times[cached].append(seconds)
    for process in processes:
        process.join()
    slow, fast = np.array(times[False]), np.array(times[True])
    low, middle, high = np.percentile(slow / fast, [25, 50, 75])
    count = options.tasks * options.rows
    print(
        f"\nsecond stage, level output: encoder, {options.tasks} tasks, {count} rows of up to {options.length} tokens "
        f"in batches of {options.train_batch}, {options.rounds} epochs"
    )
    print(f"an epoch on tokens           {np.median(slow):8.3f} s   peak {peaks[False]:6.0f} MB")
    print(f"an epoch on cached features  {np.median(fast):8.3f} s   peak {peaks[True]:6.0f} MB")
    print(f"tokens / cached              {middle:8.1f}     [{low:.1f}, {high:.1f}]   bar >= 10")
    print(f"making the cache             {made:8.3f} s   {size / 1e6:.1f} MB on disk")
    print(f"finding it                   {found:8.3f} s")
    saved = np.median(slow) - np.median(fast)
    print(f"paid for itself              in epoch {math.ceil(made / saved)} ({made / saved:.2f} epochs)", flush=True)


# Parameters


def show_parameters():
    print("\nparameters: Llama 2 7B, 8 tasks of 8 classes, r = 8, in thousands and as a share of the base")
    print(f"{'LoRAs':12} {'level':8} {'LoRAs of 8 tasks':>22} {'fusion':>20} {'heads':>8}   bar of the fusion")
    for targets in ("default", "all-linear"):
        for level in ("output", "layer"):
            with torch.device("meta"):
                base = LlamaModel(LlamaConfig())
                total = sum(parameter.numel() for parameter in base.parameters())
                kind = {"target_modules": "all-linear"} if targets == "all-linear" else {}
                lora = LoraConfig(r=8, lora_alpha=16, **kind)
                config = AttentionFusionConfig(heads=make_heads(8), level=level, lora=lora)
                model = AttentionFusionModel(base, config)
            added = sum(parameter.numel() for fusion in model.fusions() for parameter in fusion.parameters())
            heads = sum(parameter.numel() for parameter in model.classifier.parameters())
            loras = sum(value.numel() for name, value in model.named_parameters() if ".lora_" in name)
            verdict = "ok" if added / total <= 0.01 else "NO"
            print(
                f"{targets:12} {level:8} {loras / 1e3:12.0f} {loras / total:8.3%} {added / 1e3:11.0f} "
                f"{added / total:8.3%} {heads / 1e3:8.0f}   <= 1 % {verdict}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="+", choices=("encoder", "decoder"), default=("encoder", "decoder"))
    parser.add_argument("--model", help="a path or Hub id in place of the shapes; name the kind by --shapes")
    parser.add_argument("--targets", choices=("default", "all-linear"), default="default", help="what LoRAs adapt")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="rows of a pass")
    parser.add_argument("--length", type=int, default=24, help="tokens of the longest row")
    parser.add_argument("--rounds", type=int, default=9, help="repetitions, or epochs")
    parser.add_argument("--tasks", type=int, default=4, help="of the second stage")
    parser.add_argument("--rows", type=int, default=64, help="of each task of the second stage")
    parser.add_argument("--train_batch", type=int, default=16, help="of the second stage")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="a base in bfloat16, under autocast")
    parser.add_argument("--memory", action="store_true", help="measure memory too, in a process per arm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = "bfloat16" if options.bf16 else "float32"
    print(f"{options.device}, {dtype}, rank {options.rank}, torch {torch.__version__}", flush=True)
    groups = [(shape, group) for shape in options.shapes for group in GROUPS if group.split(",")[0] in options.parts]
    # All of them before the first step of this process, which the others may be copies of.
    held = {pair: measure_memory(options, *pair) if options.memory else {} for pair in groups}
    if "parameters" in options.parts:
        show_parameters()
    if "second_stage" in options.parts:
        show_second_stage(options)
    for pair in groups:
        show_group(options, *pair, held[pair])


if __name__ == "__main__":
    main()
