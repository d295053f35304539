"""
Step time, memory and optimizer state of layer freezing, against full fine-tuning and the same blocks frozen by hand.

One process per arm, which take one training step each in turn; medians of CPU time on a CPU (so that other work on the
machine does not count), of wall time on an accelerator. `hand-*` freezes the blocks of the arm beside it before the
trainer is built and has no callback. The counted ratio is that of floating-point operations of one step
(`FlopCounterMode`). Memory is the peak of the process less what it held before its first step.

    OMP_NUM_THREADS=1 python benchmarks/layerwise.py
    OMP_NUM_THREADS=1 python benchmarks/layerwise.py --callback        # what the callback itself costs
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_curriculum import LayerFreezeCallback


FRACTIONS = (0.125, 0.25, 0.5)
WARM_UP = 2


def memory(field):
    """`VmRSS` or its peak `VmHWM`, in MB."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


def scattered(options, fraction):
    """Blocks spread over the depth, the lowest among them."""
    return [f"layers.{index}" for index in range(0, options.layers, round(1 / fraction))]


def top(options, fraction):
    return [f"layers.{index}" for index in range(round(options.layers * (1 - fraction)), options.layers)]


def arms(options):
    """By name: settings of the callback, or the blocks that are left to learn by hand."""
    found = {"full": None}
    for fraction in FRACTIONS:
        found[f"last_n-{fraction:g}"] = {"policy": "last_n", "active_fraction": fraction}
        found[f"hand-last_n-{fraction:g}"] = top(options, fraction)
        found[f"fixed-{fraction:g}"] = {
            "policy": "fixed", "active_fraction": fraction, "blocks": scattered(options, fraction),
        }  # fmt: skip
        found[f"hand-fixed-{fraction:g}"] = scattered(options, fraction)
        for policy in ("adaptive", "random", "cyclic"):
            found[f"{policy}-{fraction:g}"] = {
                "policy": policy, "active_fraction": fraction, "interval_steps": options.interval,
                "warmup_steps": round(1 / fraction) if policy == "adaptive" else None,
            }  # fmt: skip
    return found


class Turns(TrainerCallback):
    """Waits for its turn before each step; says afterwards how long it took, and what it used."""

    def __init__(self, pipe, options):
        self.pipe, self.options = pipe, options
        self.clock = time.process_time if options.device == "cpu" else self._synchronised

    def _synchronised(self):
        torch.accelerator.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        gc.collect()
        self.before = memory("VmRSS")
        if self.options.device != "cpu":
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args, state, control, **kwargs):
        self.pipe.recv()
        self.started = self.clock()

    def tell(self, trainer):
        seconds = self.clock() - self.started
        peak = memory("VmHWM") - self.before
        if self.options.device != "cpu":
            peak = torch.cuda.max_memory_allocated() / 2**20
        blocks = {id(p) for layer in trainer.model.model.layers for p in layer.parameters()}
        held = (values for p, values in trainer.optimizer.state.items() if id(p) in blocks)
        state = sum(v.numel() * v.element_size() for values in held for v in values.values() if v.dim() > 0)
        self.pipe.send((seconds, peak, state))


class Last(TrainerCallback):
    """Ends the measured step when every other callback has had its event."""

    def __init__(self, turns):
        self.turns, self.trainer = turns, None

    def on_step_end(self, args, state, control, **kwargs):
        self.turns.tell(self.trainer)


def build_model(options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers, num_attention_heads=8,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def build_trainer(options, folder, setting, callbacks, steps):
    model = build_model(options)
    if isinstance(setting, list):
        # As the callback does: embeddings, norm and head are frozen as well.
        model.requires_grad_(False)
        for name in setting:
            model.get_submodule(f"model.{name}").requires_grad_(True)
    rows = [{"input_ids": (ids := torch.randint(options.vocabulary, (options.length,))), "labels": ids}] * 64
    args = TrainingArguments(
        output_dir=folder, use_cpu=options.device == "cpu", report_to="none", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=options.batch_size, max_steps=steps, logging_strategy="no", learning_rate=1e-4,
        bf16=options.device != "cpu",
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)


def run_arm(name, options, pipe):
    torch.set_num_threads(1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    setting = arms(options)[name]
    turns = Turns(pipe, options)
    last = Last(turns)
    freezing = [LayerFreezeCallback(**setting, verify=False)] if isinstance(setting, dict) else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(options, folder, setting, [turns, *freezing, last], WARM_UP + options.steps)
        last.trainer = trainer
        trainer.train()


def measure(options):
    context = multiprocessing.get_context("spawn")
    running = {}
    for name in arms(options) if options.arms is None else options.arms:
        ours, theirs = context.Pipe()
        process = context.Process(target=run_arm, args=(name, options, theirs), daemon=True)
        process.start()
        theirs.close()
        running[name] = (process, ours)
    times, peaks, states = ({name: [] for name in running} for _ in range(3))
    for step in range(WARM_UP + options.steps):
        for name, (_, pipe) in running.items():
            pipe.send("your turn")
            seconds, peak, state = pipe.recv()
            peaks[name], states[name] = peak, [*states[name], state]
            if step >= WARM_UP:
                times[name].append(seconds)
    for process, _ in running.values():
        process.join()
    return times, peaks, states


def counted(options, blocks):
    """Floating-point operations of a step in which these blocks learn; all of the model if there are none."""
    model = build_model(options)
    if blocks is not None:
        model.requires_grad_(False)
        for name in blocks:
            model.get_submodule(f"model.{name}").requires_grad_(True)
    ids = torch.randint(options.vocabulary, (options.batch_size, options.length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def watch(callback, event):
    """Lets a callback's event say what CPU time each call takes."""
    inner, seconds = getattr(callback, event), []

    def timed(*args, **kwargs):
        started = time.process_time()
        inner(*args, **kwargs)
        seconds.append(time.process_time() - started)

    setattr(callback, event, timed)
    return seconds


def measure_callback(options):
    """CPU time in the callback's events as a share of a step, at the default interval."""
    for layers in (8, 32, 128):
        options.layers = layers
        callback = LayerFreezeCallback(policy="adaptive", interval_steps=50, warmup_steps=8, verify=False)
        clocks = [watch(callback, event) for event in ("on_step_begin", "on_step_end", "on_log")]
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(options, folder, {}, [callback], 8 + 50 + 1)
            started = time.process_time()
            trainer.train()
            total = time.process_time() - started
        print(f"{layers:4} blocks: {100 * sum(map(sum, clocks)) / total:.2f} % of a step   bar < 1 %", flush=True)


def report(options, times, peaks, states):
    print(
        f"{options.layers} blocks, hidden {options.hidden}, {options.batch_size * options.length} tokens in a step\n"
        "arm                    step   / full   counted   / by hand   state / full   peak"
    )
    whole = counted(options, None)
    for name, values in times.items():
        values, line = np.array(values), f"{name:20} {np.median(values) * 1e3:7.0f} ms"
        line += f"  {np.median(values / np.array(times['full'])):6.3f}"
        setting = arms(options)[name]
        blocks = setting if isinstance(setting, list) else (setting or {}).get("blocks")
        if name.startswith("last_n"):
            blocks = top(options, setting["active_fraction"])
        line += f"   {counted(options, blocks) / whole:6.3f}" if blocks else "        -"
        hand = np.array(times.get(f"hand-{name}", []))
        line += f"      {np.median(values / hand):6.3f}" if len(hand) else "           -"
        line += f"         {max(states[name]) / max(states['full']):6.4f}   {peaks[name]:7.1f} MB"
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--interval", type=int, default=4, help="steps between two decisions; in use 50")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--callback", action="store_true", help="measure what the callback itself costs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the raw times here")
    options = parser.parse_args()
    if options.callback:
        torch.set_num_threads(1)
        measure_callback(options)
        return
    times, peaks, states = measure(options)
    if options.json:
        options.json.write_text(json.dumps({"times": times, "peaks": peaks, "states": states}))
    report(options, times, peaks, states)


if __name__ == "__main__":
    main()
