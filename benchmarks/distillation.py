"""
What distillation costs: step time and memory of six ways to train on the same rows.

One process per arm; they take their steps in turn, so that noise of the machine hits all alike, and each step is
compared with those of the same round. Time is CPU time of one thread, memory is peak RSS minus RSS before step 1.

- `trl`: TRL's SFTTrainer, cross-entropy alone
- `ce`: ours in a first stage, cross-entropy alone
- `kd`: ours in a second stage, with the model at the end of the first as teacher
- `teacher`: one forward of the teacher, its head over the labelled positions; no step
- `full_logits`: two models and both of their logits, whole
- `gkd`: TRL's experimental GKD on the given labels (`lmbda=0`)

    OMP_NUM_THREADS=1 python benchmarks/distillation.py --mode lora --vocabulary 152064 --batch_size 4
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_utils import unwrap_peft_model
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_curriculum import CurriculumConfig, CurriculumSFTTrainer, DistillationConfig
from hf_curriculum.core import head as core_head
from hf_curriculum.core.head import gather_labelled
from hf_curriculum.demo.model import build_tokenizer


ARMS = ("trl", "ce", "kd", "teacher", "full_logits", "gkd")
ALPHA, TEMPERATURE = 0.5, 2.0
WARM_UP = 2


def memory(field):
    """`VmRSS` or its peak `VmHWM`, in MB."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


class Turns(TrainerCallback):
    """Waits for its turn before every step, and says how long the step took and how much memory the run has used."""

    def __init__(self, pipe):
        self.pipe = pipe

    def begin(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the steps, not of building the model
        self.before = memory("VmRSS")

    def wait(self):
        self.pipe.recv()
        self.started = time.process_time()

    def tell(self):
        self.pipe.send((time.process_time() - self.started, memory("VmHWM") - self.before, self.before))

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin()

    def on_step_begin(self, args, state, control, **kwargs):
        self.wait()

    def on_step_end(self, args, state, control, **kwargs):
        self.tell()


class FullLogits(SFTTrainer):
    """Both models' logits of all positions, then the same loss as ours."""

    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        student = model(**inputs).logits[:, :-1]
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits[:, :-1]
        mask = labels != -100
        ce = torch.nn.functional.cross_entropy(student[mask], labels[mask], reduction="sum")
        log_s, log_t = (torch.log_softmax(logits / TEMPERATURE, dim=-1)[mask] for logits in (student, teacher))
        kd = TEMPERATURE**2 * torch.nn.functional.kl_div(log_s, log_t, reduction="sum", log_target=True)
        return ((1 - ALPHA) * ce + ALPHA * kd) / num_items_in_batch


def build_model(options):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers, num_attention_heads=8, max_position_embeddings=options.length,
            pad_token_id=0, tie_word_embeddings=False,
        )
    )  # fmt: skip


def build_rows(options, first_stage):
    """Rows of one length, the second half of each labelled; `difficulty` puts the first ones into the first stage."""
    count = (WARM_UP + options.steps) * options.batch_size
    ids = np.random.default_rng(0).integers(1, options.vocabulary, (count, options.length))
    labels = ids.copy()
    labels[:, : options.length // 2] = -100
    difficulty = (np.arange(count) >= first_stage * options.batch_size).astype(float)
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "difficulty": difficulty})


def arguments(options, folder, cls=SFTConfig, **kwargs):
    return cls(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", max_length=None,
        per_device_train_batch_size=options.batch_size, num_train_epochs=1, save_strategy="no", disable_tqdm=True,
        logging_steps=10_000, learning_rate=1e-4, **kwargs,
    )  # fmt: skip


def build_trainer(name, options, folder, turns):
    """The trainer of an arm."""
    common = {
        "model": build_model(options),
        "train_dataset": build_rows(options, WARM_UP - 1 if name == "kd" else WARM_UP + options.steps - 1),
        "processing_class": build_tokenizer(),
        "callbacks": [turns],
        "peft_config": LoraConfig(r=16, target_modules="all-linear") if options.mode == "lora" else None,
    }
    if name == "trl":
        return SFTTrainer(args=arguments(options, folder), **common)
    if name == "full_logits":
        trainer = FullLogits(args=arguments(options, folder), **common)
        trainer.teacher = build_model(options).eval().requires_grad_(False)
        return trainer
    if name == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        config = arguments(options, folder, GKDConfig, lmbda=0.0, beta=0.0, temperature=TEMPERATURE)
        collator = DataCollatorForLanguageModeling(pad_token_id=0)
        return GKDTrainer(args=config, teacher_model=build_model(options), data_collator=collator, **common)
    return CurriculumSFTTrainer(
        args=arguments(options, folder),
        curriculum=CurriculumConfig(
            scorer="column", num_levels=2, level_method="thresholds", level_thresholds=[0.5], eval_levels=False
        ),
        distillation=DistillationConfig(alpha=[0.0, ALPHA], temperature=TEMPERATURE),
        **common,
    )


@torch.no_grad()
def run_teacher(options, folder, turns):
    """What a teacher cannot do without: its backbone over every token, one product over the labelled positions."""
    trainer = build_trainer("trl", options, folder, turns)
    model = unwrap_peft_model(trainer.model).eval()
    weight = model.get_output_embeddings().weight
    turns.begin()
    for batch in trainer.get_train_dataloader():
        turns.wait()
        labels = batch.pop("labels")
        positions = gather_labelled(model.model(**batch, use_cache=False).last_hidden_state, labels)
        size = min(128, core_head.LOGITS_PER_CHUNK // len(weight) // 32 * 32)  # the fastest on a CPU
        for chunk in positions.hidden.split(size):
            torch.mm(chunk, weight.t())
        turns.tell()


def run_arm(name, options, pipe):
    torch.set_num_threads(1)
    # The parent prints the result; what the libraries say goes to the errors.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    turns = Turns(pipe)
    with tempfile.TemporaryDirectory() as folder:
        if name == "teacher":
            run_teacher(options, folder, turns)
        else:
            build_trainer(name, options, folder, turns).train()


def measure(options):
    """Times, (rounds,), and the last peak of every arm."""
    context = multiprocessing.get_context("spawn")
    arms = {}
    for name in options.arms:
        ours, theirs = context.Pipe()
        process = context.Process(target=run_arm, args=(name, options, theirs), daemon=True)
        process.start()
        theirs.close()
        arms[name] = (process, ours)
    times, peaks = {name: [] for name in arms}, {}
    for step in range(WARM_UP + options.steps):
        for name, (_, pipe) in arms.items():
            pipe.send("your turn")
            seconds, peak, before = pipe.recv()
            if step < WARM_UP + options.steps - 1:  # the last step of `ce` is that of a second stage
                peaks[name] = (peak, before)
                if step >= WARM_UP:
                    times[name].append(seconds)
    for process, _ in arms.values():
        process.join()
    return {name: np.array(values) for name, values in times.items()}, peaks


def show_ratio(text, first, second, bar):
    """Median of the ratios of each round, with the quartiles."""
    low, middle, high = np.percentile(first / second, [25, 50, 75])
    print(f"{text:58} {middle:6.3f}  [{low:.3f}, {high:.3f}]   bar {bar}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=150, help="tokens of a row; half of them are labelled")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    options = parser.parse_args()
    times, peaks = measure(options)
    tokens, labelled = options.batch_size * options.length, options.batch_size * (options.length - options.length // 2)
    print(
        f"{options.mode}, vocabulary {options.vocabulary}, hidden {options.hidden}, {options.layers} layers, "
        f"{tokens} tokens in a step, {labelled} of them labelled"
    )
    for name in options.arms:
        print(
            f"{name:12} {np.median(times[name]) * 1e3:9.1f} ms   peak {peaks[name][0]:8.1f} MB   "
            f"before step 1 {peaks[name][1]:8.1f} MB"
        )
    if {"ce", "kd", "teacher"} <= times.keys():
        show_ratio("kd / (ce + teacher)", times["kd"], times["ce"] + times["teacher"], "<= 1.10")
        print(f"{'memory: kd / ce':58} {peaks['kd'][0] / peaks['ce'][0]:6.3f}   bar <= 1.10 with LoRA")
    if {"ce", "trl"} <= times.keys():
        show_ratio("ce / trl", times["ce"], times["trl"], "<= 1.02")
    if {"kd", "full_logits"} <= times.keys():
        show_ratio("kd / full_logits", times["kd"], times["full_logits"], "none")
        print(f"{'memory: kd / full_logits':58} {peaks['kd'][0] / peaks['full_logits'][0]:6.3f}")
    if {"kd", "gkd"} <= times.keys():
        show_ratio("kd / gkd", times["kd"], times["gkd"], "< 1 at 152k")
        print(f"{'memory: kd / gkd':58} {peaks['kd'][0] / peaks['gkd'][0]:6.3f}   bar <= 0.5 at 152k")


if __name__ == "__main__":
    main()
