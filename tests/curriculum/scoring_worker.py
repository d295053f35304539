"""Scores a small corpus with the scorer named first and prints the result of rank 0."""

import sys

import torch
from trl import SFTConfig

from hf_curriculum import CurriculumConfig, score_dataset
from hf_curriculum.core.distributed import end_processes
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer


def main():
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    args = SFTConfig(
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True, learning_rate=1e-3
    )
    config = CurriculumConfig(probe="full", probe_epochs=2.0, cache_dir=sys.argv[2])
    for _ in range(2):  # measured, then read back from the cache
        scored = score_dataset(
            model, generate_corpus(400), sys.argv[1], processing_class=tokenizer, args=args, config=config
        )
        if args.process_index == 0:
            print("SCORES", list(scored["difficulty"]), flush=True)
    end_processes()


if __name__ == "__main__":
    main()
