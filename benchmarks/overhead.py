"""
What the curriculum costs while training: CPU time of sampler and callbacks, and wall time against SFTTrainer.

Two runs on the same rows in the same order, step by step in turn in one process: `CurriculumSFTTrainer` and TRL's
`SFTTrainer` on the data set sorted by the plan. Prints the CPU time of sampler, stage callbacks and logging hook as a
share of a training step, and the ratio of wall times of paired steps with a bootstrap interval.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py
"""

import argparse
import tempfile
import threading
import time

import numpy as np
import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_curriculum import CurriculumConfig, CurriculumSFTTrainer
from hf_curriculum.core.run import RunEvents
from hf_curriculum.core.stages import StageDriver
from hf_curriculum.curriculum.sampler import CurriculumSampler
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer


class Turns:
    """Lets two threads take one training step each in turn, so that noise of the machine hits both alike."""

    def __init__(self):
        self.condition = threading.Condition()
        self.turn = 0
        self.done = set()

    def wait(self, who):
        with self.condition:
            self.condition.wait_for(lambda: self.turn == who or (1 - who) in self.done)

    def give(self, who, finished=False):
        with self.condition:
            self.turn = 1 - who
            if finished:
                self.done.add(who)
            self.condition.notify_all()


class Pace(TrainerCallback):
    """Measures the wall time between two step ends, the other run's turn left out."""

    def __init__(self, turns, who):
        self.turns, self.who, self.times = turns, who, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.turns.wait(self.who)
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter() - self.started)
        self.turns.give(self.who)
        self.turns.wait(self.who)
        self.started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.turns.give(self.who, finished=True)


class CpuTime:
    """Adds up the CPU time that a function of a class takes, in the calling thread."""

    def __init__(self):
        self.seconds = 0.0

    def watch(self, cls, name):
        original = getattr(cls, name)

        def watched(*args, **kwargs):
            started = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - started

        setattr(cls, name, watched)

    def watch_iteration(self, cls):
        original = cls.__iter__

        def watched(sampler):
            iterator = original(sampler)
            while True:
                started = time.thread_time()
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                finally:
                    self.seconds += time.thread_time() - started
                yield item

        cls.__iter__ = watched


def interval(first, second, rounds=2000):
    """Median ratio of paired times, with its 95 % bootstrap interval."""
    ratios = np.asarray(first) / np.asarray(second)
    generator = np.random.default_rng(0)
    medians = [np.median(generator.choice(ratios, len(ratios))) for _ in range(rounds)]
    return np.median(ratios), *np.percentile(medians, [2.5, 97.5])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    rows = generate_corpus(options.rows)
    turns, cpu = Turns(), CpuTime()
    paces = [Pace(turns, 0), Pace(turns, 1)]

    def arguments(folder, **kwargs):
        return SFTConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            per_device_train_batch_size=options.batch_size, num_train_epochs=1, save_strategy="no", disable_tqdm=True,
            logging_steps=10, dataset_num_proc=None, **kwargs,
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        ours = CurriculumSFTTrainer(
            build_model(tokenizer),
            arguments(f"{folder}/ours"),
            train_dataset=rows,
            processing_class=tokenizer,
            curriculum=CurriculumConfig(scorer="length"),
            callbacks=[paces[0]],
        )
        theirs = SFTTrainer(
            build_model(tokenizer),
            arguments(f"{folder}/theirs", train_sampling_strategy="sequential"),
            train_dataset=rows.select(ours.curriculum_plan.indices.tolist()),
            processing_class=tokenizer,
            callbacks=[paces[1]],
        )
        cpu.watch_iteration(CurriculumSampler)
        for name in ("on_step_begin", "on_step_end", "on_epoch_end"):
            cpu.watch(StageDriver, name)
        for name in ("on_train_begin", "on_step_end"):
            cpu.watch(RunEvents, name)
        other = threading.Thread(target=theirs.train)
        other.start()
        before = time.thread_time()
        ours.train()
        total = time.thread_time() - before
        other.join()
    steps = ours.curriculum_plan.num_steps
    ratio, low, high = interval(paces[0].times[5:], paces[1].times[5:])
    print(
        f"{steps} steps; ours {np.median(paces[0].times) * 1e3:.1f} ms, TRL's {np.median(paces[1].times) * 1e3:.1f} ms"
    )
    print(f"CPU time of sampler and stage callbacks: {100 * cpu.seconds / total:.3f} % of training (bar: <= 1 %)")
    print(f"wall ratio to SFTTrainer on the same order: {ratio:.4f}, 95 % interval [{low:.4f}, {high:.4f}]")


if __name__ == "__main__":
    main()
