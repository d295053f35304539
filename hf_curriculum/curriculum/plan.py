"""The plan: the whole index order of a run, with its stages, fixed before training."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..core.errors import invalid
from ..core.files import write_atomic
from ..core.order import draw_order, group_by_length
from ..core.stages import Stage
from .config import CurriculumConfig
from .pacing import StageContent, count_levels, plan_steps, spread_groups, stage_contents


__all__ = ["CurriculumPlan", "build_plan"]

IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

_FORMAT = 1
_MAX_GROUP_BATCHES = 50
# Continues the list of what a seeded order is for in `pacing.py`.
_GROUP, _FILL = 4, 5


@dataclass(frozen=True, eq=False)
class CurriculumPlan:
    """
    The order in which a run sees its rows.

    Made by [`build_plan`] as a pure function of its arguments, and epoch-free: one pass over `indices` is the whole
    run. Two plans are equal if they train the same rows in the same steps and stages; `settings` do not count.

    Args:
        indices (`np.ndarray` of shape `(P,)` and dtype `int64`):
            Rows in training order; `P` is a multiple of `global_batch_size`.
        replayed (`np.ndarray` of shape `(P,)` and dtype `bool`):
            Which draws are replay. Rows that only complete the run's last global batch (the last
            `stages[-1].num_filled` of them) are not.
        stages (`tuple[Stage, ...]`):
            The stages, in order, without gaps. In each, `num_samples + num_replayed + num_filled` is the number of
            rows of its steps: a row that completes the batch of the stage before counts there, as filled.
        global_batch_size (`int`):
            Rows in one optimizer step: per-device batch x processes x accumulation.
        num_rows (`int`):
            Rows of the data set.
        settings (`dict`):
            What the plan was built from, as JSON values.

    Raises:
        `ValueError`: if the parts do not fit together.

    Example:

    ```python
    >>> from hf_curriculum import CurriculumConfig, build_plan

    >>> plan = build_plan([0, 0, 1, 1, 2, 2], CurriculumConfig(num_levels=3), global_batch_size=2)
    >>> plan.num_steps, plan.stage_at(1).levels
    (3, (1,))
    ```
    """

    indices: IntArray
    replayed: BoolArray
    stages: tuple[Stage, ...]
    global_batch_size: int
    num_rows: int
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        ends = [0, *(stage.end_step for stage in self.stages)]
        starts = [stage.first_step for stage in self.stages]
        if not self.stages or starts != ends[:-1] or any(a >= b for a, b in zip(ends, ends[1:])):
            raise invalid("stages", list(zip(starts, ends[1:])), "stages of at least one step each, without gaps")
        num_draws = ends[-1] * self.global_batch_size
        for name, array in (("indices", self.indices), ("replayed", self.replayed)):
            if array.shape != (num_draws,):
                raise invalid(name, f"an array of shape {array.shape}", f"({num_draws},), which the stages say")
            # A view, so that freezing it does not reach an array of the caller's.
            frozen = array.view()
            frozen.setflags(write=False)
            object.__setattr__(self, name, frozen)
        if int(self.indices.min()) < 0 or int(self.indices.max()) >= self.num_rows:
            outside = f"rows {int(self.indices.min())} to {int(self.indices.max())}"
            raise invalid("indices", outside, f"rows in [0, {self.num_rows})")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.stages[-1].end_step

    @cached_property
    def hash(self) -> str:
        """SHA-256 over rows, replay flags, stages, global batch size and number of rows, in hexadecimal."""
        table = [self.global_batch_size, self.num_rows, [asdict(stage) for stage in self.stages]]
        digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.indices, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self.replayed).data)
        return digest.hexdigest()

    def stage_at(self, step: int) -> Stage:
        """
        Finds the stage of an optimizer step.

        Args:
            step (`int`):
                Optimizer step in `[0, num_steps)`; step 0 is the first.

        Returns:
            `Stage`: the stage that trains at this step.

        Raises:
            `ValueError`: for a step outside the run.
        """
        if not 0 <= step < self.num_steps:
            raise invalid("step", step, f"an integer in [0, {self.num_steps})")
        return self.stages[bisect.bisect_right([stage.end_step for stage in self.stages], step)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """
        Writes `plan.json` (readable), `order.npy` and `replayed.npy`.

        Each file appears whole or not at all, `plan.json` last. Call it on one process.

        Args:
            folder (`str` or `os.PathLike`):
                Made if it does not exist. A plan that is already there is replaced.

        Raises:
            `OSError`: if the files cannot be written.
        """
        target = Path(folder)
        counted = ("num_samples", "num_replayed", "num_filled")
        text = json.dumps(
            {
                "format": _FORMAT,
                "hash": self.hash,
                "global_batch_size": self.global_batch_size,
                "num_rows": self.num_rows,
                "num_steps": self.num_steps,
                **{name: sum(getattr(stage, name) for stage in self.stages) for name in counted},
                "settings": self.settings,
                "stages": [asdict(stage) for stage in self.stages],
            },
            indent=2,
        )
        write_atomic(target / "order.npy", lambda file: np.save(file, self.indices))
        write_atomic(target / "replayed.npy", lambda file: np.save(file, self.replayed))
        write_atomic(target / "plan.json", lambda file: file.write(text.encode() + b"\n"))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> CurriculumPlan:
        """
        Reads what [`CurriculumPlan.save`] wrote, and verifies its hash.

        Args:
            folder (`str` or `os.PathLike`):
                Folder with the three files.

        Returns:
            `CurriculumPlan`: equal to the one saved.

        Raises:
            `ValueError`: if a file is missing, unreadable or not as it was written.
        """
        source = Path(folder)
        expected = "a folder written by `CurriculumPlan.save`"
        fix = "Build the plan again with `build_plan`: it gives the same plan for the same arguments."
        for name in ("plan.json", "order.npy", "replayed.npy"):
            if not (source / name).is_file():
                raise invalid("folder", f"{source}, which has no {name}", expected, fix)
        try:
            saved = json.loads((source / "plan.json").read_text(encoding="utf-8"))
            if saved["format"] != _FORMAT:
                raise invalid("format", saved["format"], str(_FORMAT))
            plan = cls(
                indices=np.load(source / "order.npy", allow_pickle=False),
                replayed=np.load(source / "replayed.npy", allow_pickle=False),
                stages=tuple(
                    Stage(**stage | {name: tuple(stage[name]) for name in ("levels", "introduces")})
                    for stage in saved["stages"]
                ),
                global_batch_size=saved["global_batch_size"],
                num_rows=saved["num_rows"],
                settings=saved["settings"],
            )
            found = plan.hash
        except (OSError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise invalid("folder", f"{source}, which cannot be read as a plan ({error})", expected, fix) from error
        if found != saved["hash"]:
            raise invalid("folder", f"{source}, whose files were changed or do not belong together", expected, fix)
        return plan

    def __eq__(self, other: object) -> bool:
        return self.hash == other.hash if isinstance(other, CurriculumPlan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hash)


def build_plan(
    levels: Sequence[int] | IntArray,
    config: CurriculumConfig,
    *,
    global_batch_size: int,
    num_train_epochs: float = 1.0,
    max_steps: int = -1,
    seed: int = 0,
    lengths: Sequence[int] | IntArray | None = None,
    groups: Sequence[int] | IntArray | None = None,
) -> CurriculumPlan:
    """
    Fixes the order of a whole run.

    Stage boundaries fall on optimizer steps: a stage's short last global batch is completed with the first rows of the
    next stage, which are not repeated there, and the run's last one with seeded rows of the last stage.

    Args:
        levels (`Sequence[int]` or `np.ndarray` of shape `(N,)`):
            Level of each row, 0 the easiest, as [`~hf_curriculum.curriculum.levels.assign_levels`] gives them.
        config ([`CurriculumConfig`]):
            Read: `num_levels`, `pacing`, `replay_fraction`, `group_by_length`.
        global_batch_size (`int`):
            Rows in one optimizer step: per-device batch x processes x accumulation.
        num_train_epochs (`float`, *optional*, defaults to `1.0`):
            How often each row is seen in all, under every pacing; replayed rows come on top.
        max_steps (`int`, *optional*, defaults to `-1`):
            If positive, the exact number of optimizer steps. A longer plan is shortened, each stage in proportion
            (it keeps the beginning of its order, and at least one step); a shorter one is first built for the smallest
            multiple of `num_train_epochs` that is long enough.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all orders.
        lengths (`Sequence[int]` or `np.ndarray` of shape `(N,)`, *optional*):
            Tokens of each row. Needed, and read, if `config.group_by_length`.
        groups (`Sequence[int]` or `np.ndarray` of shape `(N,)`, *optional*):
            Group of each row, its task say: every stretch of a stage then holds the groups in their share of it, for
            levels inside tasks. For a curriculum over tasks, give the place of its task as the level of each row.

    Returns:
        `CurriculumPlan`: the same for the same arguments, whatever the number of processes.

    Raises:
        `ValueError`: for arguments out of range or not matching; an empty level; a stage that gets no optimizer step.

    Example:

    ```python
    >>> from hf_curriculum import CurriculumConfig, build_plan

    >>> plan = build_plan([0, 1, 2] * 10, CurriculumConfig(pacing="cumulative"), global_batch_size=4, seed=1)
    >>> [(stage.levels, stage.num_steps) for stage in plan.stages]
    [((0,), 1), ((0, 1), 2), ((0, 1, 2), 5)]
    ```
    """
    rows = np.asarray(levels[:])
    counts = count_levels(rows, config.num_levels)
    row_lengths = _one_per_row("lengths", lengths, len(rows)) if config.group_by_length else None
    epochs, steps = plan_steps(
        counts,
        config.pacing,
        replay_fraction=config.replay_fraction,
        num_train_epochs=num_train_epochs,
        max_steps=max_steps,
        global_batch_size=global_batch_size,
    )
    contents = stage_contents(
        rows,
        config.pacing,
        num_levels=config.num_levels,
        replay_fraction=config.replay_fraction,
        num_train_epochs=epochs,
        seed=seed,
    )
    if groups is not None:
        contents = spread_groups(contents, _one_per_row("groups", groups, len(rows)), seed)
    indices, replayed, stages = _place(contents, steps, global_batch_size, row_lengths, seed)
    if config.pacing == "random":
        stages = _equal_parts(stages[0], config.num_levels, global_batch_size)
    settings = {
        "pacing": config.pacing,
        "num_levels": config.num_levels,
        "replay_fraction": config.replay_fraction,
        "group_by_length": config.group_by_length,
        "num_train_epochs": num_train_epochs,
        "planned_epochs": epochs,
        "max_steps": max_steps,
        "seed": seed,
        "level_counts": counts,
    }
    return CurriculumPlan(indices, replayed, tuple(stages), global_batch_size, len(rows), settings)


def _place(
    contents: Iterable[StageContent], steps: list[int], global_batch_size: int, lengths: IntArray | None, seed: int
) -> tuple[IntArray, BoolArray, list[Stage]]:
    """
    Lays the stages one after another, each up to the end of its last global batch.

    A stage whose rows end before that leaves a hole, which the next stage's first rows fill; one with more rows than
    steps (`max_steps`) loses its last ones.
    """
    indices = np.empty(sum(steps) * global_batch_size, dtype=np.int64)
    replayed = np.zeros(len(indices), dtype=np.bool_)
    stages: list[Stage] = []
    cursor = 0
    for content, num_steps in zip(contents, steps):
        first = stages[-1].end_step if stages else 0
        start, end = first * global_batch_size, (first + num_steps) * global_batch_size
        count = min(len(content.rows), end - cursor)
        placed = slice(cursor, cursor + count)
        key = (seed, _GROUP, len(stages))
        indices[placed], replayed[placed] = _grouped(content, start - cursor, count, lengths, global_batch_size, key)
        cursor += count
        num_replayed = int(np.count_nonzero(replayed[start:cursor]))
        stages.append(
            Stage(
                index=len(stages),
                levels=content.levels,
                introduces=content.introduces,
                first_step=first,
                end_step=first + num_steps,
                num_samples=cursor - start - num_replayed,
                num_replayed=num_replayed,
                num_filled=end - cursor,
            )
        )
    if cursor < len(indices):
        own = content.rows[~content.replayed]
        indices[cursor:] = own[draw_order(len(own), len(indices) - cursor, seed, _FILL)]
    return indices, replayed, stages


def _grouped(
    content: StageContent,
    borrowed: int,
    count: int,
    lengths: IntArray | None,
    global_batch_size: int,
    key: tuple[int, ...],
) -> tuple[IntArray, BoolArray]:
    """
    Returns the first `count` rows of a stage and their flags, grouped by length where wanted.

    The first `borrowed` rows complete the batch of the stage before: they stay, or all batches would be cut across the
    groups.
    """
    rows, replayed = content.rows[:count], content.replayed[:count]
    if lengths is None:
        return rows, replayed
    # Longer stretches would reach into the next pass over a small stage, where a row's two copies, being of equal
    # length, would land in one batch.
    seen = np.zeros(len(lengths), dtype=np.bool_)
    seen[rows] = True
    group_batches = min(_MAX_GROUP_BATCHES, max(1, int(np.count_nonzero(seen)) // (4 * global_batch_size)))
    positions = np.arange(borrowed, count, dtype=np.int64)
    positions = group_by_length(positions, lengths[rows], global_batch_size, *key, group_batches=group_batches)
    positions = np.concatenate([np.arange(borrowed, dtype=np.int64), positions])
    return rows[positions], replayed[positions]


def _equal_parts(whole: Stage, num_parts: int, global_batch_size: int) -> list[Stage]:
    """Cuts the only content of a run without order into equal parts of its steps; filled rows are in the last one."""
    ends = [whole.num_steps * part // num_parts for part in range(num_parts + 1)]
    parts = [
        replace(
            whole, index=i, first_step=start, end_step=end, num_samples=(end - start) * global_batch_size, num_filled=0
        )
        for i, (start, end) in enumerate(zip(ends, ends[1:]))
    ]
    last = parts[-1]
    parts[-1] = replace(last, num_samples=last.num_samples - whole.num_filled, num_filled=whole.num_filled)
    return parts


def _one_per_row(name: str, values: Sequence[int] | IntArray | None, num_rows: int) -> IntArray:
    if values is None:
        raise invalid(
            name, None, "the length of each row with `group_by_length=True`", "Or set `group_by_length=False`."
        )
    array = np.asarray(values[:])
    if array.shape != (num_rows,) or not np.issubdtype(array.dtype, np.integer):
        got = f"an array of shape {array.shape}" if array.shape != (num_rows,) else f"values of dtype {array.dtype}"
        raise invalid(name, got, f"({num_rows},), one integer for each level")
    return array.astype(np.int64, copy=False)
