"""The base models of the demos: freezing and adapters build on what a model knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.console import say
from ..core.errors import invalid
from .corpus import generate_corpus
from .model import build_model, build_tokenizer
from .tasks import generate_copies


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["arithmetic_beginner", "list_copier", "take_steps"]

BATCH_SIZE = 32
LEARNING_RATE = 2e-3
# Highest grade of the corpus, of five, that a beginner has seen.
BEGINNER_GRADE = 2


def list_copier(num_steps: int, seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """
    Trains the embedded model in full to repeat lists: adapters on random weights would have nothing to build on.

    Every process of a run trains it alone on the same rows, so that all have the same.

    Args:
        num_steps (`int`):
            Steps of 32 rows, at least 0.
        seed (`int`, *optional*, defaults to `0`):
            Seed of weights and rows.

    Returns:
        `tuple[transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast]`: on the CPU.

    Raises:
        `ValueError`: for fewer than 0 steps.
    """
    return _trained(num_steps, seed, "repeat lists", lambda count: generate_copies(count, seed=seed))


def arithmetic_beginner(num_steps: int, seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """
    Trains the embedded model in full on easy problems of the corpus: layers of random weights are not worth keeping.

    Every process of a run trains it alone on the same rows, so that all have the same.

    Args:
        num_steps (`int`):
            Steps of 32 rows, at least 0.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The rows are those of another corpus than that of the seed.

    Returns:
        `tuple[transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast]`: on the CPU.

    Raises:
        `ValueError`: for fewer than 0 steps.
    """

    def easy_rows(count: int) -> Dataset:
        # Every grade is as frequent as the others, so two fifths of the rows will do.
        rows = generate_corpus(5 * count, seed=seed + 1)
        easy = [number for number, grade in enumerate(rows["grade"][:]) if grade <= BEGINNER_GRADE]
        return rows.select(easy[:count])

    return _trained(num_steps, seed, "solve easy problems", easy_rows)


def _trained(
    num_steps: int, seed: int, what: str, make_rows: Callable[[int], Dataset]
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    if num_steps < 0:
        raise invalid("num_steps", num_steps, "an integer >= 0")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed)
    if num_steps == 0:
        return model, tokenizer
    say(f"Training the embedded base model to {what}, {num_steps} steps.")
    rows = make_rows(BATCH_SIZE * num_steps)

    def loss_of(step: int) -> torch.Tensor:
        part = rows[BATCH_SIZE * step : BATCH_SIZE * (step + 1)]
        pairs = zip(part["prompt"], part["completion"], strict=True)
        batch = tokenizer([f"{p}\n{c}{tokenizer.eos_token}" for p, c in pairs], padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        return loss

    take_steps(model, num_steps, loss_of, warmup_steps=10)
    return model, tokenizer


def take_steps(
    model: PreTrainedModel, num_steps: int, loss_of: Callable[[int], torch.Tensor], warmup_steps: int
) -> None:
    """
    Trains a model in full: AdamW at 2e-3 with a warm-up and linear decay, gradients clipped at norm 1.

    Args:
        model (`transformers.PreTrainedModel`):
            The model.
        num_steps (`int`):
            Steps.
        loss_of (`Callable[[int], torch.Tensor]`):
            Loss of a step by its number, a scalar.
        warmup_steps (`int`):
            Steps until the learning rate is full.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(num_steps):
        loss_of(step).backward()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / warmup_steps, 1 - step / num_steps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
