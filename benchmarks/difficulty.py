"""
How well each scorer finds the known grade of the embedded corpus, and what it costs.

For each seed: the self-paced scorer with the demo's settings, the plain loss of the untrained model and the length;
Spearman's correlation with the grade; wall and CPU time of the self-paced measuring (preparation and all rounds)
against a training epoch of the same model on the same rows with TRL's SFTTrainer, in the same process.

    OMP_NUM_THREADS=1 python benchmarks/difficulty.py --seeds 11 12 13
"""

import argparse
import tempfile
import time

import numpy as np
import torch
from trl import SFTConfig, SFTTrainer

from hf_curriculum import CurriculumConfig, score_dataset
from hf_curriculum.core.ranks import spearman
from hf_curriculum.demo import build_model, build_tokenizer, generate_corpus


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer()
    print("seed  self_paced  loss  length  measuring / epoch (s)  ratio of wall, CPU times")
    for seed in options.seeds:
        rows = generate_corpus(options.rows, seed=seed)
        grade = np.asarray(rows["grade"][:])
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(
                output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                save_strategy="no", disable_tqdm=True, logging_strategy="no", num_train_epochs=1, seed=seed,
                per_device_train_batch_size=options.batch_size, learning_rate=options.learning_rate,
            )  # fmt: skip
            found = {}
            for scorer in ("self_paced", "loss", "length"):
                started = time.perf_counter(), time.process_time()
                config = CurriculumConfig(probe="full", use_cache=False)
                model = build_model(tokenizer, seed=seed)
                scored = score_dataset(model, rows, scorer, processing_class=tokenizer, args=args, config=config)
                found[scorer] = spearman(np.asarray(scored["difficulty"][:]), grade)
                if scorer == "self_paced":
                    measuring = time.perf_counter() - started[0], time.process_time() - started[1]
            trainer = SFTTrainer(
                build_model(tokenizer, seed=seed), args, train_dataset=rows, processing_class=tokenizer
            )
            started = time.perf_counter(), time.process_time()
            trainer.train()
            epoch = time.perf_counter() - started[0], time.process_time() - started[1]
        print(
            f"{seed:4}  {found['self_paced']:10.3f}  {found['loss']:.2f}  {found['length']:6.2f}  "
            f"{measuring[0]:8.1f} / {epoch[0]:6.1f}   {measuring[0] / epoch[0]:.2f}  {measuring[1] / epoch[1]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
