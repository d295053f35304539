"""What a user can set about the curriculum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..core.errors import invalid


if TYPE_CHECKING:
    from .difficulty import DifficultyScorer


__all__ = ["LEVEL_METHODS", "LOSS_NORMALIZATIONS", "PACINGS", "SCORERS", "SPL_WEIGHTS", "CurriculumConfig"]

SCORERS = ("self_paced", "loss", "length", "column")
LOSS_NORMALIZATIONS = ("token", "sample")
SPL_WEIGHTS = ("hard", "linear")
LEVEL_METHODS = ("quantile", "tokens", "jenks", "thresholds")
PACINGS = ("staged", "cumulative", "random", "random_levels", "reverse")


@dataclass
class CurriculumConfig:
    r"""
    Order of training: how rows are scored, cut into levels and paced.

    The four choices that matter are `scorer`, `num_levels`, `pacing` and `replay_fraction`. The abstract of CL-Tuning
    (Sun et al., IEEE CASE 2025) names none of the values, so every default is our choice.

    Args:
        scorer (`str` or [`DifficultyScorer`], *optional*, defaults to `"self_paced"`):
            Where a row's difficulty comes from: `"self_paced"` (learned, see below), `"loss"` (the model's loss as it
            is), `"length"` (number of tokens), `"column"` (a score that the data set carries), or an object of yours
            ([`~hf_curriculum.curriculum.difficulty.DifficultyScorer`]).
        difficulty_column (`str`, *optional*, defaults to `"difficulty"`):
            Column that `scorer="column"` reads.
        loss_normalization (`str`, *optional*, defaults to `"token"`):
            Whether a row's loss is the mean (`"token"`) or the sum (`"sample"`) over its labelled tokens. A mean is
            high for short answers, a sum for long ones: look at the printed correlation with length.
        probe (`str`, *optional*, defaults to `"lora"`):
            What `scorer="self_paced"` fine-tunes and throws away: `"lora"` (adapters on the model), `"full"` (the
            model itself, its weights put back bit by bit), or the Hub id or path of a smaller model with the same
            vocabulary.
        probe_rounds (`int`, *optional*, defaults to `3`):
            Self-paced rounds, at least 2. Each scores every row.
        probe_epochs (`float`, *optional*, defaults to `1.0`):
            Rows the probe is trained on, all rounds together, as a multiple of the data set.
        probe_learning_rate (`float`, *optional*):
            Constant learning rate of the probe. Defaults to the training run's for `"full"` and for an adapter of
            yours, and to `1e-3` for `"lora"`.
        probe_batch_size (`int`, *optional*, defaults to `32`):
            Rows in one probe step over all processes, so that the result does not depend on their number.
        spl_weights (`str`, *optional*, defaults to `"linear"`):
            Weight of an admitted row in the probe's loss: `"hard"` (1, Kumar et al. 2010) or `"linear"`
            (1 - loss / lambda, Jiang et al. 2014).
        lambda_start (`float`, *optional*, defaults to `0.34`):
            Share of the rows that the first round admits, in (0, 1]; it grows linearly to 1 in the last round.
        num_levels (`int`, *optional*, defaults to `3`):
            Number of difficulty levels, at least 1.
        level_method (`str`, *optional*, defaults to `"quantile"`):
            How difficulty is cut into levels: `"quantile"` (equal numbers of rows), `"tokens"` (equal numbers of
            tokens), `"jenks"` (natural breaks: one-dimensional k-means), `"thresholds"` (at `level_thresholds`).
        level_thresholds (`list[float]`, *optional*):
            The `num_levels - 1` increasing cuts of `level_method="thresholds"`; a row at a cut is in the harder level.
        pacing (`str`, *optional*, defaults to `"staged"`):
            `"staged"` (level after level), `"cumulative"` (each stage mixes in one more level: baby steps), or a
            control: `"random"` (no order), `"random_levels"` (stages of the same sizes, rows dealt at random),
            `"reverse"` (hardest first).
        replay_fraction (`float`, *optional*, defaults to `0.0`):
            Rows of earlier levels added to each stage, as a share of the stage's own rows, in [0, 1].
        group_by_length (`bool`, *optional*, defaults to `False`):
            Whether rows of similar length share a batch inside a stage: less padding, a little less shuffling.
        eval_levels (`bool`, *optional*, defaults to `True`):
            Whether to evaluate every level at each stage end. Needs evaluation data.
        score_batch_tokens (`int`, *optional*):
            Tokens, padding included, in one forward of scorer and probe in one process. Defaults to 2048 on CPU,
            where larger batches fall out of the caches (measured: 25 % slower at 16384), and to 16384 elsewhere.
        cache_dir (`str`, *optional*):
            Folder where scores are kept. Defaults to `hf_curriculum/scores` in the Hugging Face cache.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether scores are read from and written to the cache.

    Raises:
        `ValueError`: for a value out of range, or one that does nothing beside the others.

    Example:

    ```python
    >>> from hf_curriculum import CurriculumConfig

    >>> CurriculumConfig(scorer="loss", num_levels=4, pacing="cumulative").num_levels
    4
    ```
    """

    scorer: str | DifficultyScorer = field(
        default="self_paced",
        metadata={"help": f"Where a row's difficulty comes from: one of {', '.join(SCORERS)}.", "cli_type": str},
    )
    difficulty_column: str = field(
        default="difficulty", metadata={"help": "Column with the user's own score, for `scorer=column`."}
    )
    loss_normalization: str = field(
        default="token",
        metadata={"help": "Mean (`token`) or sum (`sample`) of the loss over a row's labelled tokens."},
    )
    probe: str = field(
        default="lora",
        metadata={
            "help": "What the self-paced scorer fine-tunes and throws away: `lora`, `full`, or a model id/path."
        },
    )
    probe_rounds: int = field(default=3, metadata={"help": "Self-paced rounds (>= 2); each scores every row."})
    probe_epochs: float = field(
        default=1.0, metadata={"help": "Rows the probe trains on in all rounds, as a multiple of the data set."}
    )
    probe_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the probe. None: the run's own for `full`, 1e-3 for `lora`."},
    )
    probe_batch_size: int = field(default=32, metadata={"help": "Rows in one probe step, over all processes."})
    spl_weights: str = field(
        default="linear", metadata={"help": f"Weight of an admitted row: one of {', '.join(SPL_WEIGHTS)}."}
    )
    lambda_start: float = field(
        default=0.34, metadata={"help": "Share of the rows that the first self-paced round admits, in (0, 1]."}
    )
    num_levels: int = field(default=3, metadata={"help": "Number of difficulty levels."})
    level_method: str = field(
        default="quantile",
        metadata={"help": f"How difficulty is cut into levels: one of {', '.join(LEVEL_METHODS)}."},
    )
    level_thresholds: list[float] | None = field(
        default=None, metadata={"help": "The increasing cuts of `level_method=thresholds`."}
    )
    pacing: str = field(default="staged", metadata={"help": f"Order of the levels: one of {', '.join(PACINGS)}."})
    replay_fraction: float = field(
        default=0.0, metadata={"help": "Rows of earlier levels added to a stage, as a share of its own, in [0, 1]."}
    )
    group_by_length: bool = field(
        default=False, metadata={"help": "Batch rows of similar length together inside a stage."}
    )
    eval_levels: bool = field(default=True, metadata={"help": "Evaluate every level at each stage end."})
    score_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens, padding included, in one forward of scorer and probe. None: 2048 on CPU, else 16384."
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder where scores are kept. None: in the Hugging Face cache."}
    )
    use_cache: bool = field(default=True, metadata={"help": "Read scores from and write them to the cache."})

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_ranges()
        self._check_combinations()

    def _check_choices(self) -> None:
        for name, choices in (
            ("loss_normalization", LOSS_NORMALIZATIONS),
            ("spl_weights", SPL_WEIGHTS),
            ("level_method", LEVEL_METHODS),
            ("pacing", PACINGS),
        ):
            if getattr(self, name) not in choices:
                raise invalid(name, getattr(self, name), f"one of {', '.join(choices)}")
        if isinstance(self.scorer, str):
            if self.scorer not in SCORERS:
                raise invalid(
                    "scorer", self.scorer, f"one of {', '.join(SCORERS)}", "Or pass an object with a `score` method."
                )
        elif isinstance(self.scorer, type) or not all(
            hasattr(self.scorer, part) for part in ("name", "uses_model", "settings", "score")
        ):
            raise invalid(
                "scorer",
                self.scorer,
                f"one of {', '.join(SCORERS)} or an object with `name`, `uses_model`, `settings()` and `score()`",
                "See `hf_curriculum.curriculum.difficulty.DifficultyScorer`.",
            )

    def _check_ranges(self) -> None:
        for name in ("probe_rounds", "probe_batch_size", "num_levels"):
            if not isinstance(getattr(self, name), int):
                raise invalid(name, getattr(self, name), "an integer")
        for name, valid, expected in (
            ("probe_rounds", self.probe_rounds >= 2, "an integer >= 2"),
            ("probe_epochs", 0 < self.probe_epochs < float("inf"), "a float > 0"),
            ("probe_learning_rate", self.probe_learning_rate is None or self.probe_learning_rate > 0, "a float > 0"),
            ("probe_batch_size", self.probe_batch_size >= 1, "an integer >= 1"),
            ("lambda_start", 0 < self.lambda_start <= 1, "a float in (0, 1]"),
            ("num_levels", self.num_levels >= 1, "an integer >= 1"),
            ("replay_fraction", 0 <= self.replay_fraction <= 1, "a float in [0, 1]"),
            ("score_batch_tokens", self.score_batch_tokens is None or self.score_batch_tokens >= 1, "an integer >= 1"),
        ):
            if not valid:
                raise invalid(name, getattr(self, name), expected)

    def _check_combinations(self) -> None:
        if self.level_method == "thresholds":
            cuts = self.level_thresholds
            if cuts is None or len(cuts) != self.num_levels - 1 or not all(a < b for a, b in zip(cuts, cuts[1:])):
                raise invalid(
                    "level_thresholds",
                    cuts,
                    f"{self.num_levels - 1} increasing numbers, one less than `num_levels={self.num_levels}`",
                )
        elif self.level_thresholds is not None:
            raise invalid(
                "level_thresholds",
                self.level_thresholds,
                f"None with `level_method={self.level_method!r}`, which does not read it",
                "Set `level_method='thresholds'` to cut there.",
            )
        if self.pacing == "random" and self.replay_fraction > 0:
            raise invalid(
                "replay_fraction",
                self.replay_fraction,
                "0 with `pacing='random'`, where no level is earlier than another",
            )
