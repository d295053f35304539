"""What each stage trains on: pure functions of (levels, pacing, replay, epochs, seed)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..core.errors import invalid
from ..core.order import draw_order, mix_streams, repeat_order, seeded_order


__all__ = ["StageContent", "count_levels", "plan_steps", "spread_groups", "stage_contents", "stage_sizes"]

IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

# What a seeded order is for, second in its key: no two orders of a run are correlated.
_ROWS, _REPLAY, _MIX, _DEAL = range(4)
# After those of `plan.py`.
_SPREAD = 6


@dataclass(frozen=True)
class StageContent:
    """
    Rows of one stage, before they are cut into global batches.

    Args:
        levels (`tuple[int, ...]`):
            Levels whose rows the stage trains on, replayed rows not counted.
        introduces (`tuple[int, ...]`):
            Levels trained on for the first time; empty where stages do not follow levels.
        rows (`np.ndarray` of shape `(n,)` and dtype `int64`):
            Rows in training order.
        replayed (`np.ndarray` of shape `(n,)` and dtype `bool`):
            Which of them are drawn again from the levels of earlier stages.
    """

    levels: tuple[int, ...]
    introduces: tuple[int, ...]
    rows: IntArray
    replayed: BoolArray


def count_levels(levels: npt.NDArray[np.generic], num_levels: int) -> list[int]:
    """
    Counts the rows of each level, and refuses levels that no stages can be made of.

    Args:
        levels (`np.ndarray` of shape `(N,)`):
            Level of each row, an integer.
        num_levels (`int`):
            Number of levels.

    Returns:
        `list[int]`: rows in each level, none of them 0.

    Raises:
        `ValueError`: for no rows, values that are no integers in `[0, num_levels)`, or an empty level.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_curriculum.curriculum.pacing import count_levels

    >>> count_levels(np.array([0, 1, 0]), 2)
    [2, 1]
    ```
    """
    if levels.ndim != 1 or len(levels) == 0 or not np.issubdtype(levels.dtype, np.integer):
        got = "no rows" if levels.size == 0 else f"an array of shape {levels.shape} and dtype {levels.dtype}"
        raise invalid("levels", got, "one integer for each row, and at least one row")
    if len(levels) < num_levels:
        expected = f"at least {num_levels}, one for each level"
        raise invalid("levels", f"{len(levels)} rows", expected, "Lower `num_levels`.")
    lowest, highest = int(levels.min()), int(levels.max())
    if lowest < 0 or highest >= num_levels:
        raise invalid(
            "levels",
            f"levels {lowest} to {highest}",
            f"integers in [0, {num_levels}), as `num_levels={num_levels}` says",
            "Pass the same `num_levels` to `assign_levels` and to `CurriculumConfig`.",
        )
    counts = [int(count) for count in np.bincount(levels.astype(np.int64, copy=False), minlength=num_levels)]
    if 0 in counts:
        fix = "Lower `num_levels`, or cut elsewhere."
        raise invalid("levels", f"{counts} rows in the levels", "at least one row in each", fix)
    return counts


def stage_sizes(
    level_counts: Sequence[int], pacing: str, *, replay_fraction: float = 0.0, num_train_epochs: float = 1.0
) -> list[tuple[int, int]]:
    """
    Counts the rows of each stage without ordering them.

    Args:
        level_counts (`Sequence[int]`):
            Rows in each level, easiest first.
        pacing (`str`):
            As in [`stage_contents`].
        replay_fraction (`float`, *optional*, defaults to `0.0`):
            Replayed rows as a share of a stage's own.
        num_train_epochs (`float`, *optional*, defaults to `1.0`):
            How often each row is seen, replay not counted.

    Returns:
        `list[tuple[int, int]]`: own and replayed rows of each [`StageContent`] of [`stage_contents`].

    Example:

    ```python
    >>> from hf_curriculum.curriculum.pacing import stage_sizes

    >>> stage_sizes([6, 6, 6], "cumulative", replay_fraction=0.5)
    [(2, 0), (5, 2), (11, 6)]
    ```
    """
    if pacing == "random":
        return [(round(num_train_epochs * sum(level_counts)), 0)]
    draws = [round(num_train_epochs * count) for count in level_counts]
    if pacing == "cumulative":
        num_levels = len(draws)
        parts = [_split_sizes(count, num_levels - level) for level, count in enumerate(draws)]
        own = [sum(parts[level][stage - level] for level in range(stage + 1)) for stage in range(num_levels)]
    else:
        own = draws[::-1] if pacing == "reverse" else draws
    return [(count, round(replay_fraction * count) if stage else 0) for stage, count in enumerate(own)]


def plan_steps(
    level_counts: Sequence[int],
    pacing: str,
    *,
    global_batch_size: int,
    replay_fraction: float = 0.0,
    num_train_epochs: float = 1.0,
    max_steps: int = -1,
) -> tuple[float, list[int]]:
    """
    Counts the optimizer steps of each stage without ordering a row.

    A stage ends with the first step at or after its last row. `max_steps` shortens every stage in proportion (largest
    remainder, at least one step each), after taking the smallest multiple of `num_train_epochs` that is long enough.

    Args:
        level_counts (`Sequence[int]`):
            Rows in each level, easiest first.
        pacing (`str`):
            As in [`stage_contents`].
        global_batch_size (`int`):
            Rows in one optimizer step.
        replay_fraction (`float`, *optional*, defaults to `0.0`):
            Replayed rows as a share of a stage's own.
        num_train_epochs (`float`, *optional*, defaults to `1.0`):
            How often each row is seen, replay not counted.
        max_steps (`int`, *optional*, defaults to `-1`):
            Steps in all, if positive.

    Returns:
        `tuple[float, list[int]]`: the epochs that the stages are to be made for, and the steps of each
        [`StageContent`].

    Raises:
        `ValueError`: for numbers out of range, or if a stage gets no step of its own.

    Example:

    ```python
    >>> from hf_curriculum.curriculum.pacing import plan_steps

    >>> plan_steps([5, 5], "staged", global_batch_size=2, max_steps=4)
    (1.0, [2, 2])
    ```
    """
    for name, value, valid, expected in (
        ("global_batch_size", global_batch_size, global_batch_size >= 1, "an integer >= 1"),
        ("num_train_epochs", num_train_epochs, 0 < num_train_epochs < float("inf"), "a float > 0"),
        ("max_steps", max_steps, max_steps > 0 or max_steps == -1, "an integer >= 1, or -1 for all of the plan"),
    ):
        if not valid:
            raise invalid(name, value, expected)
    num_stages = len(level_counts)

    def sizes(multiple: int) -> list[int]:
        epochs = num_train_epochs * multiple
        contents = stage_sizes(level_counts, pacing, replay_fraction=replay_fraction, num_train_epochs=epochs)
        return [own + replay for own, replay in contents]

    multiple = 1
    if max_steps > 0:
        if max_steps < num_stages:
            expected = f"at least {num_stages}, one step for each stage"
            raise invalid("max_steps", max_steps, expected, "Lower `num_levels`, or train for more steps.")
        needed = (max_steps - 1) * global_batch_size + 1
        # Rounding adds less than two rows to a stage, so no smaller multiple can be long enough.
        per_multiple = num_train_epochs * (1 + replay_fraction) * sum(level_counts)
        multiple = max(1, floor((needed - 2 * num_stages) / per_multiple))
        while sum(sizes(multiple)) < needed:
            multiple += 1
    rows = sizes(multiple)
    ends = [0, *(-(-int(total) // global_batch_size) for total in np.cumsum(rows))]
    steps = [end - start for start, end in zip(ends, ends[1:])]
    if ends[-1] < num_stages or min(steps) < 1:
        raise invalid(
            "global_batch_size",
            f"{global_batch_size}, which makes {ends[-1]} global batches of {sum(rows)} rows",
            f"at least one global batch for each of {num_stages} stages, which hold {rows} rows",
            "Lower `num_levels` or the global batch size, or train for more epochs.",
        )
    if 0 < max_steps < ends[-1]:
        steps = _shorten(steps, max_steps)
    return num_train_epochs * multiple, steps


def _shorten(steps: list[int], max_steps: int) -> list[int]:
    """Shortens in proportion by largest remainder, leaving at least one step each; earlier stages win ties."""
    quota = np.array(steps) * max_steps / sum(steps)
    short = np.maximum(1, np.floor(quota)).astype(np.int64)
    while short.sum() < max_steps:
        short[np.argmax(quota - short)] += 1
    while short.sum() > max_steps:
        short[np.argmax(np.where(short > 1, short - quota, -np.inf))] -= 1
    return [int(count) for count in short]


def stage_contents(
    levels: IntArray,
    pacing: str,
    *,
    num_levels: int,
    replay_fraction: float = 0.0,
    num_train_epochs: float = 1.0,
    seed: int = 0,
) -> Iterator[StageContent]:
    """
    Orders the rows of each stage.

    Under every pacing each row is seen `num_train_epochs` times in all; replayed rows come on top. A fractional
    number gives `round(num_train_epochs * n)` draws from a level of `n` rows, the last pass being partial.

    - `"staged"`: stage s holds all passes over level s. `"reverse"`: the same, hardest level first.
    - `"random_levels"`: `"staged"`, with rows dealt to the levels at random.
    - `"cumulative"`: stage s trains on levels 0 to s. The draws of level j are split into equal parts for the stages
      from j to the last, and each stage interleaves its parts (the baby steps of Bengio et al. 2009 and Spitkovsky et
      al. 2010, at a fixed number of views).
    - `"random"`: one content with all rows; its stages are equal parts of the steps.

    Replay adds `round(replay_fraction * own)` rows to every stage but the first, drawn from all levels of earlier
    stages without replacement per pass, in an order of the stage's own, and interleaved.

    Args:
        levels (`np.ndarray` of shape `(N,)` and dtype `int64`):
            Level of each row, in `[0, num_levels)`.
        pacing (`str`):
            One of `hf_curriculum.curriculum.config.PACINGS`.
        num_levels (`int`):
            Number of levels.
        replay_fraction (`float`, *optional*, defaults to `0.0`):
            Replayed rows as a share of a stage's own, at least 0.
        num_train_epochs (`float`, *optional*, defaults to `1.0`):
            How often each row is seen.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all orders.

    Returns:
        `Iterator[StageContent]`: the stages in order, made one at a time; `num_levels` of them, or 1 for `"random"`.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_curriculum.curriculum.pacing import stage_contents

    >>> [len(content.rows) for content in stage_contents(np.array([0, 1, 0, 1]), "staged", num_levels=2)]
    [2, 2]
    ```
    """
    if pacing == "random":
        rows = repeat_order(len(levels), num_train_epochs, seed, _ROWS, 0)
        yield StageContent(tuple(range(num_levels)), (), rows, np.zeros(len(rows), dtype=np.bool_))
        return
    if pacing == "random_levels":
        levels = levels[seeded_order(len(levels), seed, _DEAL)]
    stages = _cumulative_streams if pacing == "cumulative" else _staged_streams
    order = range(num_levels)[::-1] if pacing == "reverse" else range(num_levels)
    everything = tuple(range(num_levels))
    for stage, (level, streams) in enumerate(zip(order, stages(levels, order, num_train_epochs, seed))):
        own = sum(len(stream) for stream in streams)
        earlier = np.isin(levels, list(order)[:stage]).nonzero()[0] if stage and replay_fraction else levels[:0]
        count = round(replay_fraction * own) if stage else 0
        replay = earlier[draw_order(len(earlier), count, seed, _REPLAY, stage)]
        rows, source = mix_streams([*streams, replay], seed, _MIX, stage)
        follows = pacing != "random_levels"
        trained = everything[: stage + 1] if pacing == "cumulative" else (level,) if follows else everything
        yield StageContent(trained, (level,) if follows else (), rows, source == len(streams))


def spread_groups(contents: Iterable[StageContent], groups: IntArray, seed: int = 0) -> Iterator[StageContent]:
    """
    Spreads the groups of each stage evenly over it.

    The k-th of the `n_g` rows that group g has in the stage goes to `(k + 1/2) / n_g` of its length, equal places in a
    seeded order. So in the first m of n rows group g has `m * n_g / n` to within `1/2 + G/2 * n_g/n` rows, of G groups
    in the stage. The order inside each group stays, and with it the passes of its rows.

    Args:
        contents (`Iterable[StageContent]`):
            The stages.
        groups (`np.ndarray` of shape `(N,)` and dtype `int64`):
            Group of each row of the data set.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of equal places.

    Returns:
        `Iterator[StageContent]`: the same rows in the new order.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_curriculum.curriculum.pacing import StageContent, spread_groups

    >>> stage = StageContent((0,), (0,), np.arange(6), np.zeros(6, dtype=bool))
    >>> groups = np.array([0, 0, 0, 0, 1, 1])
    >>> groups[next(spread_groups([stage], groups)).rows].tolist()
    [0, 1, 0, 0, 1, 0]
    ```
    """
    for stage, content in enumerate(contents):
        own, counts = np.unique(groups[content.rows], return_inverse=True, return_counts=True)[1:]
        # A stable sort by group gives each row its place among those of its group.
        by_group = np.argsort(own, kind="stable")
        place = np.empty(len(own), dtype=np.int64)
        place[by_group] = np.arange(len(own)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.lexsort((seeded_order(len(own), seed, _SPREAD, stage), (place + 0.5) / counts[own]))
        yield replace(content, rows=content.rows[order], replayed=content.replayed[order])


def _staged_streams(levels: IntArray, order: Sequence[int], epochs: float, seed: int) -> Iterator[list[IntArray]]:
    """Yields all passes over one level per stage."""
    for level in order:
        yield [_level_stream(levels, level, epochs, seed)]


def _cumulative_streams(levels: IntArray, order: Sequence[int], epochs: float, seed: int) -> Iterator[list[IntArray]]:
    """Yields a part of each level up to the stage's, cut from one stream per level so that its passes stay whole."""
    waiting: list[list[IntArray]] = []
    for level in order:
        stream = _level_stream(levels, level, epochs, seed)
        ends = np.cumsum(_split_sizes(len(stream), len(order) - level))
        waiting.append(np.split(stream, ends[:-1]))
        yield [parts.pop(0) for parts in waiting]


def _level_stream(levels: IntArray, level: int, epochs: float, seed: int) -> IntArray:
    rows: IntArray = np.flatnonzero(levels == level)
    return rows[repeat_order(len(rows), epochs, seed, _ROWS, level)]


def _split_sizes(count: int, num_parts: int) -> list[int]:
    """Splits a count into near-equal parts, the larger ones first."""
    return [count // num_parts + (part < count % num_parts) for part in range(num_parts)]
