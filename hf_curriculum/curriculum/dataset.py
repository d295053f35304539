"""Scoring a data set outside a trainer, with SFTTrainer's own preparation of the rows."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import create_model_from_path

from ..core.console import say
from ..core.errors import invalid, unsupported
from .config import CurriculumConfig
from .difficulty import DifficultyScorer
from .measurement import measure_difficulty


__all__ = ["add_sample_ids", "check_dataset", "score_dataset", "with_features"]

ROW = "_hf_curriculum_row"


def score_dataset(
    model: PreTrainedModel | str | None,
    dataset: Dataset,
    scorer: str | DifficultyScorer | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    *,
    config: CurriculumConfig | None = None,
    held_out: Sequence[bool] | None = None,
) -> Dataset:
    """
    Measures the difficulty of every row.

    Rows are prepared exactly as [`~trl.SFTTrainer`] prepares them for these `args`: chat template, end-of-sequence
    token, loss masking and truncation count.

    Args:
        model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            The model to be trained, or its Hub id or path. Bit-equal afterwards. None for scorers without a model.
        dataset ([`~datasets.Dataset`] of N rows):
            Prompt-completion, conversational, language-modelling or tokenised rows.
        scorer (`str` or [`~hf_curriculum.curriculum.difficulty.DifficultyScorer`], *optional*):
            `"self_paced"`, `"loss"`, `"length"`, `"column"` or an object. Defaults to the config's, `"self_paced"`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. Needed unless the rows are tokenised.
        args ([`~trl.SFTConfig`], *optional*):
            Arguments of the training to come: `max_length`, template, loss masking, device, precision, seed,
            `learning_rate`. Defaults to `SFTConfig()`, in float32 without an accelerator.
        config ([`~hf_curriculum.CurriculumConfig`], *optional*):
            Settings of the scorer and the cache.
        held_out (`Sequence[bool]` of length N, *optional*):
            True for rows that a learned scorer must not train on: they get their score from a probe that has never
            learned from them.

    Returns:
        [`~datasets.Dataset`]: the rows as they were, in the same order, with the columns `sample_id` (kept if it is
        there and unique, else the row's number) and `difficulty` (float, higher is harder; NaN in a row without a
        labelled token after truncation).

    Raises:
        `ValueError`: for an empty data set, a column `difficulty` that is there already (unless it is the one to
            read), rows that cannot be scored, a corrupt cache.
        `NotImplementedError`: for streaming or vision data, or a model partitioned by ZeRO-3.

    Example:

    ```python
    >>> from hf_curriculum import score_dataset
    >>> from hf_curriculum.demo import build_model, build_tokenizer, generate_corpus

    >>> tokenizer = build_tokenizer()
    >>> scored = score_dataset(build_model(tokenizer), generate_corpus(64), "loss", processing_class=tokenizer)
    Scored 64 rows with `loss` in ... s. Spearman with length: ... (all tokens), ... (labelled tokens).
    >>> sorted(set(scored.column_names) - set(generate_corpus(1).column_names))
    ['difficulty', 'sample_id']
    ```
    """
    check_dataset(dataset, "dataset")
    args = args or _default_args()
    config = config or CurriculumConfig()
    if scorer is not None:
        config = replace(config, scorer=scorer)
    if "difficulty" in dataset.column_names and not (
        config.scorer == "column" and config.difficulty_column == "difficulty"
    ):
        raise invalid(
            "dataset",
            "a data set with a column `difficulty`",
            "one without: the score goes there",
            "Rename or remove the column, or use it with `scorer='column'`.",
        )
    if isinstance(model, str):
        # As SFTTrainer loads it; `device_map="auto"` would split the model over the GPUs in every process.
        given = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        options: dict[str, Any] = {"device_map": None, "trust_remote_code": args.trust_remote_code, **given}
        model = create_model_from_path(model, **options)
    if getattr(model, "loss_type", None) == "ForSequenceClassification":
        raise unsupported(
            f"`score_dataset` with {type(model).__name__}",
            "rows are prepared for a language model",
            "Tokenise them and give them to `CurriculumTrainer`, which scores with a classifier.",
        )
    if held_out is not None and (len(held_out) != len(dataset) or all(held_out)):
        got = f"{len(held_out)} values, {sum(map(bool, held_out))} of them True"
        raise invalid("held_out", got, f"one value for each of {len(dataset)} rows, not all of them True")
    numbered = dataset.add_column(ROW, np.arange(len(dataset)))
    prepared = _Preparation(args, processing_class, numbered[0]).prepare(numbered)
    kept = np.asarray(prepared[ROW])
    measurement = measure_difficulty(
        prepared.remove_columns(ROW),
        config,
        model=model,
        collate=DataCollatorForLanguageModeling(pad_token_id=_pad_token_id(processing_class)),
        batch_columns=("input_ids", "labels"),
        args=args,
        processing_class=processing_class,
        trainable=None if held_out is None else ~np.asarray(held_out, dtype=bool)[kept],
        num_dropped=len(dataset) - len(kept),
    )
    difficulty = np.full(len(dataset), np.nan)
    difficulty[kept] = measurement.difficulty
    scored = add_sample_ids(dataset)
    if "difficulty" in scored.column_names:
        scored = scored.remove_columns("difficulty")
    return scored.add_column("difficulty", difficulty)


def check_dataset(dataset: object, name: str) -> None:
    """
    Refuses data sets that cannot carry levels.

    Args:
        dataset (`object`):
            What the user passed.
        name (`str`):
            The argument's name.

    Raises:
        `ValueError`: for an empty data set, or an object of another kind.
        `NotImplementedError`: for streaming or vision data.
    """
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        raise unsupported(
            f"Streaming data (`{name}`)",
            "rows must be scored and ordered before training, and a stream has neither length nor random access",
            "Load the data set without `streaming=True`, or stream one level after another in runs of your own.",
        )
    if not isinstance(dataset, Dataset):
        raise invalid(
            name,
            f"a {type(dataset).__name__}",
            "a `datasets.Dataset`",
            "`Dataset.from_list(rows)` makes one; of a `DatasetDict` pass one split.",
        )
    if len(dataset) == 0:
        raise invalid(name, "0 rows", "at least one row")
    if vision := {"image", "images"} & set(dataset.column_names):
        raise unsupported(
            f"Vision data (column `{vision.pop()}`)",
            "images are prepared while batches are made, so that rows cannot be scored without them",
            "Bring text only, or train with TRL's own trainer.",
        )


def add_sample_ids(dataset: Dataset) -> Dataset:
    """
    Gives rows an id that stays with them when rows are dropped or moved.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any rows.

    Returns:
        [`~datasets.Dataset`]: with a column `sample_id`: the one there if its values are unique, else row numbers.
    """
    if "sample_id" in dataset.column_names:
        ids = dataset.with_format(None)["sample_id"][:]
        if len(set(map(repr, ids))) == len(dataset) and not isinstance(ids[0], list | dict):
            return dataset
        say("The values of `sample_id` are not unique: rows are known by their numbers instead.")
        dataset = dataset.remove_columns("sample_id")
    return dataset.add_column("sample_id", np.arange(len(dataset)))


def with_features(rows: Dataset, features: Features) -> Dataset:
    """
    Gives rows the columns and types of others, so that they can stand in one table.

    Args:
        rows ([`~datasets.Dataset`]):
            Evaluation rows.
        features ([`~datasets.Features`]):
            Those of the training rows.

    Returns:
        [`~datasets.Dataset`]: without the columns that the training rows do not have.

    Raises:
        `ValueError`: for a column that is missing, or whose values do not fit.
    """
    if missing := [name for name in features if name not in rows.column_names]:
        raise invalid(
            "eval_dataset",
            f"columns {', '.join(rows.column_names)}",
            f"those of the training rows, {', '.join(missing)} among them",
            "Prepare both in one way, or set `eval_levels=False`.",
        )
    rows = rows.select_columns(list(features))
    if rows.features == features:
        return rows
    try:
        return rows.cast(features)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError) as error:
        raise invalid(
            "eval_dataset",
            f"columns of types {rows.features}",
            f"{features}, as the training rows have",
            f"{error} Prepare both in one way, or set `eval_levels=False`.",
        ) from error


def _pad_token_id(processing_class: PreTrainedTokenizerBase | None) -> int:
    """Token to pad with: the tokenizer's own, else its end-of-sequence token; 0, which is masked out, without one."""
    if processing_class is None:
        return 0
    ids = (processing_class.pad_token_id, processing_class.eos_token_id, 0)
    return next(int(token) for token in ids if token is not None)


def _default_args() -> SFTConfig:
    on_cpu = not torch.accelerator.is_available()
    return SFTConfig(use_cpu=on_cpu, bf16=False if on_cpu else None, gradient_checkpointing=False, report_to="none")


class _Preparation(SFTTrainer):
    """
    SFTTrainer's preparation of a data set without its model: what its `__init__` decides before it prepares.

    Read in TRL 1.16. A test compares the rows with those of a real SFTTrainer for every kind of data set.
    """

    def __init__(
        self, args: SFTConfig, processing_class: PreTrainedTokenizerBase | None, sample: dict[str, object]
    ) -> None:
        if args.packing or args.padding_free:
            raise unsupported(
                "Scoring with `packing` or `padding_free`", "a pack has no difficulty of its own", "Set both to False."
            )
        if processing_class is None and "input_ids" not in sample:
            raise invalid("processing_class", None, "a tokenizer, since the rows have no `input_ids`")
        self.args: SFTConfig = args
        self._tokenizer = processing_class
        if processing_class is not None and (args.eos_token is not None or args.chat_template_path is not None):
            self._tokenizer = copy.deepcopy(processing_class)
            self._apply_token_and_template(args)
        self.chat_template = None
        if args.assistant_only_loss and not has_generation_markers(self._tokenizer.chat_template):
            self.chat_template = get_training_chat_template(self._tokenizer)
        wanted = args.completion_only_loss
        self.completion_only_loss = "prompt" in sample and "completion" in sample if wanted is None else wanted

    def _apply_token_and_template(self, args: SFTConfig) -> None:
        if args.eos_token is not None:
            self._tokenizer.eos_token = args.eos_token
        if args.chat_template_path is not None:
            if not args.chat_template_path.endswith((".jinja", ".j2")):
                raise unsupported(
                    "Scoring with the chat template of another tokenizer",
                    "it can add tokens that the model to score with does not have",
                    "Apply `trl.clone_chat_template` to model and tokenizer first.",
                )
            self._tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")

    def prepare(self, dataset: Dataset) -> Dataset:
        """Template, tokens, labels, truncation; rows left without a label are dropped."""
        prepared = self._prepare_dataset(dataset, self._tokenizer, self.args, False, None, "scored")
        if len(prepared) == 0:
            raise invalid(
                "dataset",
                f"{len(dataset)} rows, none with a labelled token",
                "at least one row with a labelled token after truncation",
                "Look at `max_length` and at the prompts' lengths.",
            )
        return prepared
