"""From tokenised rows to their difficulty: what the data-set function and the trainers share."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from ..core.console import say
from ..core.errors import invalid, unsupported
from ..core.ranks import spearman
from .cache import cached_scores, default_cache_dir, fingerprint
from .config import CurriculumConfig
from .difficulty import DifficultyScorer, LossScorer, build_scorer
from .scoring import Batch, ScoringInputs, collated
from .self_paced import SelfPacedScorer


__all__ = ["Measurement", "count_labels", "measure_difficulty", "row_lengths"]

# Above this rank correlation the table says that the score is little more than the length. Our choice.
LENGTH_SUSPICION = 0.9
CPU_BATCH_TOKENS = 2048
BATCH_TOKENS = 16384
_SHOWN_ROWS = 16


@dataclass(frozen=True)
class Measurement:
    """
    Difficulty of N rows, with what is needed to judge it.

    Args:
        difficulty (`np.ndarray` of shape `(N,)`, float64):
            Higher is harder; NaN in rows without a labelled token.
        lengths (`np.ndarray` of shape `(N,)`, int64):
            Tokens.
        label_counts (`np.ndarray` of shape `(N,)`, int64):
            Labelled tokens.
        trainable (`np.ndarray` of shape `(N,)`, bool):
            False for evaluation rows, which the description leaves out.
        num_dropped (`int`):
            Rows that the preparation had dropped already, having no labelled token.
        scorer (`str`):
            Name of the scorer.
        seconds (`float`):
            Wall time, reading from the cache included.
    """

    difficulty: np.ndarray
    lengths: np.ndarray
    label_counts: np.ndarray
    trainable: np.ndarray
    num_dropped: int
    scorer: str
    seconds: float

    @property
    def scored(self) -> np.ndarray:
        """Which training rows have a difficulty, `(N,)`, bool."""
        return np.asarray((self.label_counts > 0) & self.trainable)

    @property
    def num_unlabelled(self) -> int:
        """Training rows without a labelled token, those that the preparation dropped included."""
        return self.num_dropped + int((self.trainable & (self.label_counts == 0)).sum())

    @property
    def length_correlation(self) -> float:
        """Spearman's correlation of difficulty and number of tokens over the scored rows."""
        return spearman(self.difficulty[self.scored], self.lengths[self.scored])

    @property
    def label_correlation(self) -> float:
        """Spearman's correlation of difficulty and number of labelled tokens over the scored rows."""
        return spearman(self.difficulty[self.scored], self.label_counts[self.scored])

    def describe(self) -> str:
        """What was scored and how it relates to length, for people."""
        text = (
            f"Scored {int(self.scored.sum()):,} rows with `{self.scorer}` in {self.seconds:.1f} s. "
            f"Spearman with length: {self.length_correlation:.2f} (all tokens), "
            f"{self.label_correlation:.2f} (labelled tokens)."
        )
        if self.num_unlabelled:
            text += (
                f" {self.num_unlabelled:,} rows have no labelled token (too long for `max_length`?) and are left out."
            )
        if self.scorer != "length" and abs(self.length_correlation) >= LENGTH_SUSPICION:
            text += " This score says little more than the length: see `loss_normalization`."
        return text


def row_lengths(rows: Dataset) -> np.ndarray:
    """
    Tokens of each row, without those that its `attention_mask` masks out: rows may have been padded already.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            Rows with `input_ids`, and maybe `attention_mask`.

    Returns:
        `np.ndarray` of shape `(N,)`, int64.

    Raises:
        `ValueError`: without a column `input_ids`.
    """
    sizes = _row_sizes(rows)
    if "attention_mask" not in rows.column_names:
        return sizes
    values = [part.flatten().to_numpy(zero_copy_only=False) for part in _parts(rows, "attention_mask")]
    attended = np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, dtype=np.int64), *values]) != 0)])
    ends = np.cumsum(sizes)
    return np.asarray(attended[ends] - attended[ends - sizes], dtype=np.int64)


def _row_sizes(rows: Dataset) -> np.ndarray:
    """Tokens of each row, padding included."""
    if "input_ids" not in rows.column_names:
        raise invalid(
            "train_dataset",
            f"columns {', '.join(rows.column_names)}",
            "a tokenised data set with a column `input_ids`",
            "Tokenise it first, or use the SFT trainer, which does.",
        )
    sizes = [pc.list_value_length(part).to_numpy(zero_copy_only=False) for part in _parts(rows, "input_ids")]
    return np.concatenate([np.empty(0, dtype=np.int64), *sizes]).astype(np.int64)


def count_labels(rows: Dataset, lengths: np.ndarray, shift: bool = True) -> np.ndarray:
    """
    Labelled tokens of each row.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            Rows; `labels` may be a list per token, one label per row, or left to the collator.
        lengths (`np.ndarray` of shape `(N,)`, int64):
            Tokens of each row.
        shift (`bool`, *optional*, defaults to `True`):
            Whether a position predicts the label of the next, as in a causal model: the first one never counts.

    Returns:
        `np.ndarray` of shape `(N,)`, int64.
    """
    column = next((name for name in ("labels", "label", "label_ids") if name in rows.column_names), None)
    if column is None:
        return np.asarray(np.maximum(lengths - shift, 0))
    counts = [np.empty(0, dtype=np.int64)]
    for part in _parts(rows, column):
        if not (pa.types.is_list(part.type) or pa.types.is_large_list(part.type)):
            return np.ones(len(rows), dtype=np.int64)
        sizes = pc.list_value_length(part).to_numpy(zero_copy_only=False).astype(np.int64)
        values = part.flatten().to_numpy(zero_copy_only=False)
        if np.issubdtype(values.dtype, np.floating):  # multi-label classification
            return np.ones(len(rows), dtype=np.int64)
        ends = np.cumsum(sizes)
        labelled = np.concatenate([[0], np.cumsum(values != -100)])
        starts = ends - sizes
        first = np.zeros(len(sizes), dtype=np.int64)
        first[sizes > 0] = (values[starts[sizes > 0]] != -100) & shift
        counts.append(labelled[ends] - labelled[starts] - first)
    return np.concatenate(counts)


def _parts(rows: Dataset, column: str) -> Iterator[pa.Array]:
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        yield pa.concat_arrays(table.column(column).chunks)


def measure_difficulty(
    rows: Dataset,
    config: CurriculumConfig,
    *,
    model: nn.Module | None,
    collate: Callable[[list[dict[str, Any]]], Batch],
    batch_columns: Sequence[str],
    args: TrainingArguments,
    processing_class: object | None = None,
    trainable: Sequence[bool] | np.ndarray | None = None,
    num_dropped: int = 0,
    shift_labels: bool = True,
) -> Measurement:
    """
    Measures the difficulty of tokenised rows with the config's scorer, through the cache. Collective.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            Tokenised rows.
        config ([`~hf_curriculum.CurriculumConfig`]):
            Which scorer, and its settings.
        model (`nn.Module`, *optional*):
            The model; bit-equal afterwards.
        collate (`Callable[[list[dict]], dict[str, torch.Tensor]]`):
            The data collator.
        batch_columns (`Sequence[str]`):
            The columns that it reads.
        args ([`~transformers.TrainingArguments`]):
            Read: `device`, `bf16`, `seed`, `data_seed`, `learning_rate`, `gradient_checkpointing`, `disable_tqdm`.
        processing_class (`object`, *optional*):
            The tokenizer.
        trainable (`Sequence[bool]` of length N, *optional*):
            False for rows that a learned scorer must not train on. Defaults to True everywhere.
        num_dropped (`int`, *optional*, defaults to `0`):
            Rows that the preparation had dropped already; only told.
        shift_labels (`bool`, *optional*, defaults to `True`):
            Whether a position predicts the label of the next. See [`count_labels`].

    Returns:
        [`Measurement`]

    Raises:
        `ValueError`: if no row has a labelled token, a score is not finite, or the cache file is corrupt.
        `NotImplementedError`: if the model is partitioned over processes.
        `OSError`: if the cache folder cannot be written.
    """
    started = time.perf_counter()
    scorer = build_scorer(config)
    lengths = row_lengths(rows)
    label_counts = count_labels(rows, lengths, shift_labels)
    kept = np.flatnonzero(label_counts > 0)
    learnable = np.ones(len(rows), dtype=bool) if trainable is None else np.asarray(trainable, dtype=bool)
    if not learnable[kept].any():
        raise invalid(
            "train_dataset",
            f"{len(rows):,} rows, none with a labelled token",
            "at least one row with a labelled token after truncation",
            "Look at `max_length` and at the prompts' lengths.",
        )
    difficulty = np.full(len(rows), np.nan)
    inputs = ScoringInputs(
        model=model,
        rows=rows if len(kept) == len(rows) else rows.select(kept),
        batch_columns=batch_columns,
        collate=collate,
        lengths=lengths[kept],
        sizes=_row_sizes(rows)[kept],
        label_counts=label_counts[kept],
        trainable=learnable[kept],
        device=args.device,
        autocast_dtype=torch.bfloat16 if args.bf16 else None,
        learning_rate=args.learning_rate,
        gradient_checkpointing=bool(args.gradient_checkpointing),
        processing_class=processing_class,
        seed=args.seed if args.data_seed is None else args.data_seed,
        batch_tokens=config.score_batch_tokens or (CPU_BATCH_TOKENS if args.device.type == "cpu" else BATCH_TOKENS),
        progress=not args.disable_tqdm,
    )
    difficulty[kept] = _scores(scorer, inputs, config)
    measurement = Measurement(
        difficulty, lengths, label_counts, learnable, num_dropped, scorer.name, time.perf_counter() - started
    )
    say(measurement.describe())
    return measurement


def _scores(scorer: DifficultyScorer, inputs: ScoringInputs, config: CurriculumConfig) -> np.ndarray:
    if not scorer.uses_model:
        scores = scorer.score(inputs)
    else:
        _check_whole(inputs.model)
        with _placed(inputs.model, inputs.device):
            if config.use_cache:
                settings = {
                    "scorer": scorer.name,
                    "precision": str(inputs.autocast_dtype),
                    "collator": _collator_digest(inputs),
                    **scorer.settings(),
                }
                if not isinstance(scorer, LossScorer):  # which learns nothing
                    settings |= {"seed": inputs.seed, "learning_rate": inputs.learning_rate}
                ours = isinstance(scorer, LossScorer | SelfPacedScorer)  # which read what the collator reads
                rows = inputs.rows.select_columns(list(inputs.batch_columns)) if ours else inputs.rows
                name = fingerprint(rows, inputs.trainable, inputs.model, settings)
                folder = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
                scores = cached_scores(folder / f"{name}.npz", len(inputs.rows), lambda: scorer.score(inputs))
            else:
                scores = scorer.score(inputs)
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(inputs.rows),) or not np.isfinite(scores).all():
        raise invalid(
            f"result of the scorer {scorer.name}",
            f"shape {scores.shape}, {np.count_nonzero(~np.isfinite(scores))} values not finite",
            f"{len(inputs.rows)} finite numbers",
        )
    return scores


def _collator_digest(inputs: ScoringInputs) -> str:
    """What the collator makes of a few rows: the same rows can get other labels from it."""
    digest = xxhash.xxh3_128()
    shown = np.unique(np.linspace(0, len(inputs.rows) - 1, _SHOWN_ROWS).astype(np.int64))
    for name, value in sorted(collated(inputs, shown).items()):
        digest.update(f"{name} {value.tolist() if isinstance(value, torch.Tensor) else value}".encode())
    return digest.hexdigest()


def _check_whole(model: nn.Module | None) -> None:
    """Refuses a model of which each process holds a part: a backbone call would not gather it."""
    if model is not None and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise unsupported(
            "Scoring with a model that DeepSpeed ZeRO-3 has partitioned",
            "each process holds a part of every weight before training starts",
            "Score first without ZeRO-3 (`score_dataset`, or the recipe with `--curriculum_score_only true`), then "
            "train on the scored data set with `scorer='column'` (`--curriculum_scorer column`).",
        )


@contextmanager
def _placed(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Moves the model to the device for the time of scoring: under DeepSpeed and FSDP the Trainer has not yet."""
    home = None if model is None else next(model.parameters()).device
    if model is None or home == device or hasattr(model, "hf_device_map"):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
