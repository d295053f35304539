"""
Does fine-tuning move attention to semantically central words? Full fine-tuning and LoRA on worded maths, per seed.

Tunes with TRL's SFTTrainer (one epoch, batch 4, cosine; learning rate 5e-4 full, 2e-3 LoRA of rank 16 on all linear
layers), then compares the attention of base and tuned model over held-out rows: table with bootstrap intervals over
texts, causal check, pictures. On one CPU core a model of 8 M parameters takes about six minutes per arm and seed.

    OMP_NUM_THREADS=1 python benchmarks/attention_focus.py --model base-8m \
        --train gsm8k/train.jsonl --test gsm8k/test.jsonl
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hf_curriculum.analysis.attention_causal import causal_check
from hf_curriculum.analysis.attention_comparison import compare_attention
from hf_curriculum.analysis.attention_measurement import measure_attention
from hf_curriculum.analysis.attention_plots import draw_all


PROMPT = "Question: {question}\nAnswer:"
LEARNING_RATES = {"full": 5e-4, "lora": 2e-3}


def load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def tune(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, rows: Dataset, method: str, seed: int):
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            seed=seed,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            learning_rate=LEARNING_RATES[method],
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_length=320,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            bf16=False,
            gradient_checkpointing=False,
        )
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=load(options.model),
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora if method == "lora" else None,
        )
        trainer.train()
        return trainer.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, help="JSONL with `question` and `answer`.")
    parser.add_argument("--test", required=True, help="The same, held out: the probe texts.")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=150)
    parser.add_argument("--methods", nargs="*", default=["full", "lora"], choices=list(LEARNING_RATES))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--output_dir", default="outputs/attention_focus")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    files = {"train": options.train, "test": options.test}
    data = load_dataset("json", data_files=files)
    rows = (
        data["train"]
        .select(range(options.rows))
        .map(
            lambda row: {"prompt": PROMPT.format(**row), "completion": " " + row["answer"]},
            remove_columns=data["train"].column_names,
        )
    )
    held_out = data["test"].select(range(options.texts))
    probes = {
        "worked answers": [PROMPT.format(**row) + " " + row["answer"] for row in held_out],
        "questions alone": ["Question: " + row["question"] for row in held_out],
    }
    base = load(options.model)
    before = {name: measure_attention(base, texts, processing_class=tokenizer) for name, texts in probes.items()}
    answers = probes["worked answers"]
    print("base", causal_check(base, answers, before["worked answers"], processing_class=tokenizer, draws=2).summary())
    for method in options.methods:
        for seed in options.seeds:
            model = tune(options, tokenizer, rows, method, seed)
            for name, texts in probes.items():
                after = measure_attention(model, texts, processing_class=tokenizer)
                comparison = compare_attention(before[name], after)
                comparison.show(f"{method}, seed {seed}, {name}")
                print(comparison.claim())
                folder = Path(options.output_dir) / f"{method}-{seed}" / name.replace(" ", "-")
                draw_all(texts, before[name], after, comparison, folder, title=f"base -> {method}, seed {seed}")
                numbers = {measure: vars(item) for measure, item in comparison.changes.items()}
                (folder / "changes.json").write_text(json.dumps(numbers, indent=2))
                if name == "worked answers":
                    print(
                        method, seed, causal_check(model, texts, after, processing_class=tokenizer, draws=2).summary()
                    )


if __name__ == "__main__":
    main()
