"""
Speed of loss scoring at a large vocabulary: ours, a length-sorted full-logit scorer, and the floor.

The floor is what no scorer can avoid: the backbone over every token and one GEMM over the labelled positions. Arms are
interleaved in one process; medians of CPU time are compared, so that other work on the machine does not count.

    OMP_NUM_THREADS=1 python benchmarks/scoring.py
"""

import argparse
import statistics
import time

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_curriculum.curriculum.scoring import ScoringInputs, collated, score_rows, token_budget_batches


def make_inputs(model, num_rows, vocabulary):
    """Rows of log-normal length, the second half of each labelled."""
    generator = np.random.default_rng(0)
    lengths = np.clip(np.exp(generator.normal(4.9, 0.7, num_rows)), 24, 512).astype(np.int64)
    ids = [generator.integers(0, vocabulary, length).tolist() for length in lengths]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return ScoringInputs(
        model=model,
        rows=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        batch_columns=("input_ids", "labels"),
        collate=DataCollatorForLanguageModeling(pad_token_id=0),
        lengths=lengths,
        label_counts=np.array([len(row) - len(row) // 2 for row in ids]),
        trainable=np.ones(num_rows, dtype=bool),
        device=torch.device("cpu"),
        autocast_dtype=None,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        progress=False,
    )


def full_logits(model, inputs):
    """Length-sorted batches of 8, log-softmax over all logits, then the labelled ones are picked."""
    losses = np.zeros(len(inputs.lengths))
    order = np.argsort(-inputs.lengths)
    for start in range(0, len(order), 8):
        batch = collated(inputs, order[start : start + 8])
        labels = batch.pop("labels")[:, 1:]
        picked = torch.log_softmax(model(**batch).logits[:, :-1], -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        losses[order[start : start + 8]] = -(picked * (labels != -100)).sum(1).numpy()
    return losses


def floor(model, inputs):
    """Backbone, and one GEMM over the labelled positions."""
    for indices in token_budget_batches(inputs.lengths, inputs.batch_tokens):
        batch = collated(inputs, indices)
        labels = batch.pop("labels")[:, 1:]
        hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
        model.lm_head(hidden[labels != -100])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers, num_attention_heads=8, max_position_embeddings=512,
        )
    ).eval()  # fmt: skip
    inputs = make_inputs(model, options.rows, options.vocabulary)
    arms = {
        "ours": lambda: score_rows(inputs, model, ""),
        "full logits": lambda: full_logits(model, inputs),
        "floor": lambda: floor(model, inputs),
    }
    times = {name: [] for name in arms}
    with torch.inference_mode():
        difference = np.abs(arms["ours"]()[0] / arms["full logits"]() - 1).max()
        for _ in range(options.rounds):
            for name, run in arms.items():
                started = time.process_time()
                run()
                times[name].append(time.process_time() - started)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"vocabulary {options.vocabulary}, {inputs.lengths.sum()} tokens, largest relative difference {difference:.1e}"
    )
    for name, seconds in median.items():
        print(f"{name:12} {seconds:7.2f} s CPU")
    print(f"against full logits: {median['full logits'] / median['ours']:.2f}x (bar: >= 2.5)")
    print(f"of the floor's speed: {median['floor'] / median['ours']:.2f} (bar: >= 0.85)")


if __name__ == "__main__":
    main()
