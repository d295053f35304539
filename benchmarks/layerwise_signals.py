"""
Which signal finds the layers that matter: each block of a model is trained alone, and what could have told is ranked.

Every block learns alone for a few steps on GSM8K, all others frozen, at one learning rate. Its gain is how far the
loss on held-out rows falls. Beside it stand what a policy could go by: the change rate when the block has begun to
learn (steps 6 to 10, as `LayerFreezeCallback` measures it) and over the second half of the steps, relative to its
weights and for each weight; the norm of its gradients; the norm and the signal-to-noise ratio of its weights. The last
lines are Spearman's correlation of each signal with the gain, and its spread over the blocks.

    OMP_NUM_THREADS=1 python benchmarks/layerwise_signals.py --model base-8m --data data/gsm8k
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from layerwise_quality import gsm8k_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_curriculum import LayerFreezeCallback
from hf_curriculum.core.console import show_table
from hf_curriculum.core.ranks import spearman
from hf_curriculum.layerwise.blocks import find_blocks
from hf_curriculum.layerwise.measurement import ChangeMeter, measure_signal_to_noise


class Signals(TrainerCallback):
    """Measures the one block that learns."""

    def __init__(self, model, number: int, options: argparse.Namespace) -> None:
        blocks, named = find_blocks(model), dict(model.named_parameters())
        self.number, self.half, self.rate = number, options.steps // 2, options.rate
        self.weights = [named[name] for name in blocks.blocks[number].parameters if named[name].dim() > 1]
        self.meter = ChangeMeter(model, blocks)
        self.gradients: list[float] = []
        norm, count = self.norm(self.weights), sum(weight.numel() for weight in self.weights)
        self.found = {"norm of the weights": norm, "signal to noise": measure_signal_to_noise(model, blocks)[number]}
        self.per_weight = norm / math.sqrt(count)

    def norm(self, tensors: list[torch.Tensor]) -> float:
        return float(torch.stack([tensor.detach().norm() for tensor in tensors]).norm())

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in (5, self.half):
            self.meter.start([self.number])

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append(self.norm([weight.grad for weight in self.weights]))

    def on_step_end(self, args, state, control, **kwargs):
        for when, name in ((10, "steps 6 to 10"), (args.max_steps, "second half")):
            if state.global_step == when:
                rate = self.meter.rates()[self.number] / self.rate
                self.found |= {f"change rate, {name}": rate, f"change per weight, {name}": rate * self.per_weight}
        self.found["gradient norm"] = float(np.mean(self.gradients))


def run(options: argparse.Namespace, number: int) -> tuple[float, dict[str, float]]:
    """Gain of a block and its signals."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    train, held_out, _ = gsm8k_rows(options)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.output),
            seed=options.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=32,
            learning_rate=options.rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            max_grad_norm=0.0,
            max_length=256,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    before = trainer.evaluate()["eval_loss"]
    signals = Signals(model, number, options)
    trainer.add_callback(LayerFreezeCallback("fixed", blocks=[number], active_fraction=1.0))
    trainer.add_callback(signals)
    trainer.train()
    return before - trainer.evaluate()["eval_loss"], signals.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: Hub id or path")
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, default=Path("out/signals"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--eval-rows", type=int, default=100)
    parser.add_argument("--steps", type=int, default=40, help="at least 20")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0, help="order of the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = len(find_blocks(AutoModelForCausalLM.from_pretrained(options.model)).blocks)
    results = [run(options, number) for number in range(count)]
    gains, names = [gain for gain, _ in results], list(results[0][1])
    rows = [[number, gain, *(found[name] for name in names)] for number, (gain, found) in enumerate(results)]
    show_table("Each block alone", ["block", "gain", *names], rows)
    table = []
    for name in names:
        values = np.array([found[name] for _, found in results])
        table.append([name, spearman(values, np.array(gains)), float(values.std() / values.mean())])
    show_table("Signals", ["signal", "Spearman with the gain", "spread / mean"], table)


if __name__ == "__main__":
    main()
